"""What an agent must know after a restart: one JSON file, replaced atomically and durably.

Keys are in it only wrapped. Everything else about groups lies in their spool, journal and tap
state, which belong to native code.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ebbtide.errors import ConfigError, DamagedError, NoSpaceError

if TYPE_CHECKING:
    from pathlib import Path

STATE_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Attachment(_Record):
    """Block devices of a tap or a view."""

    method: Literal["fuse-loop", "nbd"] = "fuse-loop"
    #: Of the FUSE mount and of the holder that keeps it; empty for NBD.
    mountpoint: str = ""
    holder_socket: str = ""
    read_only: bool = False
    #: Volume name to device path.
    devices: dict[str, str] = Field(default_factory=dict)
    #: Volume name to the number of connections of its NBD device.
    connections: dict[str, int] = Field(default_factory=dict)


class VolumeRecord(_Record):
    index: int
    name: str
    backing: str


class SourceRecord(_Record):
    """A group that this agent protects."""

    group: str
    name: str
    suite: int
    wrapped_key: str
    generation_counter: int
    generation_site: int
    #: Empty: local history only.
    target_peer: str
    spool_dir: str
    spool_bytes_max: int
    cache_bytes: int
    frame_delay_ms: int
    nbd_tcp: str = ""
    volumes: list[VolumeRecord]
    attachment: Attachment | None = None
    #: Newest record that the target said is durable there; 0 before the first.
    durable_seq: int = 0
    durable_incarnation: str = ""
    durable_next_frame: int = 0

    @property
    def group_id(self) -> bytes:
        return bytes.fromhex(self.group)


class TargetRecord(_Record):
    """A group whose history this agent keeps."""

    group: str
    name: str
    suite: int
    wrapped_key: str
    source_peer: str
    journal_dir: str
    promised_counter: int
    promised_site: int

    @property
    def group_id(self) -> bytes:
        return bytes.fromhex(self.group)


class MountRecord(_Record):
    volume: str
    device: str
    directory: str
    filesystem: str
    options: str


class ViewRecord(_Record):
    """An open view: what starts the same one again."""

    view: str
    group: str
    seq: int
    time_us: int
    #: Directory of the writable layer; empty for a read-only view.
    overlay_dir: str = ""
    overlay_bytes_max: int = 0
    nbd_tcp: str = ""
    opened_us: int
    open_took_us: int = 0
    attachment: Attachment | None = None
    mounts: list[MountRecord] = Field(default_factory=list)


class AgentState(_Record):
    version: Literal[1] = 1
    sources: dict[str, SourceRecord] = Field(default_factory=dict)
    targets: dict[str, TargetRecord] = Field(default_factory=dict)
    views: dict[str, ViewRecord] = Field(default_factory=dict)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file so that a crash leaves the old or the new one. Blocks."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise NoSpaceError(
            f"{path} cannot be written: {error.strerror}",
            hint="the agent's state must be writable; free space on its disk",
        ) from None


class StateStore:
    """The state in memory and on disk. Change `value`, then `save`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saving = asyncio.Lock()
        self.value = self._load()

    def _load(self) -> AgentState:
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return AgentState()
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be read: {error.strerror}") from None
        try:
            return AgentState.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            raise DamagedError(
                f"{self._path} is damaged or of another version: "
                f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}",
                hint="restore the file from a backup; it names the groups and their wrapped keys",
            ) from None

    async def save(self) -> None:
        """Make the present value durable. Raises `NoSpaceError`; the old file is whole then."""
        async with self._saving:
            content = self.value.model_dump_json(indent=1).encode()
            await asyncio.to_thread(replace_file, self._path, content)
