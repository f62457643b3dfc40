"""The link between source and target is cut under load and mends: nothing is lost or doubled.

Guards S004-6.2c-1 (break the link, resume from the break) and invariant 3 (replication never stops
production). The link is a relay that ends connections, also in the middle of a message; one test
has two hosts as network namespaces whose link goes down without a word.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ebbtide.rpc import agent_pb2
from tests.support.nbd import Client
from tests.support.relay import Relay, relay
from tests.support.stack import Host, Stack, eventually, free_port, is_alive

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.needs("root"),
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("leak_check"),
]
SIZE = 32 << 20
NAMESPACES = Path("/run/netns")


@pytest.fixture
def linked(tmp_path: Path) -> Iterator[tuple[Stack, Relay]]:
    """A stack whose source knows the target only by the relay's address."""
    source = Host("source", tmp_path / "source", free_port())
    target = Host("target", tmp_path / "target", free_port())
    stack = Stack(tmp_path, source, target)
    source.lay_out(extra="[ship]\nretry_max_s = 0.5\ndead_after_s = 2")
    target.lay_out()
    with relay(target.port) as link:
        source.pin(target)
        source.config.write_text(
            source.config.read_text().replace(f"127.0.0.1:{target.port}", f"127.0.0.1:{link.port}")
        )
        target.pin(source)
        try:
            target.start()
            source.start()
            yield stack, link
        finally:
            link.mend()
            stack.end()


class Load(threading.Thread):
    """Writes until told to stop; keeps how long the slowest write took."""

    def __init__(self, uri: str, rng: random.Random) -> None:
        super().__init__()
        self._uri, self._rng = uri, rng
        self._ending = threading.Event()
        self.writes = 0
        self.slowest_s = 0.0

    def run(self) -> None:
        with Client(self._uri) as client:
            while not self._ending.is_set():
                data = self._rng.randbytes(64 << 10)
                began = time.monotonic()
                client.pwrite(data, self._rng.randrange(SIZE // (64 << 10)) * (64 << 10))
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                self.writes += 1
                # About 6 MB/s: enough that a cut meets a message on its way.
                time.sleep(0.01)
            client.flush()

    def end(self) -> None:
        self._ending.set()
        self.join(30)


def whole(stack: Stack, writes: int) -> None:
    """The target has every write once, in one unbroken numbering, and the same content."""
    stack.wait_durable("ward")
    with (
        Client(stack.uri("ward", "disk")) as source,
        stack.view("ward") as view,
        Client(view.volumes[0].nbd_uri) as newest,
    ):
        assert source.read_all() == newest.read_all()
    found = stack.target.stub.Points(
        agent_pb2.PointsRequest(group="ward", writes=True, limit=100_000)
    )
    assert sum(record.kind == "write" for record in found.records) == writes
    seqs = [record.seq for record in found.records]
    assert seqs == sorted(set(seqs))
    assert not found.gaps


def test_link_is_cut_and_mends(linked: tuple[Stack, Relay], rng: random.Random) -> None:
    stack, link = linked
    stack.protect("ward", {"disk": SIZE})
    load = Load(stack.uri("ward", "disk"), rng)
    load.start()
    try:
        for seconds in (0.1, 3.0):
            eventually(lambda: stack.source.source("ward").shipping.lag_us < 1_000_000)
            link.cut()
            time.sleep(seconds)
            link.mend()
        for length in (100, 5_000, 70_001, 300_003):
            eventually(lambda: stack.source.source("ward").shipping.connected_since_us > 0)
            link.cut_after(length)
            eventually(lambda: link.is_cut, what="the cut in the middle of a message")
            link.mend()
    finally:
        load.end()
    assert load.slowest_s < 2
    whole(stack, load.writes)
    assert stack.source.source("ward").shipping.connects >= 4


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL])
def test_source_restarts_while_the_link_is_cut(
    linked: tuple[Stack, Relay], rng: random.Random, sig: signal.Signals
) -> None:
    stack, link = linked
    stack.protect("ward", {"disk": SIZE})
    load = Load(stack.uri("ward", "disk"), rng)
    load.start()
    try:
        time.sleep(0.5)
        link.cut_after(40_000)
        eventually(lambda: link.is_cut, what="the cut")
        stack.source.kill(sig)
        time.sleep(0.5)
        stack.source.start()
        said = stack.source.ebb("status", "ward").stdout
        assert "no link" in said
        link.mend()
        eventually(
            lambda: stack.source.source("ward").shipping.state == agent_pb2.Shipping.STATE_STREAMING
        )
    finally:
        load.end()
    whole(stack, load.writes)


def test_spoilt_spool_is_found_and_history_goes_on_behind_it(
    linked: tuple[Stack, Relay], rng: random.Random
) -> None:
    """A bit of a frame flips before it is shipped: the target refuses it, the source finds it."""
    stack, link = linked
    stack.protect("ward", {"disk": SIZE})
    with Client(stack.uri("ward", "disk")) as client:
        client.pwrite(rng.randbytes(SIZE), 0)
        client.flush()
        before = client.read_all()
        kept = stack.wait_durable("ward")
        link.cut()
        for at in range(0, SIZE, 1 << 20):
            client.pwrite(rng.randbytes(64 << 10), at)
        client.flush()
        spool = Path(stack.source.source("ward").spool_dir)
        segment = max(spool.glob("*.open"), key=lambda path: path.stat().st_mtime_ns)
        with segment.open("r+b") as file:
            file.seek(-100_000, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))
        link.mend()

        def told() -> bool:
            notices = stack.source.source("ward").notices
            return any(segment.name in notice for notice in notices)

        eventually(told, what="a notice names the segment")
        eventually(lambda: stack.is_copied("ward"), 60, "all volumes are copied again")
        stack.wait_durable("ward")
        with stack.view("ward") as view, Client(view.volumes[0].nbd_uri) as newest:
            assert newest.read_all() == client.read_all()
    with stack.view("ward", at_seq=kept) as view, Client(view.volumes[0].nbd_uri) as old:
        assert old.read_all() == before


