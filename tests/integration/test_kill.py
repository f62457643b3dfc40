"""Kill -9 of every process at random moments: nothing flushed is lost, all recover by themselves.

Guards invariants 2, 3 and 7 and S001-5.1.1b (nothing lost or damaged). Two loads: an NBD client
that keeps a model and reconnects, and SQLite on a mounted ext4 on the attached block device, whose
holder, tap, agents and view servers die under it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sqlite3
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from ebbtide.rpc import agent_pb2
from tests.support.nbd import Client, nbd_error
from tests.support.stack import Stack, eventually, is_alive

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable

pytestmark = [
    pytest.mark.needs("root"),
    pytest.mark.timeout(3600),
    pytest.mark.usefixtures("leak_check"),
]
SLOT = 4096
SLOTS = 256
#: Rows that the database keeps: a run that takes long must not fill its volume.
ROWS = 20_000


class Counter(threading.Thread):
    """Writes a growing number into slot after slot, flushing now and then, across kills.

    A slot is a block full of its number. One request is in flight at a time, so the order of
    numbers is the order of writes. `unanswered` are the numbers whose answer never came: they may
    or may not have happened.
    """

    def __init__(self, uri: str, rng: random.Random, before: Counter | None = None) -> None:
        super().__init__(daemon=True)
        self.uri, self.rng = uri, rng
        self.number = before.number if before else 0
        self.flushed = before.flushed if before else 0
        self.unanswered: set[int] = before.unanswered if before else set()
        self.failure: BaseException | None = None
        self.stopping = threading.Event()

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                with contextlib.suppress(nbd_error()):
                    self._write_until_cut()
                time.sleep(0.01)
        except BaseException as error:
            self.failure = error
            raise

    def _write_until_cut(self) -> None:
        with Client(self.uri) as client:
            while not self.stopping.is_set():
                self.number += 1
                number = self.number
                self.unanswered.add(number)
                client.pwrite(number.to_bytes(8, "little") * (SLOT // 8), number % SLOTS * SLOT)
                self.unanswered.remove(number)
                if self.rng.random() < 0.05:
                    client.flush()
                    self.flushed = number

    def finish(self) -> None:
        self.stopping.set()
        self.join(60)
        assert not self.is_alive()
        assert self.failure is None

    def check(self, content: bytes, flushed: int) -> None:
        """`content` is a prefix of the write order that holds everything up to `flushed`."""
        slots = []
        for slot in range(SLOTS):
            block = content[slot * SLOT : (slot + 1) * SLOT]
            assert block == block[:8] * (SLOT // 8), f"slot {slot} is torn"
            slots.append(int.from_bytes(block[:8], "little"))
        newest = max(slots)
        assert newest >= flushed, f"newest is {newest}, {flushed} was flushed"
        for slot, found in enumerate(slots):
            wanted = newest - (newest - slot) % SLOTS
            while wanted > 0 and found != wanted and wanted in self.unanswered:
                wanted -= SLOTS
            assert found == max(wanted, 0), f"slot {slot} is not of prefix {newest}"


def holders(stack: Stack) -> list[int]:
    """The source's holder, which names its directory in its command line."""
    listed = subprocess.run(
        ["pgrep", "-f", "ebbtide.source.holder"], capture_output=True, text=True, check=False
    )
    ours = stack.source.helpers()
    return [int(pid) for pid in listed.stdout.split() if int(pid) in ours]


VICTIMS = ("tap", "source", "target", "view", "holder")


def pids_of(stack: Stack, victim: str) -> list[int]:
    agents = {"source": stack.source, "target": stack.target}
    if host := agents.get(victim):
        return [host.process.pid] if host.process else []
    if victim == "holder":
        return holders(stack)
    with contextlib.suppress(grpc.RpcError):
        if victim == "view":
            return [found.pid for found in stack.target.status().views if found.pid]
        return [pid for pid in [stack.source.source("ward").tap.pid] if pid]
    return []


def kill(stack: Stack, *names: str, pause_s: float = 0.0) -> None:
    """Kill processes, with a pause between them, and bring back what nobody supervises: agents.

    Returns when they are gone: a killed tap takes a second now and then to give its memory back,
    and has its descriptors until then.
    """
    watched: list[int] = []
    for number, pids in enumerate([pids_of(stack, name) for name in names]):
        time.sleep(pause_s if number else 0.0)
        watched += send_kill(pids)
    for descriptor in watched:
        try:
            assert select.select([descriptor], [], [], 30)[0], f"{names} did not end"
        finally:
            os.close(descriptor)
    for name, host in (("source", stack.source), ("target", stack.target)):
        if name in names:
            host.kill()
            host.start()


