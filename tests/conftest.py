"""What all tests share: the seed, the size of a run, what the machine offers, and the leak check.

A run is short by default (about a tenth of the counts that the issues state); `make soak` sets
EBB_SOAK=1 for the whole counts. The seed is printed; EBB_SEED repeats a run.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.leaks import Inventory

if TYPE_CHECKING:
    from collections.abc import Iterator

SEED = int(os.environ.get("EBB_SEED") or random.SystemRandom().randrange(1 << 32))
SOAK = os.environ.get("EBB_SOAK") == "1"


def pytest_report_header() -> str:
    return f"ebbtide: seed {SEED} (EBB_SEED), {'soak' if SOAK else 'short'} run"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = len(terminalreporter.stats.get("skipped", []))
    terminalreporter.write_line(f"ebbtide: seed {SEED}, {skipped} skipped")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """A generator of its own for each test, made from the seed of the run."""
    return random.Random(f"{SEED}/{request.node.nodeid}")


@pytest.fixture(scope="session")
def rounds() -> object:
    """`rounds(full)`: how often to do something; a tenth of it in a short run, at least 3."""
    return lambda full: full if SOAK else max(3, full // 10)


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "needs(*tools): skips if one of the programs, 'root', 'fuse' or 'loop' is absent",
    ):
        config.addinivalue_line("markers", line)
    # A shell that runs us in the background has these ignored, and so would all that we start.
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    # Debian puts mkfs, losetup and ip where users' PATH does not look.
    os.environ["PATH"] += ":/usr/sbin:/sbin"


def _absent(need: str) -> str | None:
    match need:
        case "root":
            return None if os.geteuid() == 0 else "needs root"
        case "fuse":
            return None if Path("/dev/fuse").exists() else "needs /dev/fuse"
        case "loop":
            return None if Path("/dev/loop-control").exists() else "needs loop devices"
        case _:
            return None if shutil.which(need) or Path(need).exists() else f"needs {need}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for need in mark.args:
            if reason := _absent(need):
                pytest.skip(reason)


@pytest.fixture(autouse=True, scope="session")
def _nothing_left_behind() -> Iterator[None]:
    """The whole run leaves no process, mount, loop device or namespace behind."""
    before = Inventory.take()
    yield
    left = Inventory.take().beyond(before)
    if left:
        sys.stderr.write("\n".join(left) + "\n")
        pytest.fail("left behind: " + "; ".join(left))


@pytest.fixture
def leak_check() -> Iterator[None]:
    """The test leaves nothing behind; used where a test starts processes or mounts."""
    before = Inventory.take()
    yield
    left = Inventory.take().beyond(before)
    assert not left, left
