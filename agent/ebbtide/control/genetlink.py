"""Generic netlink, as far as the kernel's NBD client needs it: requests, answers, one event group.

Blocking, one request at a time. Numbers are those of linux/netlink.h, linux/genetlink.h and
linux/nbd-netlink.h, which are part of the kernel's stable interface.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_NETLINK_GENERIC: Final = 16
_SOL_NETLINK: Final = 270
_ADD_MEMBERSHIP: Final = 1
_MESSAGE_ERROR: Final = 2
_REQUEST_AND_ACK: Final = 1 | 4
_NESTED: Final = 0x8000
_TYPE_MASK: Final = 0x3FFF
_CONTROL: Final = 16
_GET_FAMILY: Final = 3
_FAMILY_ID, _FAMILY_NAME, _FAMILY_GROUPS = 1, 2, 7
_GROUP_NAME, _GROUP_ID = 1, 2
_HEADER: Final = struct.Struct("=IHHII")
_GENERIC: Final = struct.Struct("=BBH")
_ATTRIBUTE: Final = struct.Struct("=HH")
#: Answers of the kernel that we ask for are some hundred bytes.
_RECEIVE_BYTES: Final = 1 << 16
TIMEOUT_S: Final = 30.0


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded."""
    length = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(length, kind) + payload + bytes(-length % 4)


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def u64(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=Q", value))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def nested(kind: int, *attributes: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(attributes))


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and payload of each attribute. Ends at the first malformed one."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size or length > len(data):
            return
        yield kind & _TYPE_MASK, data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and body of each message of a datagram."""
    while len(data) >= _HEADER.size:
        length, kind, _, _, _ = _HEADER.unpack_from(data)
        if length < _HEADER.size or length > len(data):
            return
        yield kind, data[_HEADER.size : length]
        data = data[(length + 3) & ~3 :]


class Family:
    """One generic netlink family. Raises `OSError` of the kernel's answers."""

    def __init__(self, name: str, version: int) -> None:
        self._version = version
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)
        try:
            self._socket.settimeout(TIMEOUT_S)
            self._socket.bind((0, 0))
            answer = self._ask(_CONTROL, 2, _GET_FAMILY, text(_FAMILY_NAME, name))
            self._id = struct.unpack("=H", answer[_FAMILY_ID])[0]
            self._groups = _groups(answer.get(_FAMILY_GROUPS, b""))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Family:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def request(self, command: int, *attributes: bytes) -> dict[int, bytes]:
        """Attributes of the answer; empty if the kernel only says that it did it."""
        return self._ask(self._id, self._version, command, *attributes)

    def subscribe(self, group: str) -> socket.socket:
        """A socket of its own, not blocking, that the events of a group come to."""
        events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)
        try:
            events.setblocking(False)
            events.bind((0, 0))
            events.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, self._groups[group])
        except BaseException:
            events.close()
            raise
        return events

    def _ask(self, kind: int, version: int, command: int, *parts: bytes) -> dict[int, bytes]:
        body = _GENERIC.pack(command, version, 0) + b"".join(parts)
        length = _HEADER.size + len(body)
        self._socket.send(_HEADER.pack(length, kind, _REQUEST_AND_ACK, 0, 0) + body)
        answer: dict[int, bytes] = {}
        while True:
            for found, data in messages(self._socket.recv(_RECEIVE_BYTES)):
                if found == kind:
                    answer = dict(attributes(data[_GENERIC.size :]))
                elif found == _MESSAGE_ERROR:
                    (code,) = struct.unpack_from("=i", data)
                    if code:
                        raise OSError(-code, os.strerror(-code))
                    return answer


def event(data: bytes) -> Iterator[tuple[int, dict[int, bytes]]]:
    """Command and attributes of each event of a datagram."""
    for _, body in messages(data):
        if len(body) >= _GENERIC.size:
            command, _, _ = _GENERIC.unpack_from(body)
            yield command, dict(attributes(body[_GENERIC.size :]))


def _groups(data: bytes) -> dict[str, int]:
    found = {}
    for _, item in attributes(data):
        parts = dict(attributes(item))
        name = parts[_GROUP_NAME].rstrip(b"\0").decode()
        (found[name],) = struct.unpack("=I", parts[_GROUP_ID])
    return found
