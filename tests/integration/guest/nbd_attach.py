"""Runs inside the guest, for `test_nbd_attach`: a volume attached by the kernel's own NBD client.

Plain asserts; what went wrong is read from its output. Every step says so, with the seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import grpc
import pytest

from ebbtide.rpc import agent_pb2 as api
from tests.support.stack import Host, eventually, is_alive

SIZE = 48 << 20
BEGAN = time.monotonic()
#: The emulation is slow, and slower yet on a busy machine.
WITHIN_S = 240.0


def step(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f}] {text}", flush=True)


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def wait_tap(host: Host, before: int) -> None:
    def there() -> bool:
        tap = host.source("ward").tap
        return tap.pid not in {0, before} and not tap.in_span

    eventually(there, WITHIN_S, "a new tap serves")


class Writer(threading.Thread):
    """Writes and syncs small files without end; an error of any of it is kept."""

    def __init__(self, where: Path) -> None:
        super().__init__(daemon=True)
        self.where, self.count, self.slowest_s = where, 0, 0.0
        self.error: OSError | None = None
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.is_set() and self.error is None:
            began = time.monotonic()
            try:
                with (self.where / f"file-{self.count % 50}").open("wb") as file:
                    file.write(b"%8d" % self.count * 4096)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                self.error = error
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self.count += 1


def check_newest(host: Host, device: str, backing: Path) -> None:
    """Device, backing and the newest view hold the same."""
    tap = host.source("ward").tap
    eventually(lambda: host.source("ward").tap.spooled_seq >= tap.last_seq, WITHIN_S, "all spooled")
    out = backing.with_name("newest.img")
    request = api.RestoreRequest(group="ward")
    request.volumes.add(volume="disk", path=str(out), overwrite=True)
    assert list(host.stub.Restore(request))[-1].done
    with Path(device).open("rb") as file:
        shown = file.read()
    assert len(shown) == SIZE
    assert shown == backing.read_bytes(), "the device and the backing differ"
    assert shown == out.read_bytes(), "the device and the newest view differ"


def check_view(host: Host, directory: Path, expected: bytes) -> None:
    """A view is attached and mounted the same way, and its server is killed under the mount."""
    past = directory / "past"
    past.mkdir()
    view = host.stub.OpenView(api.OpenViewRequest(group="ward", writable=True), timeout=WITHIN_S)
    mounted = host.stub.MountView(
        api.MountViewRequest(view=view.id, directory=str(past)), timeout=WITHIN_S
    )
    assert mounted.device.startswith("/dev/nbd"), mounted
    assert (past / "file-0").read_bytes() == expected
    os.kill(view.pid, signal.SIGKILL)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    (past / "file-0").write_bytes(b"changed")
    run("sync", "-f", str(past))
    assert (past / "file-0").read_bytes() == b"changed"
    host.stub.CloseView(api.CloseViewRequest(view=view.id), timeout=WITHIN_S)
    assert not os.path.ismount(past)


def main() -> None:
    directory = Path(tempfile.mkdtemp())
    host = Host("guest", directory / "agent", 7380)
    host.lay_out(extra="[attach]\nnbd_timeout_s = 8")
    host.start(WITHIN_S)
    step("agent serves")
    backing = directory / "disk.img"
    request = api.ProtectRequest(name="ward", suite=2)
    request.volumes.add(name="disk", backing=str(backing), create_bytes=SIZE)
    host.stub.Protect(request, timeout=WITHIN_S)
    eventually(lambda: not host.source("ward").tap.in_span, WITHIN_S, "the first copy ends")
    (attached,) = host.stub.Attach(api.AttachRequest(group="ward"), timeout=WITHIN_S).devices
    step(f"attached: {attached.device}")
    assert attached.method == api.ATTACH_METHOD_NBD, "nbd is what 'auto' means here"
    index = attached.device.removeprefix("/dev/nbd")
    eventually(lambda: host.source("ward").tap.clients == 4, WITHIN_S, "four connections")
    run("mkfs.ext4", "-q", "-E", "nodiscard", attached.device)
    live = directory / "live"
    live.mkdir()
    run("mount", attached.device, str(live))
    step("mounted")

    with pytest.raises(grpc.RpcError, match="in use"):
        host.stub.Detach(api.DetachRequest(group="ward"), timeout=WITHIN_S)

    writer = Writer(live)
    writer.start()
    eventually(lambda: writer.count > 5, WITHIN_S, "the writer is busy")
    before = host.source("ward").tap.pid
    os.kill(before, signal.SIGKILL)
    wait_tap(host, before)
    at = writer.count
    eventually(lambda: writer.count > at + 5 or writer.error, WITHIN_S, "writing goes on")
    step(f"tap killed: {writer.count} files, the slowest took {writer.slowest_s:.1f} s")

    # A tap that ends in order: nothing of it reaches the file system either.
    before = host.source("ward").tap.pid
    os.kill(before, signal.SIGTERM)
    eventually(lambda: not is_alive(before), WITHIN_S, "the tap ends")
    wait_tap(host, before)
    at = writer.count
    eventually(lambda: writer.count > at + 5 or writer.error, WITHIN_S, "writing goes on")
    step(f"tap ended: {writer.count} files, the slowest took {writer.slowest_s:.1f} s")

    # The agent is away when the tap dies: the next one finds its devices and mends them.
    host.kill(signal.SIGKILL)
    before = next(pid for pid in host.helpers() if "tap_server" in _command(pid))
    os.kill(before, signal.SIGKILL)
    host.start(WITHIN_S)
    wait_tap(host, before)
    at = writer.count
    eventually(lambda: writer.count > at + 5 or writer.error, WITHIN_S, "writing goes on")
    writer.stopping.set()
    writer.join()
    step(f"agent and tap killed: {writer.count} files")
    assert writer.error is None, writer.error
    check_view(host, directory, (live / "file-0").read_bytes())
    step("a mounted view outlives its server")
    run("umount", str(live))
    run("e2fsck", "-fn", attached.device)
    check_newest(host, attached.device, backing)
    step("device, backing and newest view agree")

    with Path(attached.device).open("rb"), pytest.raises(grpc.RpcError, match="in use"):
        host.stub.Detach(api.DetachRequest(group="ward"), timeout=WITHIN_S)
    host.stub.Detach(api.DetachRequest(group="ward"), timeout=WITHIN_S)
    assert not Path(f"/sys/block/nbd{index}/pid").exists()
    eventually(lambda: host.source("ward").tap.clients == 0, WITHIN_S, "no connection is left")
    step("detached")


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        for log in Path(tempfile.gettempdir()).glob("*/agent/**/*.log"):
            print(f"--- {log}", *log.read_text(errors="replace").splitlines()[-30:], sep="\n")
        raise