def send_kill(pids: Iterable[int]) -> list[int]:
    """Send SIGKILL; returns a descriptor for each process, readable when it is gone."""
    watched = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            watched.append(os.pidfd_open(pid))
            os.kill(pid, signal.SIGKILL)
    return watched


def settled(stack: Stack, within_s: float = 90) -> None:
    """Wait until the tap serves, the span of recovery is closed and the target has everything."""

    def quiet() -> bool:
        with contextlib.suppress(grpc.RpcError, StopIteration):
            group = stack.source.source("ward")
            return (
                group.state == agent_pb2.SourceGroup.STATE_SERVING
                and is_alive(group.tap.pid)
                and not group.tap.in_span
                and stack.target.target("ward").durable_seq >= group.tap.last_seq > 0
            )
        return False

    eventually(quiet, within_s, "the group recovers and catches up")


def test_nothing_flushed_is_lost_over_nbd(
    tmp_path: Path, rng: random.Random, rounds: Callable[[int], int]
) -> None:
    with Stack.run(tmp_path) as stack:
        stack.protect("ward", {"disk": SLOT * SLOTS})
        uri = stack.uri("ward", "disk")
        counter = None
        for _ in range(rounds(100)):
            counter = Counter(uri, rng, counter)
            counter.start()
            killed = rng.choice(["tap", "tap", "source", "target"])
            time.sleep(rng.uniform(0.05, 0.8))
            kill(stack, killed)
            time.sleep(rng.uniform(0.05, 0.5))
            counter.finish()
            settled(stack)
            with Client(uri) as client:
                source = client.read_all()
            counter.check(source, counter.flushed)
            with stack.view("ward") as view, Client(view.volumes[0].nbd_uri) as client:
                assert client.read_all() == source, f"newest view differs after killing {killed}"
        assert counter is not None
        points = stack.target.stub.Points(agent_pb2.PointsRequest(group="ward"))
        for _ in range(rounds(100)):
            at = rng.randrange(points.horizon.time_us, points.newest.time_us + 1)
            with (
                stack.view("ward", at_time_us=at) as view,
                Client(view.volumes[0].nbd_uri) as client,
            ):
                counter.check(client.read_all(), 0)


@pytest.mark.needs("fuse", "loop")
def test_a_device_outlives_any_two_of_tap_holder_and_agent(
    tmp_path: Path, rng: random.Random, rounds: Callable[[int], int]
) -> None:
    with Stack.run(tmp_path) as stack:
        stack.protect("ward", {"disk": SLOT * SLOTS})
        attached = stack.source.stub.Attach(agent_pb2.AttachRequest(group="ward"), timeout=30)
        writer = DeviceWriter(attached.devices[0].device)
        writer.start()
        try:
            for number in range(rounds(100)):
                time.sleep(rng.uniform(0.0, 0.2))
                eventually(lambda: complete(stack), 60, "every process is back")
                both = [("tap", "holder"), ("holder", "source"), ("source", "tap")][number % 3]
                kill(stack, *rng.sample(both, 2), pause_s=rng.choice([0.0, rng.uniform(0.0, 0.5)]))
                assert writer.failure is None, f"killed {both}: {writer.failure}"
                before = writer.number
                eventually(lambda at=before: writer.number > at + 10, 60, "writing goes on")
        finally:
            writer.stopping.set()
            writer.join(60)
        assert writer.failure is None
        assert not writer.is_alive()


