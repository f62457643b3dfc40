"""A group without a target: its spool is its history, beside a tap that goes on writing.

Guards what only this case has: the tap, another process, writes the log that views and restore
read; it is killed under them; nothing trims what nobody ships; and what is kept when protection
ends can still be opened. That views equal the model at any microsecond is `test_oracle`'s.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from typing import TYPE_CHECKING

import grpc
import pytest

from ebbtide.errors import ExitCode
from ebbtide.rpc import agent_pb2
from tests.support.nbd import Client
from tests.support.stack import Stack, eventually, is_alive

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.needs("root"),
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("leak_check"),
]
SIZE = 8 << 20


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with Stack.run(tmp_path, local=True) as stack:
        yield stack


def spool(stack: Stack) -> Path:
    return next(path for path in (stack.source.directory / "spool").iterdir() if path.is_dir())


def write(stack: Stack, data: bytes, offset: int = 0) -> None:
    with Client(stack.uri("ward", "disk")) as client:
        client.pwrite(data, offset)
        client.flush()


def content(stack: Stack) -> bytes:
    with Client(stack.uri("ward", "disk")) as client:
        return client.read_all()


def shown(view: agent_pb2.View) -> bytes:
    with Client(view.volumes[0].nbd_uri) as client:
        return client.read_all()


def kill_tap(stack: Stack) -> None:
    pid = stack.source.source("ward").tap.pid
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_alive(pid), what="the old tap is gone")
    eventually(lambda: stack.is_copied("ward"), what="a new tap serves, its span has ended")


def test_newest_view_has_every_flushed_write(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": SIZE})
    for _ in range(20):
        write(stack, rng.randbytes(8192), rng.randrange(SIZE // 4096 - 2) * 4096)
        with stack.view("ward") as view:
            assert shown(view) == content(stack)


def test_views_stand_while_the_tap_writes_and_is_killed(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": SIZE})
    good = rng.randbytes(1 << 20)
    write(stack, good)
    stack.source.ebb("bookmark", "ward", "good")
    before = content(stack)
    stop = threading.Event()
    written = 0

    def go_on() -> None:
        nonlocal written
        while not stop.is_set():
            # A killed tap ends the connection; flushed or not, each write is a whole block.
            with contextlib.suppress(Exception), Client(stack.uri("ward", "disk")) as client:
                while not stop.is_set():
                    client.pwrite(os.urandom(65536), (written % 128) * 65536)
                    written += 1

    writer = threading.Thread(target=go_on)
    writer.start()
    try:
        eventually(lambda: written > 50, what="the tap is busy")
        with stack.view("ward", bookmark="good") as view, Client(view.volumes[0].nbd_uri) as client:
            for _ in range(3):
                at = written
                kill_tap(stack)
                eventually(lambda at=at: written > at + 50, what="writes go on")
                assert client.read_all() == before
                with stack.view("ward", bookmark="good") as another:
                    assert shown(another) == before
            # The view's own process dies as well and shows the same again.
            os.kill(view.pid, signal.SIGKILL)

            def again() -> bool:
                with contextlib.suppress(Exception):
                    return shown(view) == before
                return False

            eventually(again, what="the view is there again")
    finally:
        stop.set()
        writer.join()
    with Client(stack.uri("ward", "disk")) as client:
        client.flush()
    with stack.view("ward") as view:
        assert shown(view) == content(stack)


def test_sealed_segments_are_indexed_beside_the_spool(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": SIZE})
    for _ in range(5):
        write(stack, rng.randbytes(65536))
        kill_tap(stack)  # a new incarnation: what was open is sealed

    def sealed() -> int:
        return len(list(spool(stack).glob("*.seg")))

    assert sealed() >= 5
    eventually(lambda: any(spool(stack).glob("*.run")), what="runs appear")
    # Four of one tier become one: fewer runs than segments, once all are indexed.
    eventually(lambda: 0 < len(list(spool(stack).glob("*.run"))) < sealed(), what="runs are merged")
    with stack.view("ward") as view:
        assert shown(view) == content(stack)
    # An agent that was away finds what is missing.
    stack.source.kill(signal.SIGTERM)
    for run in spool(stack).glob("*.run"):
        run.unlink()
    stack.source.start()
    eventually(lambda: any(spool(stack).glob("*.run")), what="runs are built again")
    with stack.view("ward") as view:
        assert shown(view) == content(stack)


@pytest.mark.needs("fuse", "loop", "mkfs.ext4")
def test_commands_of_history_work_without_a_target(stack: Stack) -> None:
    stack.protect("ward", {"disk": 32 << 20})
    live = stack.directory / "live"
    live.mkdir()
    device = stack.source.ebb_json("attach", "ward")["devices"][0]["device"]
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    subprocess.run(["mount", device, str(live)], check=True)
    try:
        (live / "patient").write_text("blood group A")
        subprocess.run(["sync", "-f", str(live)], check=True)
        stack.source.ebb("bookmark", "ward", "good")
        (live / "patient").write_text("lost")
        subprocess.run(["sync", "-f", str(live)], check=True)

        points = stack.source.ebb_json("points", "ward")
        assert [mark["label"] for mark in points["bookmarks"]] == ["good"]
        view = stack.source.ebb_json("view", "open", "ward", "--bookmark", "good", "--writable")
        assert stack.source.ebb_json("view", "list", "ward")["views"][0]["id"] == view["id"]
        assert view["id"] in stack.source.ebb("status", "ward").stdout
        past = stack.directory / "past"
        past.mkdir()
        stack.source.ebb("view", "mount", view["id"], str(past))
        assert (past / "patient").read_text() == "blood group A"
        kill_tap(stack)
        assert (past / "patient").read_text() == "blood group A"
        assert (live / "patient").read_text() == "lost"
        refused = stack.source.ebb("unprotect", "ward", "--force", check=False)
        assert refused.returncode == ExitCode.REFUSED
        assert "view list" in refused.stderr
        stack.source.ebb("view", "close", view["id"], "--yes")
        out = stack.directory / "out.img"
        stack.source.ebb("restore", "ward", f"disk={out}", "--bookmark", "good")
        with stack.view("ward", bookmark="good") as found:
            assert out.read_bytes() == shown(found)
    finally:
        subprocess.run(["umount", str(live)], check=False)
        stack.source.ebb("detach", "ward")


def test_history_that_is_kept_outlives_its_protection(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": SIZE})
    write(stack, rng.randbytes(1 << 20))
    stack.source.ebb("bookmark", "ward", "end")
    before = content(stack)
    directory = spool(stack)
    stack.source.ebb("unprotect", "ward")
    for _ in range(2):
        with stack.view("ward", bookmark="end") as view:
            assert shown(view) == before
        assert "history does not grow" in stack.source.ebb("status", "ward").stdout
        stack.source.kill(signal.SIGTERM)
        stack.source.start()
    kept = stack.source.target("ward").group.hex()
    # A new group of that name is another one: which is meant must be said.
    (stack.directory / "ward-disk.img").unlink()
    stack.protect("ward", {"disk": SIZE})
    refused = stack.source.ebb("points", "ward", check=False)
    assert refused.returncode == ExitCode.USAGE
    assert kept in refused.stderr
    with stack.view(kept, bookmark="end") as view:
        assert shown(view) == before
    unclear = stack.source.ebb("unprotect", "ward", "--delete-history", "--yes", check=False)
    assert unclear.returncode == ExitCode.USAGE
    assert kept in unclear.stderr
    stack.source.ebb("unprotect", kept, "--delete-history", "--yes")
    assert not directory.exists()
    assert stack.is_copied("ward")
    stack.source.ebb("unprotect", "ward", "--delete-history", "--yes")
    with pytest.raises(grpc.RpcError):
        stack.source.stub.Points(agent_pb2.PointsRequest(group="ward"))


def test_history_ends_where_the_spool_is_full(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": SIZE}, spool_bytes_max=4 << 20)
    write(stack, rng.randbytes(1 << 20))
    stack.source.ebb("bookmark", "ward", "good")
    before = content(stack)
    for _ in range(8):
        write(stack, rng.randbytes(1 << 20))
    full = agent_pb2.SourceGroup.STATE_EXTENTS_ONLY
    eventually(lambda: stack.source.source("ward").state == full, what="the spool is full")
    # Writing goes on, history does not, and what it holds opens.
    last = rng.randbytes(1 << 20)
    write(stack, last)
    assert content(stack)[: 1 << 20] == last
    with stack.view("ward", bookmark="good") as view:
        assert shown(view) == before
    with stack.view("ward") as view:
        assert shown(view) != content(stack)
    assert "spool-full" in stack.source.ebb("status", "ward").stdout
