"""Two agents on this machine for the demo, and the promise to leave nothing behind.

Agents start tap, view and holder processes that outlive them on purpose, so ending the demo means
asking nicely first (close, detach, unprotect) and then sweeping: whatever process carries the
token of this run in its environment, whatever is mounted or looped below its directory.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ebbtide.cli.client import Client
from ebbtide.errors import EbbError, InternalError, UnreachableError
from ebbtide.rpc import agent_pb2
from ebbtide.security.identity import create_identity
from ebbtide.security.keys import MasterKey

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

#: Environment variable that marks the processes of one run.
TOKEN_NAME = "EBBTIDE_DEMO"  # noqa: S105 - a mark, not a secret
READY_S = 20.0


@dataclass(slots=True)
class Host:
    """One agent: directory, process, connection."""

    name: str
    root: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    _client: Client | None = None

    @property
    def config(self) -> Path:
        """Its agent.toml."""
        return self.root / "agent.toml"

    @property
    def log(self) -> Path:
        """What it and its servers say."""
        return self.root / "agent.log"

    def lay_out(self, peer: Host) -> None:
        """Write agent.toml and make an identity."""
        identity = self.root / "identity"
        identity.mkdir(mode=0o700, parents=True)
        create_identity(identity / "agent.crt", identity / "agent.key", self.name)
        MasterKey.create(identity / "master.key")
        self.config.write_text(
            f'[agent]\nname = "{self.name}"\nlisten = "127.0.0.1:{self.port}"\n\n'
            f'[peer.{peer.name}]\naddress = "127.0.0.1:{peer.port}"\n'
            f'certificate = "{peer.root}/identity/agent.crt"\n'
        )
        for name in ("state", "spool", "journal", "overlay"):
            (self.root / name).mkdir(mode=0o700)

    def start(self, token: str) -> None:
        """Start `ebb agent` in a session of its own: Ctrl-C is ours to handle."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ebbtide.cli", "agent", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, TOKEN_NAME: token},
                cwd="/",
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Wait until it answers. Raises `UnreachableError` with the end of its log."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if self.process is not None and self.process.poll() is not None:
                raise InternalError(f"agent '{self.name}' ended at once: {self.last_words()}")
            with contextlib.suppress(EbbError):
                self.client.call("Status", agent_pb2.AgentStatusRequest(), timeout_s=2.0)
                return
            time.sleep(0.05)
        raise UnreachableError(
            f"agent '{self.name}' does not answer: {self.last_words()}", code="timeout"
        )

    def last_words(self) -> str:
        """The end of its log, on one line."""
        try:
            return " | ".join(self.log.read_text(errors="replace").splitlines()[-4:])
        except OSError:
            return "it left no log"

    @property
    def client(self) -> Client:
        """A connection over its unix socket. Raises `UnreachableError` before it listens."""
        if self._client is None:
            self._client = Client.over_socket(self.root / "agent.sock")
        return self._client

    def close(self) -> None:
        """End the connection."""
        if self._client is not None:
            self._client.close()
            self._client = None


class Hosts:
    """Source and target, in one temporary directory. Use as a context manager."""

    def __init__(self) -> None:
        # Not TMPDIR: sockets must have short paths.
        self.root = Path(tempfile.mkdtemp(prefix="ebb-demo-", dir="/tmp")).resolve()
        self.token = secrets.token_hex(16)
        first, second = free_ports()
        self.source = Host("hospital", self.root / "hospital", first)
        self.target = Host("refuge", self.root / "refuge", second)

    def __enter__(self) -> Hosts:
        try:
            self.source.lay_out(self.target)
            self.target.lay_out(self.source)
            for host in (self.target, self.source):
                host.start(self.token)
            for host in (self.target, self.source):
                host.wait_ready()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def end(self) -> None:
        """Undo everything. Interrupts wait until it is done."""
        with no_interrupts():
            for host in (self.target, self.source):
                with contextlib.suppress(EbbError):
                    _take_down(host)
                host.close()
            for host in (self.target, self.source):
                if host.process is not None:
                    _end_process(host.process)
            sweep(self.root, self.token)
            shutil.rmtree(self.root, ignore_errors=True)


def _take_down(host: Host) -> None:
    """Close views, detach and unprotect groups; each step whatever became of the others."""
    client = host.client
    status = client.call("Status", agent_pb2.AgentStatusRequest(), timeout_s=3.0)
    steps: list[tuple[str, Message]] = [
        ("CloseView", agent_pb2.CloseViewRequest(view=view.id, force=True)) for view in status.views
    ]
    for mountpoint in mounts_below(host.root.parent / "mnt"):
        _run("umount", mountpoint)
    for group in status.sources:
        steps.append(("Detach", agent_pb2.DetachRequest(group=group.name)))
        kind = agent_pb2.UnprotectRequest
        steps.append(("Unprotect", kind(group=group.name, history=kind.HISTORY_DROP, force=True)))
    for method, request in steps:
        with contextlib.suppress(EbbError):
            client.call(method, request, timeout_s=10.0)


def _end_process(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(8.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(8.0)


def sweep(root: Path, token: str) -> list[str]:
    """End processes marked with `token`, then mounts and loop devices below `root`.

    Returns what was found, for tests: after an orderly end it is empty.
    """
    found = [f"process {pid}" for pid in marked(token)]
    for sign, patience_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
        for pid in marked(token):
            with contextlib.suppress(OSError):
                os.kill(pid, sign)
        deadline = time.monotonic() + patience_s
        while marked(token) and time.monotonic() < deadline:
            time.sleep(0.05)
    for mountpoint in sorted(mounts_below(root), reverse=True):
        found.append(f"mount {mountpoint}")
        _run("umount", "-l", mountpoint)
    for device in loops_below(root):
        found.append(f"loop {device}")
        _run("losetup", "-d", device)
    return found


def marked(token: str) -> list[int]:
    """Living processes that carry the token in their environment."""
    wanted = f"{TOKEN_NAME}={token}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_bytes().rpartition(b")")[2].split()[0]
                environment = (entry / "environ").read_bytes().split(b"\0")
                if wanted in environment and state not in (b"Z", b"X"):
                    found.append(int(entry.name))
    return found


def mounts_below(root: Path) -> list[str]:
    """Mount points at or below a directory."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [p for p in points if p == str(root) or p.startswith(f"{root}/")]


def loops_below(root: Path) -> list[str]:
    """Loop devices over a file below a directory."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if entry.read_text().startswith(f"{root}/"):
                found.append(f"/dev/{entry.parent.parent.name}")
    return found


def _run(*command: str) -> None:
    """Run a tool of the sweep; it may fail, what counts is what is left afterwards."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            command, check=False, capture_output=True, timeout=20, env={**os.environ, "PATH": path}
        )


def free_ports() -> tuple[int, int]:
    """Two TCP ports that are free now."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


@contextlib.contextmanager
def no_interrupts() -> Iterator[None]:
    """What would end us does nothing inside."""
    signs = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    kept = {sign: signal.signal(sign, signal.SIG_IGN) for sign in signs}
    try:
        yield
    finally:
        for sign, handler in kept.items():
            signal.signal(sign, handler)
