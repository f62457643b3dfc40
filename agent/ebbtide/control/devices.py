"""Block devices and mounts on the agent's host: by the kernel's NBD client, or by FUSE and loop.

For the latter a holder per tap or view keeps the descriptor of a FUSE mount whose files are the
volumes; loop devices lie on top. When a server is started again, it takes the descriptor from the
holder; when the holder is, it gets it back from the server, or from us, who keep a duplicate. A
loop device outlives the death of any two of the three. NBD devices are the kernel's: see
`kernel_nbd`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog

from ebbtide import _native
from ebbtide.control import kernel_nbd, loop_devices
from ebbtide.control.kernel_nbd import KernelNbd
from ebbtide.control.native import in_thread
from ebbtide.control.state import Attachment, MountRecord
from ebbtide.control.supervisor import ProcessState, Supervisor
from ebbtide.errors import (
    EbbError,
    NotFoundError,
    PrivilegeError,
    RefusedError,
    UnreachableError,
    UsageError,
)
from ebbtide.rpc import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from ebbtide.config import AttachSection
    from ebbtide.control.client import ControlClient

T = TypeVar("T")

MOUNTS: Final = Path("/proc/self/mounts")
#: A mount that replays a journal of some GiB takes its time.
MOUNT_S = 120.0

#: Options of a mount that must not write, by file system: a journal cannot be replayed then.
READ_ONLY_OPTIONS = {
    "ext2": "ro",
    "ext3": "ro,noload",
    "ext4": "ro,noload",
    "xfs": "ro,norecovery,nouuid",
    "btrfs": "ro,rescue=nologreplay",
}
#: Options of a writable mount: a copy of a mounted XFS has the UUID of the original.
WRITABLE_OPTIONS = {"xfs": "rw,nouuid"}


async def _to_the_end(step: Coroutine[Any, Any, T]) -> T:
    """Await a step to its end, also if the caller is cancelled: what it made must be noted."""
    task = asyncio.create_task(step)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise


class Holder(Supervisor):
    """The process that keeps the /dev/fuse descriptor of one mount."""

    module = "ebbtide.source.holder"

    def __init__(
        self,
        *,
        name: str,
        attachment: Attachment,
        log: Path,
        join: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(name=f"holder of {name}", socket=Path(attachment.holder_socket), log=log)
        self._attachment = attachment
        self._source = f"ebbtide:{name}"
        self._join = join

    async def launch_message(self) -> bytes:
        return pb.HolderLaunch(
            control_socket=str(self.socket),
            mountpoint=self._attachment.mountpoint,
            source=self._source,
        ).SerializeToString()

    async def adopted(self, client: ControlClient) -> int:
        response = await client.request(pb.Request(status=pb.StatusRequest()))
        return response.holder_status.pid

    async def serving(self, client: ControlClient) -> None:  # noqa: ARG002 (of the base class)
        await self._join()

    async def unmount(self) -> None:
        """Unmount and end the holder. Refused while a file of the mount is open."""
        if self.client is not None:
            await self.client.request(pb.Request(stop=pb.StopRequest(unmount=True)))
        await self.abandon()


class BlockDevices:
    """The block devices of one tap or view. All are made in one way at a time."""

    def __init__(
        self,
        *,
        name: str,
        server: Supervisor,
        nbd_unix: Path,
        run_dir: Path,
        log_dir: Path,
        config: AttachSection,
    ) -> None:
        self._name = name
        self._server = server
        self._run_dir = run_dir
        self._log_dir = log_dir
        self._config = config
        self._holder: Holder | None = None
        self._kept: _native.FuseDescriptor | None = None
        self._nbd = KernelNbd(
            name=name,
            nbd_unix=nbd_unix,
            connections=config.nbd_connections,
            timeout_s=config.nbd_timeout_s,
            serves=lambda: server.client is not None,
        )
        self.attachment: Attachment | None = None
        #: Attach and detach, one at a time. Joining must not wait for them: both read and write the
        #: devices, which waits for a server to join.
        self._changing = asyncio.Lock()
        self._joining = asyncio.Lock()
        self._log = structlog.get_logger(process=name)

    @property
    def clients(self) -> int:
        """How many NBD clients of the server are these devices."""
        return self._nbd.connections

    async def adopt(self, attachment: Attachment) -> None:
        """Take over what an earlier agent attached."""
        async with self._changing:
            if attachment.method == "nbd":
                await self._find_nbd(attachment)
                return
            await self._find_loops(attachment, add=True)
            # A mount without devices is taken over too: only so does it go.
            mounted = await asyncio.to_thread(_has_our_mount, attachment.mountpoint)
            if attachment.devices or mounted:
                self.attachment = attachment
                self._start_holder(attachment)

    async def _find_loops(self, attachment: Attachment, *, add: bool) -> list[str]:
        """Let an attachment name only loop devices that lie on its mount, and with `add` all of
        them. After a boot, and once a mount was lost and made anew, those noted are not ours.

        Returns the volumes that are new in it.
        """
        noted = dict(attachment.devices)
        found = await asyncio.to_thread(loop_devices.over, attachment.mountpoint)
        lost = {volume: device for volume, device in noted.items() if (volume, device) not in found}
        if lost:
            self._log.warning("loop devices are not ours any more", devices=lost)
        # What came or went meanwhile is not ours to say.
        devices = {v: d for v, d in attachment.devices.items() if lost.get(v) != d}
        new = {volume: device for volume, device in found if volume not in devices} if add else {}
        attachment.devices = {**devices, **new}
        return list(new)

    async def _find_nbd(self, attachment: Attachment) -> list[str]:
        """Let an attachment name what the kernel has of ours: after a boot that is nothing, and
        more than was noted if an attach was killed. Returns the volumes that are new in it.
        """
        before = set(attachment.devices)
        held = await self._nbd.adopt(attachment.devices, attachment.connections)
        attachment.devices = {one.volume: one.path for one in held}
        attachment.connections = {one.volume: one.connections for one in held}
        self.attachment = attachment if held else None
        return [volume for volume in attachment.devices if volume not in before]

    def _mount(self, *, read_only: bool) -> Attachment:
        return Attachment(
            mountpoint=str(self._run_dir / f"f-{self._name}"),
            holder_socket=str(self._run_dir / f"h-{self._name}.sock"),
            read_only=read_only,
        )

    async def _find(self, *, read_only: bool = False) -> list[str]:
        """Before a change: see what is there. Returns the volumes of devices that nobody noted."""
        mount = self._mount(read_only=read_only)
        if self.attachment is None and await asyncio.to_thread(_has_our_mount, mount.mountpoint):
            self.attachment = mount
            self._start_holder(mount)
        attachment = self.attachment or Attachment(method="nbd", read_only=read_only)
        if attachment.method != "nbd":
            if self._holder is not None:
                # It may make the mount anew.
                with contextlib.suppress(EbbError):
                    await self._holder.until_settled()
            return await self._find_loops(attachment, add=True)
        new = await self._find_nbd(attachment)
        if new and self._server.client is not None:
            # Their connections may be those of a server before this one.
            await self._nbd.serve_again(self._server.pid)
        return new

    async def join(self) -> None:
        """Let whichever process was started anew serve the devices again.

        By FUSE: holder, server and we ourselves all have the descriptor again. Raises `EbbError`
        while one of them is not there; harmless to repeat.
        """
        async with self._joining:
            await self._join()

    async def _join(self) -> None:
        holder, attachment = self._holder, self.attachment
        if attachment is not None and attachment.method == "nbd":
            try:
                await self._nbd.serve_again(self._server.pid)
            finally:
                self._forget_lost(attachment)
        if holder is None or attachment is None:
            return
        # The holder may have made the mount anew, and the devices were those of the lost one.
        await self._find_loops(attachment, add=False)
        if self._kept is not None:
            await in_thread(self._kept.give_to, attachment.holder_socket)
        if self._server.client is not None:
            await self._attach_fuse(self._server.client, attachment)
        kept = await in_thread(_native.FuseDescriptor.copy_from, attachment.holder_socket)
        if self._holder is holder:
            self._kept = kept

    def _forget_lost(self, attachment: Attachment) -> None:
        """Drop the NBD devices that the kernel has no more."""
        held = {volume for volume in attachment.devices if self._nbd.of(volume) is not None}
        if held != set(attachment.devices):
            attachment.devices = {v: attachment.devices[v] for v in held}
            attachment.connections = {v: attachment.connections[v] for v in held}
        if not held and self.attachment is attachment:
            self.attachment = None

    async def attach(
        self, volumes: list[str], *, read_only: bool, method: str = "auto"
    ) -> dict[str, str]:
        """Device path of each volume; those already attached stay. Raises `PrivilegeError`."""
        async with self._changing:
            found = await self._find(read_only=read_only)
            way = await self._choose(method)
            if self.attachment is not None and self.attachment.method != way:
                await self._drop_holder()
                self.attachment = None
            await self._replace_unfit(found, volumes, read_only=read_only)
            if way == "nbd":
                return await self._attach_nbd(volumes, read_only=read_only)
            return await self._attach_loop(volumes, read_only=read_only)

    async def _choose(self, method: str) -> str:
        """The way for the devices to come. Raises `RefusedError` if others came another way."""
        if self.attachment is not None and self.attachment.devices:
            if method not in {"auto", self.attachment.method}:
                raise RefusedError(
                    f"devices of this one are attached by {self.attachment.method}",
                    hint="detach them first",
                )
            return self.attachment.method
        wanted = self._config.method if method == "auto" else method
        if wanted == "auto":
            try:
                await asyncio.to_thread(kernel_nbd.require)
            except kernel_nbd.AbsentError:
                return "fuse-loop"
            return "nbd"
        return wanted

    async def _attach_nbd(self, volumes: list[str], *, read_only: bool) -> dict[str, str]:
        self._client()
        attachment = self.attachment or Attachment(method="nbd", read_only=read_only)
        read_only = read_only or attachment.read_only
        for volume in volumes:
            if volume not in attachment.devices:
                await _to_the_end(self._add_nbd(attachment, volume, read_only))
        return {volume: attachment.devices[volume] for volume in volumes}

    async def _add_nbd(self, attachment: Attachment, volume: str, read_only: bool) -> None:
        made = await self._nbd.attach(volume, read_only=read_only)
        attachment.devices = {**attachment.devices, volume: made.path}
        attachment.connections = {**attachment.connections, volume: made.connections}
        self.attachment = attachment

    async def _replace_unfit(
        self, found: list[str], volumes: list[str], *, read_only: bool
    ) -> None:
        """Take away what was found and is writable where it must not be, or the other way."""
        attachment = self.attachment
        for volume in set(found) & set(volumes):
            if attachment is not None:
                unfit = await asyncio.to_thread(
                    kernel_nbd.is_read_only, attachment.devices[volume]
                ) != (read_only or attachment.read_only)
                if unfit:
                    await _to_the_end(self._remove(attachment, volume))

    async def _attach_loop(self, volumes: list[str], *, read_only: bool) -> dict[str, str]:
        loop_devices.require()
        before = self.attachment
        attachment = before or self._mount(read_only=read_only)
        if not set(volumes) <= set(attachment.devices):
            holder = self._holder or self._start_holder(attachment)
            self.attachment = attachment
            try:
                await holder.until_settled()
                await self._attach_fuse(self._client(), attachment)
            except EbbError:
                if before is None:
                    self.attachment = None
                    await self._drop_holder()
                raise
        read_only = read_only or attachment.read_only
        for volume in volumes:
            if volume not in attachment.devices:
                await _to_the_end(self._add_loop(attachment, volume, read_only))
        return {volume: attachment.devices[volume] for volume in volumes}

    async def _add_loop(self, attachment: Attachment, volume: str, read_only: bool) -> None:
        path = str(Path(attachment.mountpoint) / volume)
        device = await in_thread(_native.loop_attach, path, read_only)
        attachment.devices = {**attachment.devices, volume: device}

    async def detach(self, volumes: list[str]) -> dict[str, str]:
        """Take devices away; the mount too if none is left. Raises `RefusedError` if in use."""
        async with self._changing:
            await self._find()
            return await self._detach(volumes)

    async def _detach(self, volumes: list[str]) -> dict[str, str]:
        attachment = self.attachment
        if attachment is None:
            return {}
        chosen = {v: attachment.devices[v] for v in volumes if v in attachment.devices}
        for volume, device in chosen.items():
            if user := await asyncio.to_thread(user_of, device):
                raise RefusedError(
                    f"{device} (volume {volume}) is in use: {user}",
                    code="in-use",
                    hint="unmount it or end who uses it, then repeat",
                )
        for volume in chosen:
            await _to_the_end(self._remove(attachment, volume))
        if not attachment.devices:
            # A server that joins just now would be told that its holder is gone.
            async with self._joining:
                if self._holder is not None:
                    await self._holder.unmount()
                    self._holder = self._kept = None
                self.attachment = None
        return chosen

    async def _remove(self, attachment: Attachment, volume: str) -> None:
        device = attachment.devices[volume]
        if attachment.method == "nbd":
            await self._nbd.detach(device)
        else:
            # "Not found": somebody else has detached it.
            with contextlib.suppress(NotFoundError):
                await in_thread(_native.loop_detach, device)
        attachment.devices = {v: d for v, d in attachment.devices.items() if v != volume}
        attachment.connections.pop(volume, None)

    async def abandon(self) -> None:
        """Leave everything for the next agent."""
        await self._nbd.abandon()
        if self._holder is not None:
            await self._holder.abandon()

    def holder_state(self) -> ProcessState | None:
        return self._holder.state if self._holder else None

    def _start_holder(self, attachment: Attachment) -> Holder:
        self._holder = Holder(
            name=self._name,
            attachment=attachment,
            log=self._log_dir / f"holder-{self._name}.log",
            join=self.join,
        )
        self._holder.begin()
        return self._holder

    async def _drop_holder(self) -> None:
        if self._holder is not None:
            with contextlib.suppress(EbbError):
                await self._holder.unmount()
            await self._holder.abandon()
            self._holder = self._kept = None

    def _client(self) -> ControlClient:
        if self._server.client is None:
            raise UnreachableError(f"the process of {self._server.name} does not run")
        return self._server.client

    async def _attach_fuse(self, client: ControlClient, attachment: Attachment) -> None:
        await client.request(
            pb.Request(attach_fuse=pb.AttachFuseRequest(holder_socket=attachment.holder_socket)),
            timeout_s=30.0,
        )


def _unescape(field: str) -> str:
    """A path of /proc/mounts: blanks and backslashes are octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _mounts() -> list[tuple[str, str, str]]:
    """Device, directory and type of every mount in this mount namespace."""
    lines = MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    fields = [line.split(" ") for line in lines]
    return [(_unescape(field[0]), _unescape(field[1]), field[2]) for field in fields]


