"""NBD servers to compare with, each serving one file over a unix socket with write-back cache."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Export:
    """Something to run a load against."""

    socket: Path
    name: str
    pids: tuple[int, ...]

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{self.name}?socket={self.socket}"

    def cpu_s(self) -> float:
        """Processor seconds that the serving processes have used so far."""
        return sum(map(cpu_s, self.pids))


def cpu_s(pid: int) -> float:
    """User and system seconds of a process, without its children."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return 0.0


@cache
def example(name: str) -> Path:
    """A release build of one of the core's example programs."""
    command = ["cargo", "build", "--release", "--quiet", "-p", "ebbtide-core", "--example", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UnavailableError(f"{name} does not build: {done.stderr[-300:]}")
    target = Path(os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target")))
    return target / "release" / "examples" / name


def _command(peer: str, image: Path, socket: Path) -> list[str]:
    match peer:
        case "nbdkit":
            return ["nbdkit", "--foreground", "--unix", str(socket), "file", str(image)]
        case "qemu-nbd":
            return [
                "qemu-nbd", "--format=raw", "--cache=writeback", "--persistent", "--shared=16",
                f"--socket={socket}", str(image),
            ]  # fmt: skip
        case "nbd_file":
            return [str(example("nbd_file")), str(image), "--unix", str(socket)]
        case _:
            raise ValueError(peer)


@contextlib.contextmanager
def serving(peer: str, image: Path, directory: Path) -> Iterator[Export]:
    """Run a peer ("nbdkit", "qemu-nbd", or our server alone, "nbd_file") on `image`.

    Raises UnavailableError if it is not installed or does not start.
    """
    socket = directory / f"{peer}.sock"
    command = _command(peer, image, socket)
    if shutil.which(command[0]) is None:
        raise UnavailableError(f"{peer} is not installed")
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 10
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise UnavailableError(f"{peer} does not start")
            time.sleep(0.02)
        time.sleep(0.1)
        yield Export(socket, "", (process.pid,))
    finally:
        process.kill()
        process.wait(10)
        for pipe in (process.stdin, process.stderr):
            if pipe is not None:
                pipe.close()
        socket.unlink(missing_ok=True)
