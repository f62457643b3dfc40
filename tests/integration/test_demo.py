"""`ebb demo` proves its story, on a block device and over the socket, and leaves nothing behind:
not at its end, not when it is interrupted at any moment, not when an agent dies under it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ebbtide.errors import ExitCode

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("leak_check", "_no_directory_left")]
DEMO = [str(Path(sys.executable).parent / "ebb"), "demo", "--seconds", "2", "--json"]


def directories() -> set[str]:
    return {path.name for path in Path("/tmp").glob("ebb-demo-*")}  # noqa: S108 - the demo's place


@pytest.fixture
def _no_directory_left() -> Iterator[None]:
    before = directories()
    yield
    assert directories() == before


def start(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*DEMO, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def check(numbers: dict[str, Any]) -> None:
    assert numbers["proven"] is True
    assert numbers["took_s"] < 60
    assert numbers["proven_rows"] == numbers["rows"] > 0
    assert numbers["proven_files"] == numbers["files"] > 0
    assert 0 < numbers["bookmark_rows"] < numbers["rows"]
    assert numbers["lost_rows_at_newest"] == numbers["rows"]
    assert numbers["writes"] > 0
    assert numbers["shipped_bytes"] > 0
    assert numbers["points"] > numbers["transactions"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), marks=pytest.mark.needs("root", "fuse", "loop", "mkfs.ext4")),
        ("--socket",),
    ],
    ids=["mounted", "socket"],
)
def test_the_story_is_true(options: tuple[str, ...]) -> None:
    with start(*options) as demo:
        out, err = demo.communicate(timeout=300)
    assert demo.returncode == 0, err
    assert err == ""
    check(json.loads(out))


def test_interrupted_at_any_moment(rng: random.Random, rounds: Any) -> None:
    for number in range(rounds(30)):
        sign = rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        with start(*(("--socket",) if number % 2 else ())) as demo:
            time.sleep(rng.uniform(0.1, 8.0))
            with contextlib.suppress(ProcessLookupError):
                demo.send_signal(sign)
            out, err = demo.communicate(timeout=120)
        assert "Traceback" not in err
        if demo.returncode == 0:
            # Too late to interrupt anything but the cleaning up: the whole story was told.
            check(json.loads(out))
        else:
            # Before Python has set its handlers up, the signal's own end.
            assert demo.returncode in (-sign, ExitCode.INTERRUPTED), err


def agents_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = []
    for child in children:
        with contextlib.suppress(OSError):
            if b"agent" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
                found.append(int(child))
    return found


def test_a_killed_agent_is_an_error_and_leaves_nothing(rng: random.Random) -> None:
    with start("--socket") as demo:
        deadline = time.monotonic() + 20
        while len(agents := agents_of(demo.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(2.0)
        os.kill(rng.choice(agents), signal.SIGKILL)
        _, err = demo.communicate(timeout=180)
    assert demo.returncode in {ExitCode.UNREACHABLE, ExitCode.INTERNAL}
    assert json.loads(err.splitlines()[-1])["error"]["message"]
