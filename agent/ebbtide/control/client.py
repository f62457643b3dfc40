"""Client of a server process's control socket: one request, one response, in order; and events.

Messages are `ebbtide.v1.Request` and `Response`, each behind its length (u32, little-endian).
"""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING, cast

from ebbtide.errors import EbbError, UnreachableError, error_from
from ebbtide.rpc import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: Largest message either side may send.
MESSAGE_BYTES_MAX = 1 << 20
#: An answer that takes longer means that the process hangs.
ANSWER_S = 10.0

_LENGTH = struct.Struct("<I")


def frame(message: bytes) -> bytes:
    """The bytes that carry `message` on the socket."""
    return _LENGTH.pack(len(message)) + message


def failure_of(response: pb.Response) -> EbbError | None:
    """The error that a response names, if it is one."""
    if response.WhichOneof("result") != "failure":
        return None
    failure = response.failure
    return error_from(failure.code, failure.message, failure.hint, kind=failure.exit_code)


class _Stream(asyncio.Protocol):
    """Cuts the byte stream into messages."""

    def __init__(self, owner: ControlClient) -> None:
        self._owner = owner
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._owner.connected(transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MESSAGE_BYTES_MAX:
                self._owner.break_off(f"a message of {length} bytes is over the limit")
                return
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            self._owner.receive(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]

    def connection_lost(self, error: Exception | None) -> None:
        self._owner.break_off(f"the connection ended{f': {error}' if error else ''}")


class ControlClient:
    """One connection. `closed` is set when it ended, for whatever reason."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.closed = asyncio.Event()
        self.on_event: Callable[[pb.Response], None] = lambda _event: None
        self._transport: asyncio.Transport | None = None
        self._next_id = 1
        self._waiting: dict[int, asyncio.Future[pb.Response]] = {}

    @classmethod
    async def connect(cls, path: Path, *, timeout_s: float = 2.0) -> ControlClient:
        """Raises `UnreachableError` if nobody listens there."""
        client = cls(path)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                await loop.create_unix_connection(lambda: _Stream(client), str(path))
        except (OSError, TimeoutError) as error:
            client.close()
            raise UnreachableError(f"nobody answers on {path}: {error}") from None
        except asyncio.CancelledError:
            # The connection may stand already.
            client.close()
            raise
        return client

    def connected(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport; called once, as soon as it is there."""
        # A stream socket has one of these; uvloop's do not say so by their class.
        self._transport = cast("asyncio.Transport", transport)

    async def request(self, message: pb.Request, *, timeout_s: float = ANSWER_S) -> pb.Response:
        """Send one request. Raises the error that the process answers, or `UnreachableError`."""
        if self._transport is None or self.closed.is_set():
            raise UnreachableError(f"the process behind {self.path.name} is gone")
        message.id, self._next_id = self._next_id, self._next_id + 1
        answer: asyncio.Future[pb.Response] = asyncio.get_running_loop().create_future()
        self._waiting[message.id] = answer
        try:
            self._transport.write(frame(message.SerializeToString()))
            async with asyncio.timeout(timeout_s):
                response = await answer
        except TimeoutError:
            raise UnreachableError(
                f"the process behind {self.path.name} does not answer", code="timeout"
            ) from None
        finally:
            self._waiting.pop(message.id, None)
        if error := failure_of(response):
            raise error
        return response

    def receive(self, message: bytes) -> None:
        """Hand a message to whoever waits for it."""
        try:
            response = pb.Response.FromString(message)
        except Exception as error:  # noqa: BLE001 (protobuf's decoder has no public base class)
            self.break_off(f"an unreadable message came: {error}")
            return
        if response.id == 0:
            self.on_event(response)
            return
        answer = self._waiting.get(response.id)
        if answer is not None and not answer.done():
            answer.set_result(response)

    def break_off(self, reason: str) -> None:
        """End the connection; everyone who waits gets an error."""
        self.closed.set()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(UnreachableError(f"{self.path.name}: {reason}"))
        self.close()

    def close(self) -> None:
        """Close without waiting."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None
        self.closed.set()
