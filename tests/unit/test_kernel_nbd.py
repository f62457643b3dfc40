"""Guards what the agent says to the kernel's NBD client, as far as it goes without one.

The client itself is the guest test's (`tests/integration/test_nbd_attach.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import socket
import struct
import subprocess
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ebbtide.config import AttachSection
from ebbtide.control import genetlink, kernel_nbd, nbd_connect
from ebbtide.control.devices import BlockDevices
from ebbtide.control.kernel_nbd import AbsentError, Connected, KernelNbd, openers
from ebbtide.control.state import Attachment
from ebbtide.errors import DamagedError, RefusedError, UnreachableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

# Netlink


def test_attributes_are_padded_and_read_back() -> None:
    data = genetlink.text(10, "abcd") + genetlink.u32(1, 7) + genetlink.u64(2, 1 << 40)
    assert len(data) % 4 == 0
    found = dict(genetlink.attributes(data))
    assert found == {10: b"abcd\0", 1: struct.pack("=I", 7), 2: struct.pack("=Q", 1 << 40)}
    ((kind, inside),) = genetlink.attributes(genetlink.nested(7, genetlink.u32(1, 5)))
    assert (kind, dict(genetlink.attributes(inside))) == (7, {1: struct.pack("=I", 5)})


@pytest.mark.parametrize("length", [0, 3, 200])
def test_a_malformed_length_ends_the_reading(length: int) -> None:
    good = genetlink.u32(1, 7)
    bad = struct.pack("=HH", length, 2) + bytes(4)
    assert [kind for kind, _ in genetlink.attributes(good + bad)] == [1]
    header = struct.pack("=IHHII", length % 16, 99, 0, 0, 0)
    assert list(genetlink.messages(header)) == []


def test_the_kernel_answers() -> None:
    with genetlink.Family("nlctrl", 2) as family:
        answer = family.request(3, genetlink.text(2, "nlctrl"))
        assert answer[2] == b"nlctrl\0"
        with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
            family.request(3, genetlink.text(2, "no-such-family"))
        family.subscribe("notify").close()
    with pytest.raises(FileNotFoundError):
        genetlink.Family("no-such-family", 1)


def test_events_name_their_device() -> None:
    body = struct.pack("=BBH", 4, 1, 0) + genetlink.u32(1, 3)
    data = struct.pack("=IHHII", 16 + len(body), 30, 0, 0, 0) + body
    ((command, parts),) = genetlink.event(data)
    assert (command, parts) == (4, {1: struct.pack("=I", 3)})


# The handshake

GREETING = struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3)


def reply(kind: int, data: bytes = b"", magic: int = 0x3E889045565A9) -> bytes:
    return struct.pack(">QIII", magic, 7, kind, len(data)) + data


EXPORT = reply(3, struct.pack(">HQH", 0, 1 << 30, 0x16D))


@pytest.fixture
def server(tmp_path: Path) -> Callable[[bytes], Path]:
    """Says `answer` to one client, whatever it asks, and closes."""

    def serve(answer: bytes) -> Path:
        path = tmp_path / "nbd.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(1)

        def talk() -> None:
            with listener, listener.accept()[0] as client:
                client.sendall(answer)
                client.shutdown(socket.SHUT_WR)
                while client.recv(4096):
                    pass

        threading.Thread(target=talk, daemon=True).start()
        return path

    return serve


def test_size_and_flags_of_an_export(server: Callable[[bytes], Path]) -> None:
    path = server(
        GREETING + reply(3, struct.pack(">HIII", 3, 1, 4096, 1 << 25)) + EXPORT + reply(1)
    )
    made = nbd_connect.connect(path, "disk")
    with made.socket:
        assert (made.size, made.flags) == (1 << 30, 0x16D)
        assert made.socket.getblocking()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", UnreachableError),
        (b"NBDMAGIC" + bytes(10), DamagedError),
        (GREETING, UnreachableError),
        (GREETING + reply(1 << 31 | 6), UnreachableError),
        (GREETING + reply(3, magic=1), DamagedError),
        (GREETING + struct.pack(">QIII", 0x3E889045565A9, 7, 3, 1 << 30), DamagedError),
        (GREETING + EXPORT[:-1], UnreachableError),
        (GREETING + reply(1), UnreachableError),
    ],
)
def test_a_bad_answer_is_an_error(
    server: Callable[[bytes], Path], answer: bytes, error: type[Exception]
) -> None:
    with pytest.raises(error):
        nbd_connect.connect(server(answer), "disk")


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError):
        nbd_connect.connect(tmp_path / "nobody", "disk")


# Which way


def block_devices(tmp_path: Path, method: Any) -> BlockDevices:
    return BlockDevices(
        name="ward",
        server=None,  # type: ignore[arg-type] (not asked)
        nbd_unix=tmp_path / "nbd.sock",
        run_dir=tmp_path,
        log_dir=tmp_path,
        config=AttachSection(method=method),
    )


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("configured", ["auto", "nbd", "fuse-loop"])
@pytest.mark.parametrize("asked", ["auto", "nbd", "fuse-loop"])
async def test_which_way_devices_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, configured: str, there: bool
) -> None:
    def require() -> None:
        if not there:
            raise AbsentError("no client")

    monkeypatch.setattr(kernel_nbd, "require", require)
    wanted = configured if asked == "auto" else asked
    expected = ("nbd" if there else "fuse-loop") if wanted == "auto" else wanted
    assert await block_devices(tmp_path, configured)._choose(asked) == expected


async def test_devices_of_one_tap_all_come_the_same_way(tmp_path: Path) -> None:
    found = block_devices(tmp_path, "auto")
    found.attachment = Attachment(method="nbd", devices={"disk": "/dev/nbd4095"})
    assert await found._choose("auto") == "nbd"
    with pytest.raises(RefusedError):
        await found._choose("fuse-loop")


async def test_a_device_that_is_not_ours_is_not_taken_over(tmp_path: Path) -> None:
    """As after a boot: the state names devices that the kernel does not have, or has for others."""
    found = block_devices(tmp_path, "auto")
    await found.adopt(Attachment(method="nbd", devices={"disk": "/dev/nbd4095"}))
    assert found.attachment is None
    assert found.clients == 0


def test_who_has_a_device_open() -> None:
    with open("/dev/null") as file:
        assert os.getpid() in openers("/dev/null")
        assert file.readable()


def test_only_what_can_be_a_device_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file on a mount that does not answer would make the search wait."""
    looked: list[str] = []
    stat = type(tmp_path).stat

    def watched(self: Path, **how: Any) -> os.stat_result:
        if self.parts[1:2] == ("proc",) and "fd" in self.parts:
            with contextlib.suppress(OSError):
                looked.append(os.readlink(self))
        return stat(self, **how)

    monkeypatch.setattr(type(tmp_path), "stat", watched)
    with (tmp_path / "file").open("w"), open("/dev/null"):
        assert os.getpid() in openers("/dev/null")
    assert "/dev/null" in looked
    assert not [link for link in looked if not kernel_nbd._may_be_device(link)]


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("/dev/nbd0", True),
        ("/nbd0", True),
        ("/srv/share/file", False),
        ("socket:[123]", False),
        ("anon_inode:[eventpoll]", False),
    ],
)
def test_what_can_be_a_device(link: str, expected: bool) -> None:
    assert kernel_nbd._may_be_device(link) is expected


