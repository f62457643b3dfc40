"""Memory pressure: the write-back path needs no memory that waits for the write-back path.

In a control group of 256 MiB (source agent, tap server, holder and the writer in it; the target is
another host) 2 GiB are dirtied through a mounted file system on the attached device. It must finish
without the tap being killed for memory. Guards design section 5 ("Everything in
the write-back path is locked in memory ... or memory pressure deadlocks it") and invariant 8.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ebbtide.rpc import agent_pb2
from tests.support.nbd import Client
from tests.support.stack import Stack, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.needs("root", "fuse", "loop", "mkfs.ext4", "dd"),
    pytest.mark.timeout(1500),
    pytest.mark.usefixtures("leak_check"),
]
LIMIT = 256 << 20
V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def control_group(name: str) -> Iterator[Path]:
    """A memory control group of LIMIT bytes, version 1 or 2; skips where neither can be made."""
    first = (V1 / "memory.limit_in_bytes").exists()
    group = (V1 if first else V2) / name
    limit = group / ("memory.limit_in_bytes" if first else "memory.max")
    try:
        group.mkdir()
        limit.write_text(str(LIMIT))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"needs a memory control group: {error}")
    try:
        yield group
    finally:
        for _ in range(100):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def test_two_gigabytes_through_a_mount_in_256_mib(
    tmp_path: Path, rounds: Callable[[int], int]
) -> None:
    megabytes = rounds(10) * 205  # 2 GiB in a soak, 615 MiB in a short run: over twice the limit
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    with control_group("ebbtide-test") as group:
        inside = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
        with Stack.run(tmp_path, source_prefix=inside) as stack:
            stack.protect("ward", {"disk": 3 << 30})
            attached = stack.source.stub.Attach(agent_pb2.AttachRequest(group="ward"), timeout=30)
            device = attached.devices[0].device
            subprocess.run(["mkfs.ext4", "-q", device], check=True)
            subprocess.run(["mount", device, str(mountpoint)], check=True)
            try:
                subprocess.run(
                    [
                        *inside,
                        "dd",
                        "if=/dev/urandom",
                        f"of={mountpoint}/big",
                        "bs=1M",
                        f"count={megabytes}",
                        "conv=fsync",
                        "status=none",
                    ],
                    check=True,
                    timeout=1200,
                )
            finally:
                subprocess.run(["umount", str(mountpoint)], check=False)
            in_group = {int(pid) for pid in (group / "cgroup.procs").read_text().split()}
            group_status = stack.source.source("ward")
            assert group_status.tap.pid in in_group
            assert group_status.tap_restarts == 0

            def mended() -> bool:
                tap = stack.source.source("ward").tap
                return tap.mode == "recording" and not tap.in_span

            # A slow disk may cost a gap (an encoder that is stuck for 2 s), but it mends itself.
            eventually(mended, 300, "recording goes on")
            stack.wait_durable("ward", within_s=600)
            with (
                Client(stack.uri("ward", "disk")) as source,
                stack.view("ward") as view,
                Client(view.volumes[0].nbd_uri) as newest,
            ):
                for offset in range(0, source.size, 64 << 20):
                    length = min(1 << 20, source.size - offset)
                    assert source.pread(length, offset) == newest.pread(length, offset)