class DeviceWriter(threading.Thread):
    """Writes numbers to a block device, each durably, and reads them back."""

    def __init__(self, device: str) -> None:
        super().__init__(daemon=True)
        self.device = device
        self.number = 0
        self.failure: BaseException | None = None
        self.stopping = threading.Event()

    def run(self) -> None:
        try:
            with Path(self.device).open("r+b", buffering=0) as device:
                while not self.stopping.is_set():
                    block = self.number.to_bytes(8, "little") * (SLOT // 8)
                    at = self.number % SLOTS * SLOT
                    assert os.pwrite(device.fileno(), block, at) == SLOT
                    os.fsync(device.fileno())
                    # Not from the device's page cache.
                    os.posix_fadvise(device.fileno(), at, SLOT, os.POSIX_FADV_DONTNEED)
                    assert os.pread(device.fileno(), SLOT, at) == block
                    self.number += 1
        except (OSError, AssertionError) as error:
            self.failure = error


@pytest.mark.needs("fuse", "loop", "mkfs.ext4")
def test_sqlite_on_ext4_survives_every_kill(
    tmp_path: Path, rng: random.Random, rounds: Callable[[int], int]
) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    with Stack.run(tmp_path) as stack:
        stack.protect("ward", {"disk": 1 << 30})
        device = (
            stack.source.stub.Attach(agent_pb2.AttachRequest(group="ward"), timeout=30)
            .devices[0]
            .device
        )
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        subprocess.run(["mount", device, str(mountpoint)], check=True)
        try:
            survive(stack, mountpoint, rng, rounds(100))
        finally:
            subprocess.run(["umount", str(mountpoint)], check=True)


def complete(stack: Stack) -> bool:
    """Tap, holder and agent run, and each has the descriptor of the mounted file system."""
    with contextlib.suppress(grpc.RpcError, StopIteration):
        tap = stack.source.source("ward").tap
        agent = stack.source.process
        return (
            is_alive(tap.pid)
            and tap.fuse_attached
            and any(map(holds_fuse, holders(stack)))
            and agent is not None
            and holds_fuse(agent.pid)
        )
    return False


def holds_fuse(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return any(
            os.readlink(descriptor) == "/dev/fuse"
            for descriptor in Path(f"/proc/{pid}/fd").iterdir()
        )
    return False


def survive(stack: Stack, mountpoint: Path, rng: random.Random, count: int) -> None:
    database = sqlite3.connect(mountpoint / "ward.db", timeout=60)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE beat (id INTEGER PRIMARY KEY, value BLOB)")
    database.commit()
    committed = 0
    stop = threading.Event()
    failures: list[BaseException] = []
    killed: list[list[str]] = []

    def work() -> None:
        nonlocal committed
        try:
            # Closed also after a failure: an open file would keep the volume from being unmounted.
            with contextlib.closing(
                sqlite3.connect(mountpoint / "ward.db", timeout=60)
            ) as connection:
                while not stop.is_set():
                    row = committed + 1
                    connection.execute("INSERT INTO beat VALUES (?, randomblob(2000))", (row,))
                    connection.execute("DELETE FROM beat WHERE id <= ?", (row - ROWS,))
                    connection.commit()
                    committed = row
        except (sqlite3.Error, OSError) as error:
            failures.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        with stack.view("ward", writable=True):
            for number in range(count):
                time.sleep(rng.uniform(0.1, 0.6))
                # At most two: tap, holder and agent keep the kernel's descriptor for one another.
                eventually(lambda: complete(stack), 60, "every process is back")
                killed.append(rng.sample(VICTIMS, 2 if rng.random() < 0.3 else 1))
                kill(stack, *killed[-1], pause_s=rng.choice([0.0, rng.uniform(0.0, 0.5)]))
                assert not failures, f"kills {killed}: {failures}"
                if number % 5 == 4:
                    check_history(stack, committed)
    finally:
        stop.set()
        worker.join(120)
        database.close()
    assert not failures
    assert not worker.is_alive()
    check_history(stack, committed)


def check_history(stack: Stack, committed_before: int) -> None:
    """A writable view of the newest point mounts and holds the rows of a commit not before that."""
    settled(stack)
    directory = stack.directory / "look"
    directory.mkdir(exist_ok=True)
    with stack.view("ward", writable=True) as view:
        stack.target.stub.MountView(
            agent_pb2.MountViewRequest(view=view.id, directory=str(directory)), timeout=60
        )
        with contextlib.closing(sqlite3.connect(directory / "ward.db")) as found:
            assert found.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            last, count = found.execute("SELECT max(id), count(*) FROM beat").fetchone()
            assert last >= committed_before
            assert count == min(last, ROWS)
        stack.target.stub.UnmountView(
            agent_pb2.UnmountViewRequest(view=view.id, directory=str(directory)), timeout=60
        )
