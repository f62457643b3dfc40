"""Loads: fio for random data, our own generator for recorded pages, which fio cannot write.

Both sides of a comparison always get the same one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from bench.errors import UnavailableError
from bench.peers import Export, example

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is asked of a server. A run ends after `seconds` or `bytes_max`, whichever is first."""

    name: str
    rw: str
    block: int
    depth: int
    seconds: float
    bytes_max: int
    size: int

    @property
    def writes(self) -> bool:
        return self.rw.endswith("write")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run of a load gave."""

    iops: float
    p50_us: float
    p99_us: float
    bytes: int
    cpu_s: float = 0.0
    lag_ms: float = 0.0


def _json(command: list[str], timeout: float, cwd: Path | None = None) -> Any:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout, cwd=cwd
    )
    if done.returncode != 0:
        raise UnavailableError(f"{command[0]} failed: {(done.stderr or done.stdout)[-300:]}")
    return json.loads(done.stdout[done.stdout.index("{") :])


@cache
def _fio_has_nbd() -> bool:
    if shutil.which("fio") is None:
        return False
    said = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=False)
    return "nbd" in said.stdout.split()


def fio(export: Export, case: Case, directory: Path) -> Outcome:
    """Run fio with its nbd engine and fresh random data in every buffer."""
    if not _fio_has_nbd():
        raise UnavailableError("fio with its nbd engine is not installed")
    command = [
        "fio", f"--name={case.name}", "--ioengine=nbd", f"--uri={export.uri}", f"--rw={case.rw}",
        f"--bs={case.block}", f"--iodepth={case.depth}", f"--size={case.size}",
        f"--io_size={case.bytes_max}", f"--runtime={case.seconds}", "--norandommap",
        "--refill_buffers", "--randrepeat=0", "--output-format=json",
    ]  # fmt: skip
    if not case.writes:
        command.append("--time_based")
    job = _json(command, case.seconds + 60, directory)["jobs"][0]
    side = job["write" if case.writes else "read"]
    percentiles = side["clat_ns"]["percentile"]
    return Outcome(
        iops=side["iops"],
        p50_us=percentiles["50.000000"] / 1000,
        p99_us=percentiles["99.000000"] / 1000,
        bytes=side["io_bytes"],
    )


def generator(
    export: Export,
    case: Case,
    pages: Path,
    *,
    seed: int = 1,
    rate: float = 0,
    answers: Path | None = None,
) -> Outcome:
    """Run our generator: every 4 KiB written is the next recorded page under a counter.

    `rate`: requests a second, 0 for as many as go; `answers`: file for the time of each answer
    (CLOCK_MONOTONIC, ns, 8 bytes little-endian), in the order of the answers.
    """
    command = [
        str(example("nbd_load")), str(export.socket), export.name, "--rw", case.rw,
        "--block", str(case.block), "--depth", str(case.depth), "--size", str(case.size),
        "--seconds", str(case.seconds), "--pages", str(pages), "--seed", str(seed),
    ]  # fmt: skip
    if case.writes and not rate:
        command += ["--count", str(case.bytes_max // case.block)]
    if rate:
        command += ["--rate", str(rate)]
    if answers is not None:
        command += ["--answers", str(answers)]
    found = _json(command, case.seconds + 60)
    return Outcome(
        iops=found["iops"],
        p50_us=found["p50_us"],
        p99_us=found["p99_us"],
        bytes=found["issued"] * case.block,
    )
