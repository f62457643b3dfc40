"""Attaching by the kernel's own NBD client, under a kernel that has one: Debian's, in a guest.

Guards that a mounted file system sees no error when the tap behind it is killed or ends, with and
without an agent; that the agent finds its devices again; and that a device in use is not cut off.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import guest

SCRIPT = Path(__file__).parent / "guest/nbd_attach.py"


@pytest.mark.needs("root", "qemu-system-x86_64", "busybox", str(guest.KERNEL / "vmlinuz"))
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("leak_check")
def test_a_file_system_outlives_its_taps(tmp_path: Path) -> None:
    said = guest.run(SCRIPT, tmp_path, modules=("nbd",), timeout_s=600)
    print(said)
    assert "I/O error" not in said
