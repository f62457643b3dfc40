"""NBD's fixed newstyle handshake over a unix socket, for connections of the kernel's client.

Asks for nothing but the export: the kernel knows simple replies only.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ebbtide.errors import DamagedError, UnreachableError

if TYPE_CHECKING:
    from pathlib import Path

_GREETING: Final = struct.pack(">QQ", 0x4E42444D41474943, 0x49484156454F5054)
_OPTION_MAGIC: Final = 0x49484156454F5054
_OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
_FIXED_NO_ZEROES: Final = 3
_OPT_GO: Final = 7
_REP_ACK, _REP_INFO = 1, 3
_INFO_EXPORT: Final = 0
#: Longest answer to one option that is taken.
_REPLY_BYTES_MAX: Final = 1 << 16
TIMEOUT_S: Final = 10.0

CAN_MULTI_CONN: Final = 1 << 8
READ_ONLY: Final = 1 << 1


@dataclass(frozen=True, slots=True)
class Connection:
    """A connection in the transmission phase."""

    socket: socket.socket
    size: int
    flags: int


def connect(path: Path, export: str) -> Connection:
    """Connect and choose an export. Blocks. Raises `UnreachableError`, `DamagedError`."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        channel.settimeout(TIMEOUT_S)
        channel.connect(str(path))
        size, flags = _negotiate(channel, export.encode())
        channel.settimeout(None)
    except OSError as error:
        channel.close()
        raise UnreachableError(f"{path} does not answer: {error}") from None
    except BaseException:
        channel.close()
        raise
    return Connection(channel, size, flags)


def _negotiate(channel: socket.socket, export: bytes) -> tuple[int, int]:
    greeting = _receive(channel, 18)
    if greeting[:16] != _GREETING or not greeting[17] & 1:
        raise DamagedError("the server does not speak fixed newstyle NBD")
    go = struct.pack(">I", len(export)) + export + struct.pack(">H", 0)
    channel.sendall(
        struct.pack(">I", _FIXED_NO_ZEROES)
        + struct.pack(">QII", _OPTION_MAGIC, _OPT_GO, len(go))
        + go
    )
    found: tuple[int, int] | None = None
    while True:
        magic, _, reply, length = struct.unpack(">QIII", _receive(channel, 20))
        if magic != _OPTION_REPLY_MAGIC or length > _REPLY_BYTES_MAX:
            raise DamagedError("the server's answer to NBD_OPT_GO is malformed")
        data = _receive(channel, length)
        if reply == _REP_ACK and found is not None:
            return found
        if reply == _REP_INFO:
            if data[:2] == struct.pack(">H", _INFO_EXPORT):
                _, size, flags = struct.unpack(">HQH", data)
                found = size, flags
        else:
            raise UnreachableError(f"the server refuses the export '{export.decode()}': {reply:#x}")


def _receive(channel: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = channel.recv(length - len(data))
        if not piece:
            raise ConnectionResetError("the server closed the connection")
        data += piece
    return data
