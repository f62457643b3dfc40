"""Block devices by the kernel's own NBD client, over the unix socket of a tap or a view.

The kernel keeps the device and what was written to it while the server is away (its limit is
`HOLD_S`): requests wait, and go on over new connections that we hand it when the server is there
again. What a dead server had taken and not answered, the kernel sends once more; that it does when
the request is `timeout_s` old, not before (docs/adr/0011).

What the kernel holds outlives the agent. Whose a device is says its backend identifier.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from ebbtide.control import genetlink, nbd_connect
from ebbtide.control.genetlink import Family
from ebbtide.errors import EbbError, PrivilegeError, RefusedError, UnreachableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_CONNECT, _DISCONNECT, _RECONFIGURE, _LINK_DEAD = 1, 2, 3, 4
_INDEX, _SIZE, _BLOCK_SIZE, _TIMEOUT, _SERVER_FLAGS = 1, 2, 3, 4, 5
_SOCKETS, _DEAD_CONN_TIMEOUT, _BACKEND = 7, 8, 10
_SOCK_ITEM, _SOCK_FD = 1, 1

SYSFS: Final = Path("/sys/block")
#: The kernel has backend identifiers since then: without, a device could be taken for ours.
KERNEL_MIN: Final = (5, 14)
#: As the loop device: partition tables and xfs are laid out in this unit.
BLOCK_BYTES: Final = 512
#: How long requests wait for a server. FUSE has no limit; the kernel's NBD client wants one.
HOLD_S: Final = 7 * 24 * 3600
#: Pauses between attempts to hand over connections: the kernel notices a dead one a moment late.
RECONNECT_S: Final = (0.0, 0.05, 0.2, 0.5, 1.0, 2.0)
#: A device without users that is only just being let go of, by udev for instance.
SETTLE_S: Final = 3.0


class AbsentError(PrivilegeError):
    """This kernel, or this user, has no NBD client."""


def _family() -> Family:
    """Raises `AbsentError`. Blocks: may load the module."""
    hint = "use --method fuse-loop, or the NBD socket that 'ebb status' shows"
    if os.geteuid() != 0:
        raise AbsentError("block devices need root", hint="run the agent as root")
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    if found is None or (int(found[1]), int(found[2])) < KERNEL_MIN:
        raise AbsentError("the NBD client of this kernel is too old", code="unsupported", hint=hint)
    for attempt in range(2):
        try:
            return Family("nbd", 1)
        except OSError as error:
            path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
            modprobe = shutil.which("modprobe", path=path)
            if error.errno == errno.ENOENT and modprobe and attempt == 0:
                subprocess.run([modprobe, "nbd"], check=False, capture_output=True)
                continue
            break
    raise AbsentError("this kernel has no NBD client", code="unsupported", hint=hint)


def require() -> None:
    """Raises `AbsentError` unless the kernel's client can be used. Blocks."""
    _family().close()


def index_of(device: str) -> int:
    return int(device.removeprefix("/dev/nbd"))


def _sysfs(index: int) -> Path:
    return SYSFS / f"nbd{index}"


def _identifier(index: int) -> str:
    """Whose a connected device is; empty if it is not connected, or nobody said."""
    try:
        return (_sysfs(index) / "backend").read_text().strip()
    except OSError:
        return ""


def is_read_only(device: str) -> bool:
    """Whether a device takes no writes. Blocks."""
    try:
        return (SYSFS / Path(device).name / "ro").read_text().strip() == "1"
    except OSError:
        return False


def _fds(sockets: Iterable[socket.socket]) -> bytes:
    items = [genetlink.nested(_SOCK_ITEM, genetlink.u32(_SOCK_FD, one.fileno())) for one in sockets]
    return genetlink.nested(_SOCKETS, *items)


def _taken(channel: socket.socket) -> bool:
    """Whether the kernel took a connection over: it sets its timeout on those, and silently leaves
    the others (linux/drivers/block/nbd.c)."""
    value = channel.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16)
    return any(value)