# Events and hand-overs


class FakeFamily:
    """Stands for the kernel's NBD family: no device, and events that a test sends."""

    def __init__(self) -> None:
        self.pairs: list[tuple[socket.socket, socket.socket]] = []

    def __enter__(self) -> FakeFamily:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def subscribe(self, group: str) -> socket.socket:
        assert group == "nbd_mc_group"
        self.pairs.append(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.pairs[-1][0].setblocking(False)
        return self.pairs[-1][0]

    def close(self) -> None:
        for pair in self.pairs:
            for end in pair:
                end.close()


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFamily]:
    made = FakeFamily()
    monkeypatch.setattr(kernel_nbd, "_family", lambda: made)
    yield made
    made.close()


@pytest.fixture
async def nbd(tmp_path: Path, family: FakeFamily) -> AsyncIterator[KernelNbd]:
    assert family.pairs == []
    made = KernelNbd(
        name="ward",
        nbd_unix=tmp_path / "nbd.sock",
        connections=4,
        timeout_s=30,
        serves=lambda: True,
    )
    yield made
    await made.abandon()


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], Path]:
    """Makes NBD devices: index and backend identifier; an empty one takes a device away."""
    root = tmp_path / "block"
    root.mkdir()
    monkeypatch.setattr(kernel_nbd, "SYSFS", root)

    def make(index: int, identity: str) -> Path:
        device = root / f"nbd{index}"
        shutil.rmtree(device, ignore_errors=True)
        if identity:
            device.mkdir()
            (device / "backend").write_text(identity + "\n")
            (device / "ro").write_text("0\n")
            (device / "pid").write_text("77\n")
        return device

    return make


