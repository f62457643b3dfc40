"""Guards that loop devices are trusted only where they lie on our mount: after a boot, or once a
mount was lost, a number in the state is anybody's device."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ebbtide import _native
from ebbtide.config import AttachSection
from ebbtide.control import devices, kernel_nbd, loop_devices
from ebbtide.control.devices import BlockDevices
from ebbtide.control.state import Attachment
from ebbtide.errors import RefusedError, UnreachableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Host:
    """Stands for the kernel's loop devices and mount table, and for holder and server."""

    def __init__(self, directory: Path) -> None:
        self.run_dir = directory / "run"
        self.run_dir.mkdir()
        self.block = directory / "block"
        self.block.mkdir()
        self.mounts = directory / "mounts"
        self.mounts.write_text("/dev/sda1 / ext4 rw 0 0\n")
        self.mountpoint = self.run_dir / "f-ward"
        self.detached: list[str] = []
        self.holders: list[FakeHolder] = []
        #: What a holder that is started does first.
        self.at_start: Callable[[], object] = lambda: None
        self.requests: list[str] = []
        self.found = self.agent()

    def agent(self) -> BlockDevices:
        """What an agent that was started knows of the devices."""
        server: Any = SimpleNamespace(client=self, pid=os.getpid(), name="tap")
        self.found = BlockDevices(
            name="ward",
            server=server,
            nbd_unix=self.run_dir / "nbd.sock",
            run_dir=self.run_dir,
            log_dir=self.run_dir,
            config=AttachSection(method="fuse-loop"),
        )
        return self.found

    async def request(self, message: Any, *, timeout_s: float) -> None:
        assert timeout_s > 0
        self.requests.append(message.attach_fuse.holder_socket)

    def mount(self, directory: Path | None = None) -> None:
        line = f"ebbtide:ward {directory or self.mountpoint} fuse.ebbtide rw 0 0\n"
        self.mounts.write_text(self.mounts.read_text() + line)

    def unmount(self) -> None:
        self.mounts.write_text("/dev/sda1 / ext4 rw 0 0\n")

    def loop(self, number: int, backing: str) -> Path:
        device = self.block / f"loop{number}"
        (device / "loop").mkdir(parents=True, exist_ok=True)
        (device / "ro").write_text("0\n")
        (device / "loop/backing_file").write_text(backing + "\n")
        return device / "loop/backing_file"

    def loop_attach(self, path: str, read_only: bool) -> str:
        assert not read_only
        number = next(n for n in range(100) if not (self.block / f"loop{n}").exists())
        self.loop(number, path)
        return f"/dev/loop{number}"

    def loop_detach(self, device: str) -> None:
        file = self.block / device.removeprefix("/dev/") / "loop/backing_file"
        if not file.exists():
            raise _native.NativeError("not-found", f"{device} is not attached", "", 4)
        self.detached.append(device)
        file.unlink()

    def attachment(self, **attached: str) -> Attachment:
        return Attachment(
            mountpoint=str(self.mountpoint),
            holder_socket=str(self.run_dir / "h-ward.sock"),
            devices=attached,
        )


class FakeHolder:
    """Mounts if nothing is mounted, and joins."""

    host: Host

    def __init__(self, **given: Any) -> None:
        self.join = given["join"]
        self.settled = asyncio.Event()
        self.failure: RefusedError | None = None
        self.ended = False
        self.host.holders.append(self)

    def begin(self) -> None:
        self.task = asyncio.create_task(self.run())

    async def run(self) -> None:
        self.host.at_start()
        if "fuse.ebbtide" not in self.host.mounts.read_text():
            self.host.mount()
        await self.join()
        self.settled.set()

    async def until_settled(self) -> None:
        await self.settled.wait()
        if self.failure:
            raise self.failure

    async def unmount(self) -> None:
        await self.until_settled()
        self.host.unmount()
        await self.abandon()

    async def abandon(self) -> None:
        self.ended = True
        await asyncio.gather(self.task)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    monkeypatch.setattr(FakeHolder, "host", made, raising=False)
    monkeypatch.setattr(devices, "Holder", FakeHolder)
    monkeypatch.setattr(devices, "MOUNTS", made.mounts)
    monkeypatch.setattr(devices, "user_of", lambda _: "")
    monkeypatch.setattr(kernel_nbd, "SYSFS", made.block)
    monkeypatch.setattr(loop_devices, "require", lambda: None)
    monkeypatch.setattr(_native, "loop_attach", made.loop_attach)
    monkeypatch.setattr(_native, "loop_detach", made.loop_detach)
    keeper = SimpleNamespace(copy_from=lambda _: SimpleNamespace(give_to=lambda _: None))
    monkeypatch.setattr(_native, "FuseDescriptor", keeper)
    return made


async def test_a_device_is_attached_and_detached(host: Host) -> None:
    assert await host.found.attach(["disk"], read_only=False) == {"disk": "/dev/loop0"}
    assert await host.found.attach(["disk", "log"], read_only=False) == {
        "disk": "/dev/loop0",
        "log": "/dev/loop1",
    }
    assert len(host.holders) == 1
    assert await host.found.detach(["disk"]) == {"disk": "/dev/loop0"}
    assert not host.holders[0].ended
    assert await host.found.detach(["disk", "log"]) == {"log": "/dev/loop1"}
    assert host.holders[0].ended
    assert host.found.attachment is None


async def test_after_a_boot_nothing_is_attached(host: Host) -> None:
    """The state names devices; one is nobody's, another somebody else's by now."""
    theirs = host.loop(1, "/srv/theirs.img")
    attachment = host.attachment(disk="/dev/loop0", log="/dev/loop1")
    await host.found.adopt(attachment)
    assert host.found.attachment is None
    assert host.holders == []
    # Who still has the record sees it too.
    assert attachment.devices == {}
    assert await host.found.detach(["disk", "log"]) == {}
    assert host.detached == []
    assert theirs.exists()
    assert await host.found.attach(["log"], read_only=False) == {"log": "/dev/loop0"}


