"""A guest that runs this machine's own files under another kernel, in qemu's software emulation.

Its root is our root, read-only over 9p; /mnt is its own, in memory. So it has our Python, our
virtual environment and our programs, and a kernel with modules that ours may lack. Slow: some
thirty times slower than this machine, and it wants a second or two of each core.
"""

from __future__ import annotations

import gzip
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.support.stack import ROOT

KERNEL: Final = ROOT / ".cache/kernel"
#: What the guest needs to have a root; ext4's checksum is a soft dependency.
_BASE: Final = ("virtio_pci", "9pnet_virtio", "9p", "crc32c_generic", "ext4")
_DONE: Final = "guest-ended-with"

_INIT: Final = """#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs devtmpfs /dev
for module in $($bb cat /modules/order); do $bb insmod /modules/$module; done
$bb mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=1048576,cache=loose root /root
$bb mount -t tmpfs -o size=75% tmpfs /root/mnt
$bb mkdir /root/mnt/tmp
for where in proc sys dev; do $bb mount --bind /$where /root/$where; done
$bb ifconfig lo up
$bb chroot /root /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  HOME=/mnt TMPDIR=/mnt/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PYTHONPATH={root} \
  {python} {script} </dev/null
echo {done} $?
$bb poweroff -f
"""


def _find(module: str) -> Path:
    return next(KERNEL.glob(f"modules/**/{module.replace('_', '[-_]')}.ko"))


def _order(modules: tuple[str, ...]) -> list[Path]:
    """The files of modules, each after what it depends on. What is not there is built in."""
    found: list[Path] = []

    def add(name: str) -> None:
        path = _find(name)
        if path in found:
            return
        depends = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for other in depends[1].decode().split(",") if depends and depends[1] else []:
            add(other)
        found.append(path)

    for module in modules:
        add(module)
    return found


def _archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """A cpio archive (newc), as the kernel unpacks it: mode and content by path."""
    parts = []
    for number, (name, (mode, content)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))]):
        fields = [number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        parts += [head, bytes(-len(head) % 4), content, bytes(-len(content) % 4)]
    return b"".join(parts)


def _initrd(script: Path, modules: tuple[str, ...]) -> bytes:
    busybox = shutil.which("busybox")
    assert busybox is not None
    order = _order((*_BASE, *modules))
    init = _INIT.format(root=ROOT, python=sys.executable, script=script, done=_DONE)
    files = dict.fromkeys(("bin", "dev", "proc", "sys", "root"), (stat.S_IFDIR | 493, b""))
    files["modules"] = (stat.S_IFDIR | 0o755, b"")
    for path in order:
        files[f"modules/{path.name}"] = (stat.S_IFREG | 0o644, path.read_bytes())
    files["modules/order"] = (
        stat.S_IFREG | 0o644,
        "\n".join(path.name for path in order).encode(),
    )
    files["bin/busybox"] = (stat.S_IFREG | 0o755, Path(busybox).read_bytes())
    files["init"] = (stat.S_IFREG | 0o755, init.encode())
    return gzip.compress(_archive(files), 1)


def run(script: Path, directory: Path, *, modules: tuple[str, ...], timeout_s: float) -> str:
    """Boot a guest that runs a script, to its end; returns what it wrote. Raises if it failed."""
    (directory / "initrd").write_bytes(_initrd(script, modules))
    command = [
        *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"),
        *("-m", "1024", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-serial", "stdio", "-kernel", str(KERNEL / "vmlinuz")),
        *("-initrd", str(directory / "initrd")),
        *("-append", "console=ttyS0 quiet panic=-1 mitigations=off"),
        "-fsdev",
        "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
        *("-device", "virtio-9p-pci,fsdev=root,mount_tag=root"),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as qemu:
        try:
            output, _ = qemu.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            qemu.kill()
            output, _ = qemu.communicate()
            said = output.decode(errors="replace")
            raise AssertionError(f"the guest did not end in {timeout_s} s:\n{said}") from None
    said = output.decode(errors="replace")
    assert re.search(rf"{_DONE} 0\b", said), said
    return said