def mounts_of(device: str) -> list[str]:
    """Directories where a device is mounted, in this mount namespace."""
    return [directory for found, directory, _ in _mounts() if found == device]


def _has_our_mount(mountpoint: str) -> bool:
    """Whether a mount that a holder made lies there, dead or alive. Blocks."""
    where = str(loop_devices.resolved(mountpoint))
    return any(
        directory == where and kind == loop_devices.FILE_SYSTEM for _, directory, kind in _mounts()
    )


def user_of(device: str) -> str:
    """Who uses a block device, in words; empty if nobody is seen."""
    if directories := mounts_of(device):
        return f"mounted at {', '.join(directories)}"
    name = Path(device).name
    holders = Path(f"/sys/block/{name}/holders")
    if holders.is_dir() and (names := sorted(entry.name for entry in holders.iterdir())):
        return f"held by {', '.join(names)}"
    swaps = Path("/proc/swaps").read_text(encoding="utf-8").splitlines()[1:]
    if any(line.split()[0] == device for line in swaps if line.strip()):
        return "used as swap"
    return ""


async def _run(*command: str, timeout_s: float) -> tuple[int, str, str]:
    def run() -> tuple[int, str, str]:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=timeout_s
        )
        return done.returncode, done.stdout.strip(), done.stderr.strip()

    if shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
        raise PrivilegeError(
            f"{command[0]} is not installed", code="unsupported", hint="install util-linux"
        )
    try:
        return await asyncio.to_thread(run)
    except subprocess.TimeoutExpired:
        raise UnreachableError(
            f"{command[0]} did not end within {timeout_s:.0f} s", code="timeout"
        ) from None