@pytest.mark.usefixtures("family")
async def test_a_device_keeps_the_number_of_its_connections(
    tmp_path: Path, sysfs: Callable[[int, str], Path]
) -> None:
    """Whatever is configured since; so many clients of the server are not somebody else's."""
    sysfs(0, "ebbtide:ward/one")
    sysfs(3, "ebbtide:ward/two")
    found = block_devices(tmp_path, "auto")
    attachment = Attachment(
        method="nbd",
        devices={"one": "/dev/nbd0", "two": "/dev/nbd3", "gone": "/dev/nbd9"},
        connections={"one": 1, "gone": 7},
    )
    read = Attachment.model_validate_json(attachment.model_dump_json())
    await found.adopt(read)
    # The second was made by an agent that noted none.
    assert found.clients == 1 + AttachSection().nbd_connections
    assert found.attachment is not None
    assert found.attachment.connections == {"one": 1, "two": AttachSection().nbd_connections}
    await found.abandon()


async def test_two_that_listen_at_once_have_one_reader(nbd: KernelNbd, family: FakeFamily) -> None:
    await asyncio.gather(nbd._listen(), nbd._listen())
    assert len(family.pairs) == 1


class Failing:
    """A socket whose every `recv` fails, counted."""

    def __init__(self, *errors: OSError) -> None:
        self.errors = list(errors)
        self.closed = False

    def recv(self, size: int) -> bytes:
        assert size > 0
        assert self.errors, "asked once more"
        raise self.errors.pop(0)

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        self.closed = True


async def test_events_that_were_lost_do_not_end_the_reading(nbd: KernelNbd) -> None:
    lost = OSError(errno.ENOBUFS, "lost")
    events = Failing(lost, lost, BlockingIOError())
    nbd._events = events  # type: ignore[assignment]
    nbd._told()
    assert nbd._events is events
    assert not events.errors
    nbd._events = None


async def test_a_socket_that_keeps_failing_is_given_up(
    nbd: KernelNbd, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = []
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "remove_reader", removed.append)
    events = Failing(OSError(errno.EBADF, "bad"))
    nbd._events = events  # type: ignore[assignment]
    nbd._told()
    assert nbd._events is None
    assert events.closed
    assert removed == [events]


class Offers:
    """Stands for the kernel and the server: says how many connections each offer is taken of."""

    def __init__(self, nbd: KernelNbd) -> None:
        self.answers: list[int | Exception] = []
        self.made: list[tuple[str, int]] = []
        nbd._offer = self.offer  # type: ignore[method-assign]

    def offer(self, one: Connected, count: int) -> int:
        self.made.append((one.path, count))
        answer = self.answers.pop(0) if self.answers else 0
        if isinstance(answer, Exception):
            raise answer
        return min(answer, count)


REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "refused")
PAUSES = (0.0, 0.01, 0.01)


@pytest.fixture
async def held(
    nbd: KernelNbd, sysfs: Callable[[int, str], Path], monkeypatch: pytest.MonkeyPatch
) -> Offers:
    """One device of four connections."""
    monkeypatch.setattr(kernel_nbd, "RECONNECT_S", PAUSES)
    monkeypatch.setattr(kernel_nbd, "_age_s", lambda _: 0.0)
    sysfs(5, "ebbtide:ward/disk")
    await nbd.adopt({"disk": "/dev/nbd5"}, {"disk": 4})
    return Offers(nbd)


async def test_a_hand_over_that_failed_is_told(nbd: KernelNbd, held: Offers) -> None:
    """Else the group is said to be protected while writes wait for days."""
    held.answers = [1, REFUSED]
    with pytest.raises(UnreachableError, match="/dev/nbd5"):
        await nbd.serve_again(1)
    held.answers = [3, 1]
    await nbd.serve_again(1)
    assert held.made == [("/dev/nbd5", 4), ("/dev/nbd5", 3), ("/dev/nbd5", 4), ("/dev/nbd5", 1)]


async def test_one_device_that_fails_does_not_keep_another_waiting(
    nbd: KernelNbd, sysfs: Callable[[int, str], Path], held: Offers
) -> None:
    sysfs(6, "ebbtide:ward/other")
    await nbd.adopt({"disk": "/dev/nbd5", "other": "/dev/nbd6"}, {})

    def offer(one: Connected, count: int) -> int:
        held.made.append((one.path, count))
        if one.index == 5:
            raise REFUSED
        return count

    nbd._offer = offer  # type: ignore[method-assign]
    with pytest.raises(UnreachableError):
        await nbd.serve_again(1)
    assert sorted(held.made) == [("/dev/nbd5", 4), ("/dev/nbd6", 4)]


@pytest.mark.parametrize("now", ["", "ebbtide:elsewhere/disk"])
async def test_a_device_that_is_ours_no_more_is_forgotten(
    nbd: KernelNbd, sysfs: Callable[[int, str], Path], held: Offers, now: str
) -> None:
    sysfs(5, now)
    held.answers = [OSError(errno.EINVAL, "no")]
    await nbd.serve_again(1)
    assert nbd.of("disk") is None
    assert nbd.connections == 0


async def test_a_forgotten_device_leaves_the_attachment(
    tmp_path: Path, family: FakeFamily, sysfs: Callable[[int, str], Path]
) -> None:
    sysfs(1, "ebbtide:ward/one")
    sysfs(2, "ebbtide:ward/two")
    found = block_devices(tmp_path, "auto")
    found._server = SimpleNamespace(pid=os.getpid(), client=None)  # type: ignore[assignment]
    attachment = Attachment(method="nbd", devices={"one": "/dev/nbd1", "two": "/dev/nbd2"})
    await found.adopt(attachment)
    assert len(family.pairs) == 1
    offers = Offers(found._nbd)
    for index, left in [(1, {"two": "/dev/nbd2"}), (2, {})]:
        sysfs(index, "")
        offers.answers = [OSError(errno.EINVAL, "no"), 9]
        await found.join()
        assert attachment.devices == left
        assert set(attachment.connections) == set(left)
    assert found.attachment is None


