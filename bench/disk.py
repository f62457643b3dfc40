"""What the disk under the journal does by itself."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_CHUNK = 1 << 20


def fdatasync_ms(directory: Path, seconds: float) -> list[float]:
    """Append 4 KiB and fdatasync, over and over; milliseconds of each."""
    path = directory / "fdatasync.probe"
    block = os.urandom(4096)
    took: list[float] = []
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        end = time.monotonic() + seconds
        while (begun := time.monotonic()) < end or len(took) < 10:
            os.write(fd, block)
            os.fdatasync(fd)
            took.append((time.monotonic() - begun) * 1000)
    finally:
        os.close(fd)
        path.unlink()
    return took


def write_mb_s(directory: Path, size: int) -> float:
    """Write `size` bytes in order and make them durable; megabytes (10^6) a second."""
    path = directory / "sequential.probe"
    chunk = os.urandom(_CHUNK)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        begun = time.monotonic()
        for _ in range(size // _CHUNK):
            os.write(fd, chunk)
        os.fdatasync(fd)
        return size / 1e6 / (time.monotonic() - begun)
    finally:
        os.close(fd)
        path.unlink()


def percentile(values: list[float], percent: float) -> float:
    """The value that `percent` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
