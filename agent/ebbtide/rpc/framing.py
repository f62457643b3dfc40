"""Messages of the Ship stream: a 4-byte tag and a body. See `proto/ebbtide/v1/replication.proto`.

A message with frames is made and taken apart without copying them once more than the wire needs:
the native reader makes it whole, the native journal is told how many bytes to skip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import grpc
from google.protobuf.message import DecodeError

from ebbtide.errors import DamagedError

if TYPE_CHECKING:
    from google.protobuf.message import Message

M = TypeVar("M", bound="Message")

PROTOCOL: Final = 1
TAG_LEN: Final = 4
SEGMENT_HEADER_LEN: Final = 256

HELLO: Final = b"HELO"
WELCOME: Final = b"WELC"
ANNOUNCE: Final = b"INCA"
FRAMES: Final = b"FRAM"
ACKNOWLEDGE: Final = b"ACKN"
FAIL: Final = b"FAIL"

#: What a read returns at the end of a stream (the stubs of grpc do not know it).
END: Final[object] = grpc.aio.EOF  # type: ignore[attr-defined]

SHIP_METHOD: Final = "/ebbtide.v1.Replication/Ship"


def pack(tag: bytes, body: Message) -> bytes:
    """A message with a protobuf body."""
    return tag + body.SerializeToString()


def tag_of(message: bytes) -> bytes:
    """The tag of a message. Raises `DamagedError` for one that has none."""
    if len(message) < TAG_LEN:
        raise DamagedError(f"a message of {len(message)} bytes came", code="format")
    return message[:TAG_LEN]


def body_of(message: bytes, kind: type[M]) -> M:
    """The protobuf behind the tag. Raises `DamagedError` if it is none."""
    try:
        return kind.FromString(message[TAG_LEN:])
    except DecodeError:
        raise DamagedError(
            f"a message {message[:TAG_LEN]!r} came that is no {kind.DESCRIPTOR.name}",
            code="format",
        ) from None