async def test_a_server_that_serves_for_long_is_offered_once(
    nbd: KernelNbd, held: Offers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when an agent was started again beside a tap that never went: all links are alive."""
    await nbd.serve_again(1)
    assert len(held.made) == len(PAUSES)
    held.made.clear()
    monkeypatch.setattr(kernel_nbd, "_age_s", lambda _: 60.0)
    await nbd.serve_again(1)
    assert len(held.made) == 1


def test_the_age_of_a_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        assert 0.0 <= kernel_nbd._age_s(child.pid) < 30.0
        child.kill()
    assert kernel_nbd._age_s(child.pid) == 0.0
    assert kernel_nbd._age_s(1) > kernel_nbd._age_s(os.getpid()) - 0.1


async def until_mended(nbd: KernelNbd) -> None:
    async with asyncio.timeout(10.0):
        while nbd._work:
            await asyncio.gather(*nbd._work)


def link_dead(index: int) -> bytes:
    body = struct.pack("=BBH", 4, 1, 0) + genetlink.u32(1, index)
    return struct.pack("=IHHII", 16 + len(body), 30, 0, 0, 0) + body


async def test_a_dead_link_is_replaced_until_it_succeeds(
    nbd: KernelNbd, held: Offers, family: FakeFamily
) -> None:
    """Also if the server refuses longer than there are pauses, and the kernel takes none at first:
    nobody else would try again."""
    held.answers = [REFUSED] * 5 + [1]
    for _ in range(4):
        family.pairs[0][1].send(link_dead(5))
    nbd._told()
    assert len(nbd._work) == 1
    await until_mended(nbd)
    assert held.made == [("/dev/nbd5", 4)] * 6
    assert nbd.of("disk") is not None


async def test_a_link_that_dies_during_the_mending_is_replaced_too(
    nbd: KernelNbd, held: Offers, family: FakeFamily
) -> None:
    offer = nbd._offer
    loop = asyncio.get_running_loop()

    def another_dies(one: Connected, count: int) -> int:
        if not held.made:
            family.pairs[0][1].send(link_dead(5))
            done = threading.Event()
            loop.call_soon_threadsafe(nbd._told)
            loop.call_soon_threadsafe(done.set)
            assert done.wait(10.0)
        return offer(one, count)

    nbd._offer = another_dies  # type: ignore[method-assign]
    held.answers = [1, 1]
    family.pairs[0][1].send(link_dead(5))
    nbd._told()
    await until_mended(nbd)
    assert len(held.made) == 2


async def test_mending_ends_when_the_server_goes(nbd: KernelNbd, held: Offers) -> None:
    held.answers = [REFUSED] * 1000
    nbd._serves = lambda: len(held.made) < 7
    nbd._mending.add(5)
    await nbd._mend(5)
    assert len(held.made) == 7
    assert not nbd._mending


# Devices that nobody noted, and changes one at a time


class Kernel:
    """Stands for kernel and server where devices are made and taken away."""

    def __init__(self, found: BlockDevices, sysfs: Callable[[int, str], Path]) -> None:
        self.sysfs = sysfs
        self.connected = 0
        self.slow = threading.Event()
        self.slow.set()
        self.entered = threading.Event()
        self.offers = Offers(found._nbd)
        server: Any = SimpleNamespace(pid=os.getpid(), client=SimpleNamespace(), name="tap")
        found._server = server
        found._nbd._connect = self.connect  # type: ignore[method-assign]
        found._nbd._disconnect = self.disconnect  # type: ignore[method-assign]

    def connect(self, volume: str, read_only: bool) -> Connected:
        self.entered.set()
        assert self.slow.wait(10.0)
        index, self.connected = self.connected, self.connected + 1
        device = self.sysfs(index, f"ebbtide:ward/{volume}")
        (device / "ro").write_text(f"{int(read_only)}\n")
        return Connected(index, volume, 4)

    def disconnect(self, device: str) -> None:
        self.sysfs(kernel_nbd.index_of(device), "")


@pytest.fixture
async def ward(
    tmp_path: Path, family: FakeFamily, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[BlockDevices]:
    assert family.pairs == []
    monkeypatch.setattr(kernel_nbd, "require", lambda: None)
    monkeypatch.setattr(kernel_nbd, "_age_s", lambda _: 60.0)
    made = block_devices(tmp_path, "nbd")
    yield made
    await made.abandon()


@pytest.fixture
async def kernel(ward: BlockDevices, sysfs: Callable[[int, str], Path]) -> Kernel:
    return Kernel(ward, sysfs)


async def test_two_that_attach_at_once_get_one_device(ward: BlockDevices, kernel: Kernel) -> None:
    both = await asyncio.gather(*(ward.attach(["disk"], read_only=False) for _ in range(2)))
    assert both == [{"disk": "/dev/nbd0"}] * 2
    assert kernel.connected == 1
    assert ward.clients == 4


async def test_an_attach_that_was_cancelled_leaves_no_device_unnoted(
    ward: BlockDevices, kernel: Kernel
) -> None:
    kernel.slow.clear()
    task = asyncio.create_task(ward.attach(["disk"], read_only=False))
    await asyncio.to_thread(kernel.entered.wait, 10.0)
    task.cancel()
    await asyncio.sleep(0.01)
    kernel.slow.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ward.attachment is not None
    assert ward.attachment.devices == {"disk": "/dev/nbd0"}
    assert ward.clients == 4


async def test_a_device_that_nobody_noted_is_taken_over(
    ward: BlockDevices, kernel: Kernel, sysfs: Callable[[int, str], Path]
) -> None:
    """As when an agent was killed after it had connected. A second one would write beside it."""
    sysfs(8, "ebbtide:ward/disk")
    sysfs(9, "ebbtide:wardrobe/disk")
    assert await ward.attach(["disk"], read_only=False) == {"disk": "/dev/nbd8"}
    assert kernel.connected == 0
    # It may be without a link since then.
    assert kernel.offers.made == [("/dev/nbd8", 4)]
    assert await ward.detach(["disk"]) == {"disk": "/dev/nbd8"}
    assert ward.attachment is None


async def test_a_device_that_nobody_noted_is_detached(
    ward: BlockDevices, kernel: Kernel, sysfs: Callable[[int, str], Path]
) -> None:
    assert kernel.connected == 0
    assert await ward.detach(["disk"]) == {}
    where = sysfs(8, "ebbtide:ward/disk")
    assert await ward.detach(["disk"]) == {"disk": "/dev/nbd8"}
    assert not where.exists()


async def test_adopting_finds_what_was_not_noted_and_prefers_what_was(
    ward: BlockDevices, sysfs: Callable[[int, str], Path]
) -> None:
    for index, volume in [(1, "disk"), (2, "disk"), (3, "log")]:
        sysfs(index, f"ebbtide:ward/{volume}")
    (sysfs(4, "ebbtide:ward/ending") / "pid").unlink()
    await ward.adopt(Attachment(method="nbd", devices={"disk": "/dev/nbd2"}))
    assert ward.attachment is not None
    assert ward.attachment.devices == {"disk": "/dev/nbd2", "log": "/dev/nbd3"}


async def test_a_writable_device_is_not_given_to_who_asks_for_a_read_only_one(
    ward: BlockDevices, kernel: Kernel, sysfs: Callable[[int, str], Path]
) -> None:
    where = sysfs(8, "ebbtide:ward/disk")
    assert await ward.attach(["disk"], read_only=True) == {"disk": "/dev/nbd0"}
    assert kernel.connected == 1
    assert kernel_nbd.is_read_only("/dev/nbd0")
    assert not where.exists()


async def test_serving_again_does_not_wait_for_an_attach(
    ward: BlockDevices, kernel: Kernel
) -> None:
    """What attach and detach read and write may wait for just that."""
    kernel.slow.clear()
    task = asyncio.create_task(ward.attach(["disk"], read_only=False))
    await asyncio.to_thread(kernel.entered.wait, 10.0)
    try:
        async with asyncio.timeout(5.0):
            await ward.join()
    finally:
        kernel.slow.set()
        await task
