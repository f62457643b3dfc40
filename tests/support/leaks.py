"""Finds what a test forgot: processes of ours, mounts, loop devices, network namespaces."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Words in a command line that mark a process as started by Ebbtide or by its tests.
_OURS = ("ebbtide.", "ebb agent", "bin/ebb ", "examples/nbd_file", "examples/fuse_file")


def _processes() -> frozenset[str]:
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        # Only those of this checkout: others may run beside it.
        here = sys.prefix in command or "examples/" in command
        if here and any(word in command for word in _OURS) and "pytest" not in command:
            found.add(f"process {entry.name}: {command.strip()}")
    return frozenset(found)


def _mounts() -> frozenset[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return frozenset(f"mount {' '.join(line.split()[:3])}" for line in lines)


def _loops() -> frozenset[str]:
    found = set()
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found.add(f"loop {entry.parent.parent.name}: {entry.read_text().strip()}")
        except OSError:
            continue
    return frozenset(found)


def _namespaces() -> frozenset[str]:
    where = Path("/run/netns")
    return frozenset(f"netns {p.name}" for p in where.iterdir()) if where.is_dir() else frozenset()


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything that a test could leave behind, at one moment."""

    things: frozenset[str]

    @classmethod
    def take(cls) -> Inventory:
        return cls(_processes() | _mounts() | _loops() | _namespaces())

    def beyond(self, before: Inventory, within_s: float = 10.0) -> list[str]:
        """What is here and was not `before`; gives processes some time to end."""
        deadline = time.monotonic() + within_s
        left = self.things - before.things
        while left and time.monotonic() < deadline:
            time.sleep(0.1)
            left = left & Inventory.take().things
        return sorted(left)
