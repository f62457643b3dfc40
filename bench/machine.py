"""What the numbers were measured on."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

#: Programs whose version a reader needs to repeat the measurement.
_PROGRAMS = {
    "fio": ("fio", "--version"),
    "nbdkit": ("nbdkit", "--version"),
    "qemu-nbd": ("qemu-nbd", "--version"),
    "rustc": ("rustc", "--version"),
    "git": ("git", "describe", "--always", "--dirty"),
}


def describe(work: Path) -> dict[str, str]:
    """The machine, the disk under `work`, and the versions of the programs."""
    cpu = "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    described = {
        "cpu": cpu,
        "cpus": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_gib:.1f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "disk": _filesystem(work),
        "pinning": "none on either side: all processes may use all processors",
    }
    for name, command in _PROGRAMS.items():
        if shutil.which(command[0]):
            said = subprocess.run(command, capture_output=True, text=True, check=False)
            described[name] = (said.stdout or said.stderr).splitlines()[0].strip()
        else:
            described[name] = "absent"
    return described


def _filesystem(where: Path) -> str:
    """Device and type of the file system that holds `where`."""
    best = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, mountpoint, kind = line.split()[:3]
        inside = where == Path(mountpoint) or Path(mountpoint) in where.resolve().parents
        if inside and len(mountpoint) >= len(best[0]):
            best = (mountpoint, f"{kind} on {device}")
    return best[1]