def stop_source(stack: Stack, *, clean: bool) -> None:
    """End agent and tap, as a machine that is shut down or loses power.

    The agent goes first, or it would start the tap again.
    """
    tap = stack.source.source("ward").tap.pid
    stack.source.kill(signal.SIGTERM if clean else signal.SIGKILL)
    os.kill(tap, signal.SIGTERM if clean else signal.SIGKILL)
    eventually(lambda: not is_alive(tap), what="the tap ends")


@pytest.mark.parametrize("clean", [True, False])
def test_source_that_is_rolled_back_is_noticed(
    linked: tuple[Stack, Relay], rng: random.Random, clean: bool
) -> None:
    """Volume, spool and state go back together: the source itself cannot see it.

    After a clean stop the numbers that the target holds are given again; after a power cut new ones
    lie above, and only what the target holds beyond the spool tells.
    """
    stack, link = linked
    stack.protect("ward", {"disk": SIZE})

    def write(count: int) -> None:
        with Client(stack.uri("ward", "disk")) as client:
            for _ in range(count):
                client.pwrite(rng.randbytes(8192), rng.randrange(SIZE // 8192) * 8192)
            client.flush()

    def content() -> tuple[int, bytes]:
        seq = stack.wait_durable("ward")
        with Client(stack.uri("ward", "disk")) as client:
            return seq, client.read_all()

    write(40)
    before = content()
    stop_source(stack, clean=clean)
    kept, places = stack.directory / "snapshot", ["source", "ward-disk.img"]
    kept.mkdir()
    for place in places:
        subprocess.run(["cp", "-a", stack.directory / place, kept / place], check=True)
    stack.source.start()
    eventually(lambda: stack.is_copied("ward"), what="the tap serves")
    write(20)
    ahead = content()

    link.cut()
    stop_source(stack, clean=clean)
    for place in places:
        subprocess.run(["rm", "-rf", stack.directory / place], check=True)
        subprocess.run(["mv", kept / place, stack.directory / place], check=True)
    stack.source.start()
    eventually(lambda: stack.is_copied("ward"), what="the tap serves")
    write(60)
    overlaps = stack.source.source("ward").tap.last_seq > ahead[0]
    assert overlaps
    link.mend()

    def noticed() -> bool:
        return any("rolled back" in text for text in stack.source.source("ward").notices)

    eventually(noticed, what="the notice")
    eventually(lambda: stack.is_copied("ward"), what="the copy ends")
    newest = content()
    for seq, wanted in (before, ahead, newest):
        with stack.view("ward", at_seq=seq) as view, Client(view.volumes[0].nbd_uri) as shown:
            assert shown.read_all() == wanted
    assert newest[1] not in (before[1], ahead[1])


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def is_mounted() -> bool:
    # A bind mount of the same file system: `Path.is_mount` does not see it.
    return f" {NAMESPACES} " in Path("/proc/self/mounts").read_text()


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a veth pair, 10.77.0.1 and 10.77.0.2."""
    names = (f"ebb-a-{os.getpid()}", f"ebb-b-{os.getpid()}")
    was_mounted = is_mounted()
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "ebb-a", "netns", names[0], "type", "veth", "peer", "ebb-b",
           "netns", names[1])  # fmt: skip
        for name, device, address in zip(
            names, ("ebb-a", "ebb-b"), ("10.77.0.1/24", "10.77.0.2/24"), strict=True
        ):
            ip("-n", name, "address", "add", address, "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        # The first namespace of a machine makes this a mount.
        if not was_mounted and is_mounted():
            subprocess.run(["umount", str(NAMESPACES)], check=False)


@pytest.mark.needs("ip")
def test_two_hosts_whose_link_goes_down(tmp_path: Path, rng: random.Random) -> None:
    """Nobody is told: both sides find out by their own keepalive, and find each other again."""
    with two_hosts() as (a, b):
        source = Host("source", tmp_path / "source", 7401, ["ip", "netns", "exec", a])
        target = Host("target", tmp_path / "target", 7401, ["ip", "netns", "exec", b])
        stack = Stack(tmp_path, source, target)
        source.lay_out(extra="[ship]\nretry_max_s = 0.5\ndead_after_s = 2")
        target.lay_out()
        source.pin(target)
        target.pin(source)
        for host, own, other in ((source, "10.77.0.1", "10.77.0.2"),
                                 (target, "10.77.0.2", "10.77.0.1")):  # fmt: skip
            text = host.config.read_text()
            text = text.replace('listen = "127.0.0.1', f'listen = "{own}')
            host.config.write_text(text.replace('address = "127.0.0.1', f'address = "{other}'))
        try:
            target.start()
            source.start()
            stack.protect("ward", {"disk": SIZE})
            load = Load(stack.uri("ward", "disk"), rng)
            load.start()
            try:
                time.sleep(0.5)
                ip("-n", a, "link", "set", "ebb-a", "down")

                def noticed() -> bool:
                    shipping = source.source("ward").shipping
                    return shipping.state == agent_pb2.Shipping.STATE_DISCONNECTED

                eventually(noticed, 30, "the source notices")
                ip("-n", a, "link", "set", "ebb-a", "up")
            finally:
                load.end()
            whole(stack, load.writes)
            assert load.slowest_s < 2
        finally:
            stack.end()
