"""A small NBD client: fixed newstyle over a unix socket, simple replies, one request at a time.

For `ebb demo` where no block device can be made. It is no general client: no TLS, no structured
replies, no pipelining.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from ebbtide.errors import DamagedError, UnreachableError, UsageError

_OPTION_MAGIC: Final = 0x49484156454F5054
_OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
_REQUEST_MAGIC: Final = 0x25609513
_REPLY_MAGIC: Final = 0x67446698
_FLAG_FIXED_NEWSTYLE: Final = 1
_FLAG_NO_ZEROES: Final = 2
_OPT_GO: Final = 7
_REP_ACK: Final = 1
_REP_INFO: Final = 3
_INFO_EXPORT: Final = 0
_CMD_READ, _CMD_WRITE, _CMD_DISC, _CMD_FLUSH = 0, 1, 2, 3
#: Bytes of one request; servers may refuse more than 32 MiB.
CHUNK: Final = 4 << 20
TIMEOUT_S: Final = 60.0


def parse_uri(uri: str) -> tuple[str, str]:
    """Socket path and export name of `nbd+unix:///EXPORT?socket=PATH`. Raises `UsageError`."""
    parts = urlsplit(uri)
    paths = parse_qs(parts.query).get("socket", [])
    if parts.scheme != "nbd+unix" or len(paths) != 1:
        raise UsageError(f"'{uri}' is no NBD address of a unix socket")
    return paths[0], unquote(parts.path.removeprefix("/"))


class NbdClient:
    """One connection to one export."""

    def __init__(self, uri: str) -> None:
        path, export = parse_uri(uri)
        self._where = uri
        self._cookie = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(TIMEOUT_S)
        try:
            self._socket.connect(path)
            self.size = self._negotiate(export.encode())
        except OSError as error:
            self._socket.close()
            raise UnreachableError(f"{uri} does not answer: {error}") from None
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendall(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _CMD_DISC, 0, 0, 0))
        self._socket.close()

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of a range."""
        pieces = []
        while length:
            step = min(length, CHUNK)
            self._request(_CMD_READ, offset, step)
            pieces.append(self._receive(step))
            offset, length = offset + step, length - step
        return b"".join(pieces)

    def write(self, offset: int, data: bytes) -> None:
        """Write a range; durable after `flush`."""
        view = memoryview(data)
        for begin in range(0, len(view), CHUNK):
            piece = view[begin : begin + CHUNK]
            self._request(_CMD_WRITE, offset + begin, len(piece), piece)

    def flush(self) -> None:
        """Wait until everything written is durable."""
        self._request(_CMD_FLUSH, 0, 0)

    def _negotiate(self, export: bytes) -> int:
        greeting = self._receive(18)
        magic, option_magic, flags = struct.unpack(">8sQH", greeting)
        if magic != b"NBDMAGIC" or option_magic != _OPTION_MAGIC or not flags & 1:
            raise DamagedError(f"{self._where} is no fixed-newstyle NBD server", code="format")
        answer = (_FLAG_FIXED_NEWSTYLE | _FLAG_NO_ZEROES) & flags
        body = struct.pack(">I", len(export)) + export + struct.pack(">H", 0)
        header = struct.pack(">QII", _OPTION_MAGIC, _OPT_GO, len(body))
        self._socket.sendall(struct.pack(">I", answer) + header + body)
        size = -1
        while True:
            magic, _, kind, length = struct.unpack(">QIII", self._receive(20))
            if magic != _OPTION_REPLY_MAGIC or length > 1 << 16:
                raise DamagedError(f"{self._where} sent a malformed reply", code="format")
            body = self._receive(length)
            if kind == _REP_ACK and size >= 0:
                return size
            if kind == _REP_INFO and length >= 2:
                if struct.unpack(">H", body[:2])[0] == _INFO_EXPORT and length >= 10:
                    size = int(struct.unpack(">Q", body[2:10])[0])
            else:
                raise UnreachableError(f"{self._where} refuses the export: reply {kind:#x}")

    def _request(
        self, command: int, offset: int, length: int, data: bytes | memoryview = b""
    ) -> None:
        """Send a request and wait for its reply. Raises `DamagedError` for the server's errors."""
        self._cookie += 1
        header = struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, command, self._cookie, offset, length)
        try:
            self._socket.sendall(header)
            self._socket.sendall(data)
            magic, error, cookie = struct.unpack(">IIQ", self._receive(16))
        except OSError as failure:
            raise UnreachableError(f"{self._where} went away: {failure}") from None
        if magic != _REPLY_MAGIC or cookie != self._cookie:
            raise DamagedError(f"{self._where} sent a malformed reply", code="format")
        if error:
            raise DamagedError(f"{self._where} answers: {os.strerror(error)}", code="io")

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionResetError("the server closed the connection")
            view = view[count:]
        return bytes(data)
