"""Loop devices over the files of our FUSE mounts, as the kernel tells of them.

A number such as /dev/loop3 says nothing: after a boot it is anybody's. The file below a device says
whose it is. Once a mount is taken out of the tree, the paths of its files begin at its own root, so
that a device over a mount that was replaced is not taken for one over its successor.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from ebbtide.control import kernel_nbd
from ebbtide.errors import PrivilegeError

#: Type of the mounts that a holder makes.
FILE_SYSTEM: Final = "fuse.ebbtide"
#: The kernel's word for a name that was looked up in vain since, as while a server was away.
_DELETED: Final = " (deleted)"


def require() -> None:
    """Raises `PrivilegeError` where there can be none."""
    if os.geteuid() != 0:
        raise PrivilegeError(
            "block devices need root",
            hint="run the agent as root, or use the NBD socket that 'ebb status' shows",
        )
    for path in ("/dev/fuse", "/dev/loop-control"):
        if not Path(path).exists():
            raise PrivilegeError(
                f"{path} is absent: this kernel gives no block devices from FUSE and loop",
                code="unsupported",
                hint="use the NBD socket that 'ebb status' shows",
            )


def resolved(mountpoint: str) -> Path:
    """The path as the kernel tells it. Asks nothing of the mount, whose server may not answer."""
    path = Path(mountpoint)
    return path.parent.resolve() / path.name


def over(mountpoint: str) -> list[tuple[str, str]]:
    """Volume and device of each loop device over a file of a mount. Blocks."""
    where = resolved(mountpoint)
    found = []
    for file in kernel_nbd.SYSFS.glob("loop*/loop/backing_file"):
        try:
            text = os.fsdecode(file.read_bytes())
        except OSError:
            continue
        path = Path(text.removesuffix("\n").removesuffix(_DELETED))
        if path.parent == where:
            found.append((path.name, f"/dev/{file.parent.parent.name}"))
    return sorted(found)
