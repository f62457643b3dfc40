"""The main job from end to end, as a user has it: restore, mount, restart, lose, drop, stop.

Guards what no other test reaches: that history comes out again (files, devices, mounts), that views
outlive their process and their agent, and that a target which fails, loses or parts from its
history finds the way back by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
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

pytestmark = [
    pytest.mark.needs("root"),
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("leak_check"),
]
SIZE = 8 << 20
#: XFS makes no file system below this.
XFS_SIZE = 320 << 20


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with Stack.run(tmp_path) as stack:
        yield stack


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write(stack: Stack, data: bytes, offset: int = 0) -> None:
    with Client(stack.uri("ward", "disk")) as client:
        for start in range(0, len(data), 1 << 20):
            client.pwrite(data[start : start + (1 << 20)], offset + start)
        client.flush()


def content(stack: Stack) -> bytes:
    with Client(stack.uri("ward", "disk")) as client:
        return client.read_all()


def newest(stack: Stack) -> bytes:
    with stack.view("ward") as view, Client(view.volumes[0].nbd_uri) as client:
        return client.read_all()


# Restore


def test_restore_to_a_file(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": SIZE, "log": 1 << 20})
    write(stack, rng.randbytes(2 << 20))
    good = content(stack)
    stack.source.ebb("bookmark", "ward", "before the accident")
    write(stack, bytes(1 << 20))
    stack.wait_durable("ward")
    path = stack.directory / "out.img"
    point = ("--bookmark", "before the accident")
    said = stack.target.ebb("restore", "ward", f"disk={path}", *point).stdout
    assert "restored 8.0 MiB" in said
    assert path.read_bytes() == good

    refused = stack.target.ebb("restore", "ward", f"disk={path}", *point, check=False)
    assert refused.returncode == ExitCode.REFUSED
    assert "--force" in refused.stderr
    with path.open("r+b") as file:
        file.write(b"spoilt")
        file.truncate(SIZE // 2)
    stack.target.ebb("restore", "ward", f"disk={path}", *point, "--force")
    assert path.read_bytes() == good
    # Without a point: the newest. Two volumes at once, as JSON.
    other = stack.directory / "log.img"
    lines = stack.target.ebb(
        "restore", "ward", f"disk={path}", f"log={other}", "--force", "--json"
    ).stdout.splitlines()
    assert json.loads(lines[-1])["done"] is True
    assert path.read_bytes() == content(stack) != good
    assert other.read_bytes() == bytes(1 << 20)
    assert stack.target.ebb(
        "restore", "ward", f"nothing={path}", "--force", check=False
    ).returncode == int(ExitCode.NOT_FOUND)
    assert stack.target.ebb(
        "restore", "ward", "disk=/nonexistent/out.img", check=False
    ).returncode == int(ExitCode.NOT_FOUND)


def test_restore_goes_on_where_it_was_cut_off(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": 256 << 20})
    write(stack, rng.randbytes(64 << 20))
    stack.wait_durable("ward")
    path = stack.directory / "out.img"
    request = agent_pb2.RestoreRequest(
        group="ward", volumes=[agent_pb2.RestoreVolume(volume="disk", path=str(path))]
    )
    call = stack.target.stub.Restore(request)
    first = next(iter(call))
    assert not first.done
    call.cancel()
    process = stack.target.process
    assert process is not None
    eventually(lambda: not _has_open(process.pid, path), what="the work stops")
    request.volumes[0].overwrite = True
    last = list(stack.target.stub.Restore(request))[-1]
    assert last.done
    assert last.bytes_done == 256 << 20
    assert path.read_bytes() == content(stack)


def _has_open(pid: int, path: Path) -> bool:
    for descriptor in list(Path(f"/proc/{pid}/fd").iterdir()):
        with contextlib.suppress(OSError):
            if descriptor.readlink() == path:
                return True
    return False


@contextlib.contextmanager
def loop_device(path: Path, size: int) -> Iterator[str]:
    with path.open("wb") as file:
        file.truncate(size)
    device = run("losetup", "--find", "--show", str(path))
    try:
        yield device
    finally:
        run("losetup", "-d", device)


@pytest.mark.needs("loop", "mkfs.ext4")
def test_restore_to_a_device(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": SIZE})
    write(stack, rng.randbytes(2 << 20))
    stack.wait_durable("ward")
    mounted = stack.directory / "mounted"
    mounted.mkdir()
    with loop_device(stack.directory / "device.img", SIZE + 4096) as device:
        target = f"disk={device}"
        refused = stack.target.ebb("restore", "ward", target, check=False)
        assert refused.returncode == ExitCode.REFUSED
        run("mkfs.ext4", "-q", device)
        run("mount", device, str(mounted))
        try:
            refused = stack.target.ebb("restore", "ward", target, "--force", check=False)
            assert refused.returncode == ExitCode.REFUSED, refused.stderr
            assert "hint:" in refused.stderr
        finally:
            run("umount", str(mounted))
        stack.target.ebb("restore", "ward", target, "--force")
        with Path(device).open("rb") as file:
            assert file.read(SIZE) == content(stack)
    with loop_device(stack.directory / "small.img", SIZE // 2) as device:
        refused = stack.target.ebb("restore", "ward", f"disk={device}", "--force", check=False)
        assert refused.returncode not in {0, ExitCode.INTERNAL}, refused.stderr
        assert "hint:" in refused.stderr


# Views


@contextlib.contextmanager
def live_filesystem(stack: Stack, kind: str) -> Iterator[Path]:
    """A file system on the protected volume, mounted and in use."""
    where = stack.directory / "live"
    where.mkdir()
    device = stack.source.ebb_json("attach", "ward")["devices"][0]["device"]
    run(f"mkfs.{kind}", "-q", device)
    run("mount", device, str(where))
    try:
        yield where
    finally:
        run("umount", str(where))
        stack.source.ebb("detach", "ward")


@pytest.mark.needs("fuse", "loop", "mkfs.ext4", "mkfs.xfs")
@pytest.mark.parametrize(("kind", "option"), [("ext4", "noload"), ("xfs", "norecovery")])
def test_mount_of_a_view(stack: Stack, rng: random.Random, kind: str, option: str) -> None:
    stack.protect("ward", {"disk": XFS_SIZE if kind == "xfs" else 32 << 20})
    picture = rng.randbytes(1 << 20)
    with live_filesystem(stack, kind) as live:
        (live / "picture.dcm").write_bytes(picture)
        run("sync", "-f", str(live))
        if kind == "xfs":
            # Read-only without its log XFS shows what is in place: that is after a freeze.
            run("fsfreeze", "-f", str(live))
            run("fsfreeze", "-u", str(live))
        stack.source.ebb("bookmark", "ward", "good")
        (live / "picture.dcm").write_bytes(b"overwritten")
        run("sync", "-f", str(live))
        stack.wait_durable("ward")
        where = stack.directory / "seen"
        where.mkdir()
        target = stack.target
        target.ebb("view", "open", "ward", "--bookmark", "good", "--name", "ro")
        mount = target.ebb_json("view", "mount", "ro", str(where))
        assert option in mount["options"].split(",")
        assert (where / "picture.dcm").read_bytes() == picture
        with pytest.raises(OSError, match="Read-only"):
            (where / "new").write_bytes(b"x")
        target.ebb("view", "unmount", "ro")
        target.ebb("view", "close", "ro")

        target.ebb("view", "open", "ward", "--bookmark", "good", "--name", "rw", "--writable")
        target.ebb("view", "mount", "rw", str(where))
        (where / "drill.txt").write_bytes(b"a drill")
        run("sync", "-f", str(where))
        assert (where / "picture.dcm").read_bytes() == picture
        # A new process of the view takes over the mount, point and overlay.
        before = target.status().views[0]
        os.kill(before.pid, signal.SIGKILL)
        eventually(lambda: target.status().views[0].pid not in {0, before.pid})
        (where / "more.txt").write_bytes(b"after the kill")
        run("sync", "-f", str(where))
        run("umount", str(where))
        options = ("-o", "nouuid") if kind == "xfs" else ()
        run("mount", *options, target.status().views[0].volumes[0].device, str(where))
        assert (where / "drill.txt").read_bytes() == b"a drill"
        assert (where / "more.txt").read_bytes() == b"after the kill"
        after = target.status().views[0]
        assert (after.seq, after.time_us) == (before.seq, before.time_us)
        target.ebb("view", "close", "rw", "--yes")
        assert not os.path.ismount(where)
        assert (live / "picture.dcm").read_bytes() == b"overwritten"


@pytest.mark.needs("fuse", "loop")
def test_attached_view_outlives_its_process_and_its_agent(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": SIZE})
    data = rng.randbytes(1 << 20)
    write(stack, data)
    stack.wait_durable("ward")
    target = stack.target
    opened = target.ebb_json("view", "open", "ward", "--writable", "--name", "test")
    device = target.ebb_json("attach", "--view", "test")["devices"][0]["device"]
    with Path(device).open("r+b", buffering=0) as file:
        assert file.read(1 << 20) == data
        file.seek(4 << 20)
        file.write(b"overlay!" * 512)
        os.fsync(file.fileno())
    write(stack, rng.randbytes(1 << 20))
    stack.wait_durable("ward")

    def same(pid_before: int, *, new_process: bool) -> int:
        eventually(
            lambda: (
                target.status().views[0].state == agent_pb2.View.STATE_SERVING
                and (target.status().views[0].pid != pid_before) == new_process
            ),
            what="the view serves",
        )
        view = target.status().views[0]
        assert view.seq == int(opened["seq"])
        assert view.volumes[0].device == device
        run("blockdev", "--flushbufs", device)
        with Path(device).open("rb") as file:
            assert file.read(1 << 20) == data
            file.seek(4 << 20)
            assert file.read(4096) == b"overlay!" * 512
        return int(view.pid)

    pid = same(0, new_process=True)
    os.kill(pid, signal.SIGKILL)
    pid = same(pid, new_process=True)
    for sig in (signal.SIGTERM, signal.SIGKILL):
        target.kill(sig)
        assert is_alive(pid)
        target.start()
        pid = same(pid, new_process=False)
    # Both at once: the agent comes back and finds only the state.
    target.kill()
    os.kill(pid, signal.SIGKILL)
    target.start()
    pid = same(pid, new_process=True)
    refused = target.ebb("unprotect", "ward", "--delete-history", "--yes", "--force", check=False)
    assert refused.returncode == ExitCode.REFUSED
    target.ebb("view", "close", "test", "--yes")
    assert not is_alive(pid)
    assert not list((target.directory / "state").glob("**/overlay/test/*"))


# A target in trouble


def test_journal_goes_on_after_a_failed_write(stack: Stack, rng: random.Random) -> None:
    """A limit of the file size makes writes fail as a broken disk does: EFBIG is not "full"."""
    stack.protect("ward", {"disk": SIZE})
    write(stack, rng.randbytes(256 << 10))
    stack.wait_durable("ward")
    assert stack.target.process is not None
    pid = stack.target.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    write(stack, rng.randbytes(4 << 20))

    def failed() -> bool:
        return stack.target.target("ward").state in {
            agent_pb2.TargetGroup.STATE_FAILED,
            agent_pb2.TargetGroup.STATE_WAITING,
        }

    eventually(failed, what="the journal fails")
    assert content(stack)[:4096] != bytes(4096)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    stack.wait_durable("ward")
    assert newest(stack) == content(stack)


def wait_copied_again(stack: Stack) -> None:
    """The source says what it does, and the newest point is the volume again."""

    def said() -> bool:
        return any("copied again" in notice for notice in stack.source.source("ward").notices)

    def equal() -> bool:
        with contextlib.suppress(grpc.RpcError):
            return newest(stack) == content(stack)
        return False

    eventually(said, what="the source notices")
    eventually(equal, what="all is copied again")
    assert not stack.source.source("ward").tap.in_span


def test_target_that_lost_its_history(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": SIZE})
    write(stack, rng.randbytes(2 << 20))
    stack.wait_durable("ward")
    journal = stack.target.target("ward").journal_dir
    stack.target.kill(signal.SIGTERM)
    for file in list(Path(journal).iterdir()):
        file.unlink()
    stack.target.start()
    wait_copied_again(stack)


def test_target_that_was_rolled_back(stack: Stack, rng: random.Random) -> None:
    """As a virtual machine is: what it had acknowledged is not there any more."""
    stack.protect("ward", {"disk": SIZE})
    write(stack, rng.randbytes(1 << 20))
    stack.source.ebb("bookmark", "ward", "old")
    stack.wait_durable("ward")
    journal = stack.target.target("ward").journal_dir
    saved = stack.directory / "saved"
    stack.target.kill(signal.SIGTERM)
    shutil.copytree(journal, saved)
    stack.target.start()
    write(stack, rng.randbytes(1 << 20), 1 << 20)
    stack.wait_durable("ward")
    stack.target.kill(signal.SIGTERM)
    shutil.rmtree(journal)
    shutil.copytree(saved, journal)
    stack.target.start()
    wait_copied_again(stack)
    write(stack, rng.randbytes(4096), 3 << 20)
    stack.wait_durable("ward")
    assert newest(stack) == content(stack)
    with stack.view("ward", bookmark="old", exact=True) as view:
        assert view.seq


# The end


def test_history_is_dropped_here_and_there(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": SIZE})
    write(stack, rng.randbytes(1 << 20))
    stack.wait_durable("ward")
    journal = stack.target.target("ward").journal_dir
    spool = stack.source.source("ward").spool_dir
    said = stack.source.ebb_json("unprotect", "ward", "--delete-history", "--yes")
    assert sorted(said["dropped"]) == sorted([f"target:{journal}", spool])
    assert not Path(journal).exists()
    assert not Path(spool).exists()
    assert not stack.source.status().sources
    assert not stack.target.status().targets
    assert (stack.directory / "ward-disk.img").stat().st_size == SIZE


def test_history_is_dropped_at_the_target(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": SIZE})
    write(stack, rng.randbytes(1 << 20))
    stack.wait_durable("ward")
    journal = stack.target.target("ward").journal_dir
    drop = ("unprotect", "ward", "--delete-history", "--yes")
    refused = stack.target.ebb(*drop, check=False)
    assert refused.returncode == ExitCode.REFUSED
    stack.target.ebb(*drop, "--force")
    assert not Path(journal).exists()

    def refused_by_target() -> bool:
        shipping = stack.source.source("ward").shipping
        return shipping.state == agent_pb2.Shipping.STATE_REFUSED

    eventually(refused_by_target, what="the source says that the target forgot the group")
    write(stack, rng.randbytes(4096))
    assert stack.source.source("ward").tap.mode == "recording"
    stack.source.ebb("unprotect", "ward", "--yes", "--force")


def test_agents_end_soon_with_streams_open(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": SIZE})
    write(stack, rng.randbytes(1 << 20))
    stack.wait_durable("ward")
    for host in (stack.target, stack.source):
        call = host.stub.Watch(agent_pb2.WatchRequest(interval_ms=60_000))
        assert next(iter(call)).name == host.name
        ended = threading.Thread(target=_drain, args=(call,))
        ended.start()
        assert host.process is not None
        began = time.monotonic()
        host.process.send_signal(signal.SIGTERM)
        assert host.process.wait(15) == 0
        assert time.monotonic() - began < 6
        ended.join(10)
        host.process = None
        host.close_channel()
    stack.target.start()
    stack.source.start()
    write(stack, rng.randbytes(1 << 20))
    stack.wait_durable("ward")
    assert newest(stack) == content(stack)


def _drain(call: grpc.Call) -> None:
    with contextlib.suppress(grpc.RpcError):
        for _ in call:
            pass
