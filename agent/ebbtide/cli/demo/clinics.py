"""The two ways in which the demo's hospital uses a protected volume.

`MountedClinic`: a loop device with ext4, SQLite in WAL mode and image files, as root.
`SocketClinic`: the same rows and images over the NBD socket, where no block device can be made.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sqlite3
import struct
import subprocess
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from ebbtide.cli.client import WORK_S
from ebbtide.cli.demo.records import ACCIDENT, Contents, Ward, digest, read_rows
from ebbtide.cli.nbd_client import NbdClient
from ebbtide.errors import InternalError
from ebbtide.rpc import agent_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ebbtide.cli.demo.hosts import Hosts

#: A file is written with every so many transactions.
FILE_EVERY = 50
IMAGE_BYTES = 192 << 10
#: Files of one run: reading them back takes part of the demo's minute.
FILES_MAX = 32


class Clinic(ABC):
    """Writes to the protected volume, ruins it, and reads any view of it."""

    #: What is shown to people.
    layout: str

    def __init__(self, hosts: Hosts, group: str) -> None:
        self.hosts = hosts
        self.group = group
        self.ward = Ward(seed=20260301)
        self.transactions = 0

    @abstractmethod
    def set_up(self, uri: str) -> None:
        """Make what holds the data on the volume."""

    @abstractmethod
    def work(self) -> None:
        """One transaction, now and then a file; both durable on return."""

    @abstractmethod
    def accident(self) -> None:
        """Drop the tables, overwrite the files."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the volume."""

    @abstractmethod
    def read(self, view: agent_pb2.View) -> Contents:
        """Everything that a writable view holds."""


class MountedClinic(Clinic):
    """ext4 on a loop device."""

    layout = "ext4 on a loop device, SQLite (WAL, synchronous=FULL) and image files"

    def __init__(self, hosts: Hosts, group: str) -> None:
        super().__init__(hosts, group)
        self._home = hosts.root / "mnt" / "hospital"
        self._database: sqlite3.Connection | None = None
        self.device = ""

    def set_up(self, uri: str) -> None:  # noqa: ARG002 - the other clinic needs it
        request = agent_pb2.AttachRequest(group=self.group)
        attached = self.hosts.source.client.call("Attach", request, timeout_s=WORK_S)
        self.device = attached.devices[0].device
        tool("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,nodiscard", self.device)
        self._home.mkdir(parents=True)
        tool("mount", "-t", "ext4", "-o", "noatime", self.device, str(self._home))
        (self._home / "pacs").mkdir()
        self._database = open_database(self._home / "his.db")
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self.ward.set_up(self._database)

    def work(self) -> None:
        if self._database is None:
            raise InternalError("the clinic is not set up")
        self.ward.transaction(self._database)
        self.transactions += 1
        if self.transactions % FILE_EVERY == 0 and len(self.ward.ledger.files) < FILES_MAX:
            name = f"ct-{self.transactions:06d}.dcm"
            content = self.ward.image(IMAGE_BYTES)
            write_durably(self._home / "pacs" / name, content)
            self.ward.stored(name, content)

    def accident(self) -> None:
        if self._database is None:
            raise InternalError("the clinic is not set up")
        self._database.executescript(ACCIDENT)
        self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for path in sorted((self._home / "pacs").iterdir()):
            with path.open("r+b") as file:
                file.write(secrets.token_bytes(path.stat().st_size))
                file.flush()
                os.fsync(file.fileno())
            path.rename(path.with_suffix(".locked"))
        write_durably(self._home / "READ_ME.txt", b"All your files are encrypted.\n")

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None
        if self._home.is_mount():
            tool("umount", str(self._home))

    def read(self, view: agent_pb2.View) -> Contents:
        where = self.hosts.root / "mnt" / f"view-{view.id}"
        where.mkdir(parents=True)
        request = agent_pb2.MountViewRequest(view=view.id, directory=str(where))
        client = self.hosts.target.client
        client.call("MountView", request, timeout_s=WORK_S)
        try:
            return self._read_tree(where)
        finally:
            request_end = agent_pb2.UnmountViewRequest(view=view.id, directory=str(where))
            client.call("UnmountView", request_end, timeout_s=WORK_S)
            where.rmdir()

    @staticmethod
    def _read_tree(where: Path) -> Contents:
        found = Contents(integrity="no database")
        if (where / "his.db").exists():
            with contextlib.closing(open_database(where / "his.db")) as database:
                found = read_rows(database)
        for path in sorted((where / "pacs").glob("*.dcm")):
            found.files[path.name] = digest(path.read_bytes())
        return found