async def test_what_is_ours_is_adopted(host: Host) -> None:
    """With more than was noted if an agent was killed before; looked up in vain or not."""
    host.mount()
    host.loop(3, str(host.mountpoint / "disk"))
    host.loop(4, f"{host.mountpoint / 'log'} (deleted)")
    host.loop(5, str(host.mountpoint / "late"))
    host.loop(6, str(host.run_dir / "f-wardrobe" / "other"))
    await host.found.adopt(host.attachment(disk="/dev/loop3", log="/dev/loop4", gone="/dev/loop5"))
    assert host.found.attachment is not None
    expected = {"disk": "/dev/loop3", "log": "/dev/loop4", "late": "/dev/loop5"}
    assert host.found.attachment.devices == expected
    assert await host.found.attach(["disk"], read_only=False) == {"disk": "/dev/loop3"}


async def test_a_state_directory_behind_a_link(host: Host, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(host.run_dir)
    host.loop(3, str(host.mountpoint / "disk"))
    assert loop_devices.over(str(tmp_path / "link" / "f-ward")) == [("disk", "/dev/loop3")]
    host.mount()
    assert devices._has_our_mount(str(tmp_path / "link" / "f-ward"))


async def test_a_mount_that_was_lost_is_attached_anew(host: Host) -> None:
    """Tap, holder and agent were killed at once. Until the holder has taken the dead mount out of
    the tree, its devices look like ours."""
    host.mount()
    dead = host.loop(0, str(host.mountpoint / "disk"))
    host.at_start = lambda: dead.write_text("/disk\n")
    await host.found.adopt(host.attachment(disk="/dev/loop0"))
    assert await host.found.attach(["disk"], read_only=False) == {"disk": "/dev/loop1"}
    assert await host.found.detach(["disk"]) == {"disk": "/dev/loop1"}
    assert host.detached == ["/dev/loop1"]
    assert host.found.attachment is None
    assert host.holders[0].ended


async def test_a_mount_that_was_lost_is_detached(host: Host) -> None:
    host.mount()
    dead = host.loop(0, str(host.mountpoint / "disk"))
    host.at_start = lambda: dead.write_text("/disk\n")
    await host.found.adopt(host.attachment(disk="/dev/loop0"))
    assert await host.found.detach(["disk"]) == {}
    assert host.detached == []
    assert host.found.attachment is None
    assert host.holders[0].ended
    assert "fuse.ebbtide" not in host.mounts.read_text()


async def test_a_mount_that_is_lost_under_an_agent_leaves_the_attachment(host: Host) -> None:
    await host.found.attach(["disk", "log"], read_only=False)
    host.loop(0, "/disk")
    await host.found.join()
    assert host.found.attachment is not None
    assert host.found.attachment.devices == {"log": "/dev/loop1"}


async def test_a_mount_without_devices_can_go_for_another_way(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.mount()
    await host.found.adopt(host.attachment(disk="/dev/loop0"))
    assert host.found.attachment is not None
    made = {"disk": "/dev/nbd0"}
    monkeypatch.setattr(host.found, "_attach_nbd", lambda *_, **__: asyncio.sleep(0, made))
    assert await host.found.attach(["disk"], read_only=False, method="nbd") == made
    assert host.holders[0].ended


async def test_a_mount_that_nobody_noted_is_taken_over(host: Host) -> None:
    """An agent was killed before it noted its first attach."""
    host.mount()
    host.loop(7, str(host.mountpoint / "disk"))
    assert await host.found.attach(["disk"], read_only=False) == {"disk": "/dev/loop7"}
    host.agent()
    assert await host.found.detach(["disk"]) == {"disk": "/dev/loop7"}
    assert host.found.attachment is None


async def test_a_device_that_goes_meanwhile_is_detached(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    await host.found.attach(["disk"], read_only=False)

    def somebody_detaches(device: str) -> str:
        (host.block / device.removeprefix("/dev/") / "loop/backing_file").unlink()
        return ""

    monkeypatch.setattr(devices, "user_of", somebody_detaches)
    assert await host.found.detach(["disk"]) == {"disk": "/dev/loop0"}
    assert host.detached == []
    assert host.found.attachment is None


async def test_a_failed_first_attach_leaves_nothing(host: Host) -> None:
    host.found._server.client = None
    with pytest.raises(UnreachableError):
        await host.found.attach(["disk"], read_only=False)
    assert host.found.attachment is None
    assert host.holders[0].ended


async def test_joining_while_all_is_detached(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is restarted just then learns of no defect, and the detach waits for it."""
    await host.found.attach(["disk"], read_only=False)
    inside, go_on = asyncio.Event(), asyncio.Event()
    sockets: list[str] = []

    async def slow(self: BlockDevices, client: Any, attachment: Attachment) -> None:
        assert self.attachment is attachment
        assert client is host
        inside.set()
        await go_on.wait()
        sockets.append(attachment.holder_socket)

    monkeypatch.setattr(BlockDevices, "_attach_fuse", slow)
    joining = asyncio.create_task(host.found.join())
    await inside.wait()
    detaching = asyncio.create_task(host.found.detach(["disk"]))
    async with asyncio.timeout(10.0):
        while not host.detached:  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.02)
    assert not host.holders[0].ended
    go_on.set()
    await joining
    assert await detaching == {"disk": "/dev/loop0"}
    assert sockets == [str(host.run_dir / "h-ward.sock")]
    assert host.found.attachment is None