def _check_directory(where: Path) -> None:
    if not where.is_absolute():
        raise UsageError(f"{where} is not an absolute path")
    if not where.is_dir():
        raise NotFoundError(f"{where} is no directory", hint=f"mkdir {where}")
    if any(where.iterdir()):
        raise RefusedError(f"{where} is not empty", hint="mount into an empty directory")


async def mount(volume: str, device: str, directory: str, *, read_only: bool) -> MountRecord:
    """Mount a device with what a copy of a live file system needs."""
    await asyncio.to_thread(_check_directory, Path(directory))
    status, filesystem, _ = await _run(
        "blkid", "-p", "-s", "TYPE", "-o", "value", device, timeout_s=30.0
    )
    if status != 0 or not filesystem:
        raise RefusedError(
            f"volume {volume} holds no file system that is known at this point",
            code="no-filesystem",
            hint="choose a later point, or read the block device: 'ebb attach'",
        )
    chosen = READ_ONLY_OPTIONS if read_only else WRITABLE_OPTIONS
    options = chosen.get(filesystem, "ro" if read_only else "rw")
    status, _, errors = await _run(
        "mount", "-t", filesystem, "-o", options, device, directory, timeout_s=MOUNT_S
    )
    if status != 0:
        raise RefusedError(
            f"{filesystem} on volume {volume} cannot be mounted: {errors}",
            code="mount-failed",
            hint="a writable view lets the file system replay its journal: --writable",
        )
    return MountRecord(
        volume=volume,
        device=device,
        directory=directory,
        filesystem=filesystem,
        options=options,
    )


async def unmount(directory: str) -> None:
    """Unmount a directory; nothing to do if it is not mounted. Raises `RefusedError` if busy."""
    if not await asyncio.to_thread(os.path.ismount, directory):
        return
    status, _, errors = await _run("umount", directory, timeout_s=MOUNT_S)
    if status != 0:
        raise RefusedError(
            f"{directory} cannot be unmounted: {errors}",
            code="in-use",
            hint=f"'fuser -vm {directory}' shows who uses it",
        )