class SocketClinic(Clinic):
    """A log of database commits over NBD: what SQLite's WAL is, without a file system below.

    An entry is a 4 KiB header and the 4 KiB pages that a commit changed, written in one request
    and flushed. A reader applies whole entries from the first on, until one fails its digest.
    Images are rows of a table, so the same entry carries them.
    """

    layout = "SQLite pages over the NBD socket, one flushed write per commit"
    _MAGIC = b"EBBDEMO1"
    _PAGE = 4096
    _PAGES_MAX = 900

    def __init__(self, hosts: Hosts, group: str) -> None:
        super().__init__(hosts, group)
        self._database = sqlite3.connect(":memory:", isolation_level=None)
        self._device: NbdClient | None = None
        self._image = b""
        self._offset = 0
        self._entries = 0

    def set_up(self, uri: str) -> None:
        self._device = NbdClient(uri)
        self._database.execute(f"PRAGMA page_size={self._PAGE}")
        self._database.execute("CREATE TABLE images (name TEXT PRIMARY KEY, content BLOB NOT NULL)")
        self.ward.set_up(self._database)
        self._append()

    def work(self) -> None:
        self.ward.transaction(self._database)
        self.transactions += 1
        name, content = "", b""
        if self.transactions % FILE_EVERY == 0 and len(self.ward.ledger.files) < FILES_MAX:
            name, content = f"ct-{self.transactions:06d}.dcm", self.ward.image(IMAGE_BYTES)
            self._database.execute("INSERT INTO images VALUES (?, ?)", (name, content))
        self._append()
        if name:
            self.ward.stored(name, content)

    def accident(self) -> None:
        self._database.executescript(ACCIDENT)
        self._append()
        device = self._connected()
        for offset in range(0, self._offset, 1 << 20):
            device.write(offset, secrets.token_bytes(min(1 << 20, self._offset - offset)))
        device.flush()

    def close(self) -> None:
        if self._device is not None:
            self._device.__exit__()
            self._device = None

    def read(self, view: agent_pb2.View) -> Contents:
        with NbdClient(view.volumes[0].nbd_uri) as device:
            image = bytearray()
            for numbers, pages in self._entries_of(device):
                for place, number in enumerate(numbers):
                    end = (number + 1) * self._PAGE
                    image.extend(bytes(max(0, end - len(image))))
                    page = pages[place * self._PAGE : (place + 1) * self._PAGE]
                    image[end - self._PAGE : end] = page
        if not image:
            return Contents(integrity="no database")
        with contextlib.closing(sqlite3.connect(":memory:")) as database:
            database.deserialize(bytes(image))
            found = read_rows(database)
            with contextlib.suppress(sqlite3.Error):
                rows = database.execute("SELECT name, content FROM images")
                found.files = {name: digest(content) for name, content in rows}
        return found

    def _append(self) -> None:
        """Write the pages that differ from the last commit's, as one entry, and flush it."""
        device = self._connected()
        image = self._database.serialize()
        size = self._PAGE
        changed = [
            number
            for number in range(len(image) // size)
            if image[number * size : (number + 1) * size]
            != self._image[number * size : (number + 1) * size]
        ]
        if len(changed) > self._PAGES_MAX:
            raise InternalError(f"a commit of {len(changed)} pages does not fit one entry")
        numbers = struct.pack(f"<{len(changed)}I", *changed)
        pages = b"".join(image[number * size : (number + 1) * size] for number in changed)
        self._entries += 1
        head = struct.pack("<QI", self._entries, len(changed)) + numbers
        header = self._MAGIC + hashlib.sha256(head + pages).digest() + head
        entry = header.ljust(size, b"\0") + pages
        if self._offset + len(entry) > device.size:
            raise InternalError("the demo's volume is full")
        device.write(self._offset, entry)
        device.flush()
        self._offset += len(entry)
        self._image = image

    def _entries_of(self, device: NbdClient) -> Iterator[tuple[tuple[int, ...], bytes]]:
        offset, expected = 0, 1
        while offset + self._PAGE <= device.size:
            header = device.read(offset, self._PAGE)
            number, count = struct.unpack_from("<QI", header, 40)
            whole = header.startswith(self._MAGIC) and number == expected
            length = count * self._PAGE
            if not whole or count > self._PAGES_MAX:
                return
            if offset + self._PAGE + length > device.size:
                return
            pages = device.read(offset + self._PAGE, length)
            if hashlib.sha256(header[40 : 52 + 4 * count] + pages).digest() != header[8:40]:
                return
            yield struct.unpack_from(f"<{count}I", header, 52), pages
            offset += self._PAGE + length
            expected += 1

    def _connected(self) -> NbdClient:
        if self._device is None:
            raise InternalError("the clinic is not set up")
        return self._device


def open_database(path: Path) -> sqlite3.Connection:
    """A connection that begins no transaction by itself."""
    return sqlite3.connect(path, isolation_level=None)


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file, make it and its name durable."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def tool(*command: str) -> None:
    """Run a system tool. Raises `InternalError` with what it said."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PATH": path},
        )
    except FileNotFoundError:
        raise InternalError(
            f"{command[0]} is not installed",
            code="unsupported",
            hint="install e2fsprogs and mount, or run 'ebb demo --socket'",
        ) from None
    except subprocess.TimeoutExpired:
        raise InternalError(f"{command[0]} did not end within 60 s") from None
    if done.returncode:
        raise InternalError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
