"""Checks before a group is protected: names, backings, and where spool and state lie."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from ebbtide.control.names import check_name
from ebbtide.control.state import VolumeRecord
from ebbtide.errors import NoSpaceError, NotFoundError, PrivilegeError, RefusedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ebbtide.control.state import SourceRecord
    from ebbtide.rpc import agent_pb2 as api

BLOCK_SIZE = 4096
#: The largest volume the format holds, and the most volumes of one group.
VOLUME_BYTES_MAX = 1 << 50
VOLUMES_MAX = 1024


def prepare(
    volumes: Sequence[api.ProtectVolume], others: Iterable[SourceRecord]
) -> tuple[list[VolumeRecord], list[Path]]:
    """Records of the volumes, and the images that were made for them. Blocks.

    Raises errors that name the volume; images made so far are removed again then.
    """
    if not 1 <= len(volumes) <= VOLUMES_MAX:
        raise UsageError(f"a group has 1 to {VOLUMES_MAX} volumes, not {len(volumes)}")
    names = [volume.name for volume in volumes]
    for name in names:
        check_name(name, "volume")
        if names.count(name) > 1:
            raise UsageError(f"two volumes are called '{name}'")
    used = {
        _identity(Path(volume.backing)): f"volume '{volume.name}' of group '{other.name}'"
        for other in others
        for volume in other.volumes
    }
    used.pop(None, None)
    records: list[VolumeRecord] = []
    made: list[Path] = []
    try:
        for index, volume in enumerate(volumes):
            path = Path(volume.backing)
            if not path.is_absolute():
                raise UsageError(f"the backing {path} of volume '{volume.name}' is not absolute")
            if volume.create_bytes and not path.exists():
                _make_image(path, volume.create_bytes)
                made.append(path)
            _check_backing(path)
            identity = _identity(path)
            if identity in used:
                raise RefusedError(
                    f"{path} is already protected: {used[identity]}",
                    code="in-use",
                    hint="a volume belongs to one group",
                )
            used[identity] = f"volume '{volume.name}' of this group"
            records.append(VolumeRecord(index=index, name=volume.name, backing=str(path.resolve())))
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    return records, made


def _identity(path: Path) -> tuple[int, int] | None:
    """What two paths of one backing share."""
    try:
        found = path.stat()
    except OSError:
        return None
    if stat.S_ISBLK(found.st_mode):
        return (-1, found.st_rdev)
    return (found.st_dev, found.st_ino)


def _make_image(path: Path, size: int) -> None:
    if size % 512 or not BLOCK_SIZE <= size <= VOLUME_BYTES_MAX:
        raise UsageError(
            f"{size} bytes is no size of a volume",
            hint="whole sectors of 512 bytes, from 4 KiB to 1 PiB",
        )
    try:
        with path.open("xb") as image:
            image.truncate(size)
        path.chmod(0o600)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise NoSpaceError(
            f"{path} cannot be made: {error.strerror}", hint="choose another place for the image"
        ) from None


def _check_backing(path: Path) -> None:
    try:
        found = path.stat()
    except FileNotFoundError:
        raise NotFoundError(
            f"the backing {path} does not exist", hint="name it, or have it made with a size"
        ) from None
    except OSError as error:
        raise PrivilegeError(f"the backing {path} cannot be used: {error.strerror}") from None
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        raise UsageError(f"the backing {path} is neither a file nor a block device")
    if not os.access(path, os.R_OK | os.W_OK):
        raise PrivilegeError(f"the backing {path} cannot be written", hint="run the agent as root")
    if stat.S_ISREG(found.st_mode) and found.st_size < BLOCK_SIZE:
        raise UsageError(f"the backing {path} has only {found.st_size} bytes")