def _age_s(pid: int) -> float:
    """How long ago a process was started; 0 if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    # The name, in parentheses, may hold anything; the start is the 20th field after it.
    ticks = int(stat.rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _may_be_device(link: str) -> bool:
    """Whether a descriptor's link can be a device node: below /dev, or in the root of a mount that
    is not ours to see, as the /dev of a container looks from outside."""
    return link.startswith("/dev/") or (link.startswith("/") and link.count("/") == 1)


def openers(device: str) -> list[int]:
    """Processes that have a block device open. Blocks.

    Nothing else is looked at: a file of a server that does not answer would make us wait.
    """
    number = Path(device).stat().st_rdev
    found = set()
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if _may_be_device(str(entry.readlink())) and entry.stat().st_rdev == number:
                found.add(int(entry.parts[2]))
    return sorted(found)


@dataclass(frozen=True, slots=True)
class Connected:
    """One device of ours."""

    index: int
    volume: str
    #: As many as when it was made, whatever is configured now.
    connections: int

    @property
    def path(self) -> str:
        return f"/dev/nbd{self.index}"


class KernelNbd:
    """The NBD devices of one tap or view."""

    def __init__(
        self,
        *,
        name: str,
        nbd_unix: Path,
        connections: int,
        timeout_s: int,
        serves: Callable[[], bool],
    ) -> None:
        self._name = name
        self._nbd_unix = nbd_unix
        self._connections = connections
        self._timeout_s = timeout_s
        self._serves = serves
        #: By index.
        self._devices: dict[int, Connected] = {}
        self._handing_over = asyncio.Lock()
        self._events: socket.socket | None = None
        self._listening = asyncio.Lock()
        self._work: set[asyncio.Task[None]] = set()
        #: Indices of devices that lost a connection since they were last looked after, and of those
        #: that are being looked after.
        self._dead: set[int] = set()
        self._mending: set[int] = set()
        self._log = structlog.get_logger(process=name)

    @property
    def connections(self) -> int:
        """How many clients of the server are the kernel's."""
        return sum(one.connections for one in self._devices.values())

    async def adopt(self, devices: dict[str, str], connections: dict[str, int]) -> list[Connected]:
        """Take over what is ours in the kernel, and return it; what it was said to be counts not.

        `devices` and `connections` are what was noted, by volume. What was not, was made by an
        attach that did not come to noting it; and earlier agents noted no connections.
        """
        held: dict[str, Connected] = {}
        for index, volume in await asyncio.to_thread(self._ours):
            count = connections.get(volume, self._connections)
            one = self._devices.get(index) or Connected(index, volume, count)
            if volume not in held or devices.get(volume) == one.path:
                held[volume] = one
        self._devices = {one.index: one for one in held.values()}
        if held:
            with contextlib.suppress(EbbError, OSError):
                await self._listen()
        return list(held.values())

    async def attach(self, volume: str, *, read_only: bool) -> Connected:
        """Connect a device. Raises `AbsentError` and other `EbbError`s."""
        await self._listen()
        made = await asyncio.to_thread(self._connect, volume, read_only)
        self._devices[made.index] = made
        return made

    async def detach(self, device: str) -> None:
        """Make durable and disconnect. Raises `RefusedError` while somebody has the device open."""
        await asyncio.to_thread(self._disconnect, device)
        self._devices.pop(index_of(device), None)
        if not self._devices:
            await self.abandon()

    async def abandon(self) -> None:
        """Leave everything to the kernel, and to the next agent."""
        async with self._listening:
            self._stop_listening()
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        # One that was cancelled before it began has not said so itself.
        self._mending.clear()

    async def serve_again(self, server_pid: int) -> None:
        """Hand new connections to every device that has lost some.

        Forgets devices that are not ours any more. Raises `UnreachableError` if a device could be
        offered none: its requests may wait until it is.
        """
        # Links that a predecessor's end cut are known to be dead once the server serves for a
        # while, and those that live take no offer: no use in waiting.
        age = await asyncio.to_thread(_age_s, server_pid)
        pauses = RECONNECT_S if age < sum(RECONNECT_S) else (0.0,)
        async with self._handing_over:
            tried = [self._reconnect(one, pauses) for one in self._devices.values()]
            for result in await asyncio.gather(*tried, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result

    def of(self, volume: str) -> Connected | None:
        """The device of a volume."""
        return next((one for one in self._devices.values() if one.volume == volume), None)

    def _ours(self) -> list[tuple[int, str]]:
        """Index and volume of every connected device that bears our name."""
        found = []
        for file in SYSFS.glob("nbd*/backend"):
            index = int(file.parent.name.removeprefix("nbd"))
            name, _, volume = _identifier(index).partition("/")
            # One that is just being let go of has it a moment longer than its pid.
            if name == f"ebbtide:{self._name}" and (file.parent / "pid").exists():
                found.append((index, volume))
        return sorted(found)

    def _identity(self, volume: str) -> str:
        return f"ebbtide:{self._name}/{volume}"

    def _connect(self, volume: str, read_only: bool) -> Connected:
        with _family() as family, contextlib.ExitStack() as ours:
            first = nbd_connect.connect(self._nbd_unix, volume)
            ours.callback(first.socket.close)
            sockets = [first.socket]
            if first.flags & nbd_connect.CAN_MULTI_CONN:
                for _ in range(self._connections - 1):
                    sockets.append(nbd_connect.connect(self._nbd_unix, volume).socket)
                    ours.callback(sockets[-1].close)
            flags = first.flags | (nbd_connect.READ_ONLY if read_only else 0)
            try:
                answer = family.request(
                    _CONNECT,
                    genetlink.u64(_SIZE, first.size // BLOCK_BYTES * BLOCK_BYTES),
                    genetlink.u64(_BLOCK_SIZE, BLOCK_BYTES),
                    genetlink.u64(_TIMEOUT, self._timeout_s),
                    genetlink.u64(_DEAD_CONN_TIMEOUT, HOLD_S),
                    genetlink.u64(_SERVER_FLAGS, flags),
                    genetlink.text(_BACKEND, self._identity(volume)),
                    _fds(sockets),
                )
            except OSError as error:
                raise PrivilegeError(
                    f"the kernel refuses an NBD device for {volume}: {error.strerror}",
                    code="unsupported",
                    hint="use --method fuse-loop",
                ) from None
        (index,) = struct.unpack("=I", answer[_INDEX])
        return Connected(index, volume, len(sockets))

    def _disconnect(self, device: str) -> None:
        index = index_of(device)
        if _identifier(index).partition("/")[0] != f"ebbtide:{self._name}":
            return
        self._claim(device)
        with _family() as family, contextlib.suppress(OSError):
            family.request(_DISCONNECT, genetlink.u32(_INDEX, index))
        deadline = time.monotonic() + SETTLE_S
        while (_sysfs(index) / "pid").exists():
            if time.monotonic() > deadline:
                raise RefusedError(f"{device} is still in use", code="in-use")
            time.sleep(0.02)

    def _claim(self, device: str) -> None:
        """Nobody else has it; what was written is durable. The kernel would cut off who has."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            try:
                descriptor = os.open(device, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
            except OSError as error:
                users = f"it is claimed: {error.strerror}"
            else:
                try:
                    others = [pid for pid in openers(device) if pid != os.getpid()]
                    if not others:
                        # Without a server this would wait for one; then nobody had it open since
                        # all was written, or it would be open still.
                        if self._serves():
                            os.fsync(descriptor)
                        return
                    users = f"open in process {', '.join(map(str, others))}"
                finally:
                    os.close(descriptor)
            if time.monotonic() > deadline:
                raise RefusedError(
                    f"{device} is in use: {users}",
                    code="in-use",
                    hint="end who uses it, then repeat",
                )
            time.sleep(0.05)

    async def _listen(self) -> None:
        async with self._listening:
            if self._events is None:
                with await asyncio.to_thread(_family) as family:
                    self._events = family.subscribe("nbd_mc_group")
                asyncio.get_running_loop().add_reader(self._events, self._told)

    def _stop_listening(self) -> None:
        if self._events is not None:
            asyncio.get_running_loop().remove_reader(self._events)
            self._events.close()
            self._events = None

    def _told(self) -> None:
        """The kernel gave a connection up: it gets another one, if the server lives."""
        dead = set()
        while self._events is not None:
            try:
                data = self._events.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError as error:
                # Events were lost: any connection can be among them.
                dead |= set(self._devices)
                if error.errno != errno.ENOBUFS:
                    # It would fail for ever, and at once.
                    self._log.error("no more events of the kernel's NBD client", error=str(error))
                    self._stop_listening()
                continue
            for command, parts in genetlink.event(data):
                if command == _LINK_DEAD and _INDEX in parts:
                    dead.add(struct.unpack("=I", parts[_INDEX])[0])
        for index in dead & set(self._devices):
            self._dead.add(index)
            if index not in self._mending:
                self._mending.add(index)
                task = asyncio.create_task(self._mend(index), name=f"mend nbd{index}")
                self._work.add(task)
                task.add_done_callback(self._work.discard)

    async def _mend(self, index: int) -> None:
        """Replace a device's dead connections, of which the event may be ahead.

        Gives up when the server goes: then we are called once it is back.
        """
        last = len(RECONNECT_S) - 1
        try:
            for attempt in itertools.count():
                await asyncio.sleep(RECONNECT_S[min(attempt, last)])
                self._dead.discard(index)
                async with self._handing_over:
                    one = self._devices.get(index)
                    if one is None or not self._serves():
                        return
                    try:
                        taken = await self._reconnect(one, (0.0,))
                    except UnreachableError:
                        continue
                if index not in self._dead and (taken or attempt >= last):
                    return
        finally:
            self._mending.discard(index)

    async def _reconnect(self, one: Connected, pauses: tuple[float, ...]) -> int:
        """Offer connections until all of the device's are new, or `pauses` are over.

        Returns how many it took. Raises `UnreachableError` if an offer failed.
        """
        missing = one.connections
        for pause in pauses:
            await asyncio.sleep(pause)
            try:
                missing -= await asyncio.to_thread(self._offer, one, missing)
            except (EbbError, OSError) as error:
                if await asyncio.to_thread(_identifier, one.index) != self._identity(one.volume):
                    self._log.warning("device is gone", device=one.path, volume=one.volume)
                    self._devices.pop(one.index, None)
                    break
                self._log.warning("no connection for the kernel", device=one.path, error=str(error))
                raise UnreachableError(
                    f"{one.path} of volume {one.volume} gets no new connection: {error}",
                    hint="what is written to it waits; it is tried again",
                ) from None
            if missing == 0:
                break
        taken = one.connections - missing
        if taken:
            self._log.info("kernel has new connections", device=one.path, connections=taken)
        return taken

    def _offer(self, one: Connected, count: int) -> int:
        """Offer connections to a device; returns how many it had use for."""
        with _family() as family, contextlib.ExitStack() as ours:
            sockets = []
            for _ in range(count):
                sockets.append(nbd_connect.connect(self._nbd_unix, one.volume).socket)
                ours.callback(sockets[-1].close)
            family.request(
                _RECONFIGURE,
                genetlink.u32(_INDEX, one.index),
                genetlink.text(_BACKEND, self._identity(one.volume)),
                _fds(sockets),
            )
            return sum(map(_taken, sockets))
