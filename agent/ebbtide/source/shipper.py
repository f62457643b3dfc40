"""Ships the spool of one group to its target: one stream, one cursor, a window in bytes.

Frames go as they lie in the spool. A connection that ends is dialled again for ever; the target
says where to go on. What the target has made durable is released to the tap, which trims.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from ebbtide import _native
from ebbtide.control.meter import Quantiles, Rates
from ebbtide.control.native import NativeThread
from ebbtide.errors import EbbError, RefusedError, UnreachableError, error_from
from ebbtide.rpc import framing
from ebbtide.rpc import replication_pb2 as pb
from ebbtide.rpc.failure import from_rpc
from ebbtide.times import now_us

if TYPE_CHECKING:
    from collections.abc import Callable

    from ebbtide.config import ShipSection
    from ebbtide.control.state import SourceRecord
    from ebbtide.source.tap import Tap

#: Bytes of frames in one message: large enough for the wire, small enough to acknowledge often.
BATCH_BYTES = 1 << 20
#: Seconds between two releases, and between two pings.
RELEASE_S = 0.5
PING_S = 5.0
#: A connection that was refused for a reason only a person can mend is tried this seldom.
REFUSED_S = 15.0
#: Failures of the target's append that mean: its line and ours parted.
PARTED = frozenset(
    {"conflict", "broken-chain", "out-of-order", "below-floor", "seq-reused", "unknown-incarnation"}
)
#: Bytes that fail their checks: where we read them, or where the target took them.
SPOILT = "damaged"


class ShipState(StrEnum):
    CONNECTING = "connecting"
    CATCHING_UP = "catching-up"
    STREAMING = "streaming"
    DISCONNECTED = "disconnected"
    PAUSED = "paused"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    """A batch on its way: what is needed once it is durable."""

    end_bytes: int
    first_time_us: int
    last_time_us: int
    size: int


class ShipRefusedError(RefusedError):
    """The target ended the stream with a reason."""

    def __init__(self, failure: pb.ShipFailure) -> None:
        super().__init__(failure.message, code=failure.code)
        self.retry = failure.retry


class Shipper:
    """`run` is its task. All else is what `status` shows."""

    def __init__(
        self,
        record: SourceRecord,
        *,
        tap: Tap,
        peer: str,
        address: str,
        dial: Callable[[], grpc.aio.Channel],
        config: ShipSection,
        version: str,
        remember: Callable[[], None],
    ) -> None:
        self.peer = peer
        self.address = address
        self.state = ShipState.CONNECTING
        self.detail = ""
        self.received_seq = record.durable_seq
        self.durable_time_us = 0
        self.shipped_bytes = 0
        self.shipped_frames = 0
        self.connected_since_us = 0
        self.connects = 0
        self.rtt_us = 0
        self.notices: list[str] = []
        self.latency = Quantiles()
        self.rates = Rates()
        self._record = record
        self._tap = tap
        self._dial = dial
        self._config = config
        self._version = version
        self._remember = remember
        self._thread = NativeThread(f"ship-{record.name}")
        self._log = structlog.get_logger(group=record.name, peer=peer)
        self._sent: deque[_Sent] = deque()
        self._sent_bytes = 0
        self._durable_bytes = 0
        self._moved = asyncio.Event()
        #: About when the oldest record was written that is not read yet; 0 if all are.
        self._pending_since_us = 0
        self._start: tuple[bytes, int] | None = None
        #: Seq and time of the newest record that the target held when it was last greeted.
        self._target_end = (0, 0)
        self._read_bytes: int | None = None
        self._durable: tuple[bytes, int] | None = None
        self._releasable = asyncio.Event()
        self._window = BATCH_BYTES
        #: The target refused frames for their bytes: the next stream checks what it reads. Else
        #: the target alone does, which it must anyway.
        self._suspicious = False
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._task = asyncio.create_task(self.run(), name=f"ship {self._record.name}")

    async def end(self) -> None:
        """Stop the stream. What was sent and not acknowledged is sent again by the next."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.close()

    # What status shows

    def lag_us(self) -> int:
        """Age of the oldest record that is not durable at the target."""
        since = self._sent[0].first_time_us if self._sent else self._pending_since_us
        if self.lag_writes() == 0 or since == 0:
            return 0
        return max(0, now_us() - since)

    def lag_writes(self) -> int:
        """Records that are not durable at the target."""
        newest = self._tap.end.last_seq if self._tap.end else 0
        if self._tap.status is not None:
            newest = max(newest, self._tap.status.last_seq)
        return max(0, newest - self._record.durable_seq)

    def lag_bytes(self) -> int:
        """Sealed bytes that are not durable at the target: on the wire, and not read yet."""
        if self.lag_writes() == 0:
            return 0
        if self._read_bytes is None:
            # Not connected: the spool holds what is not durable, and up to a segment more.
            return self._tap.end.total_bytes if self._tap.end else 0
        unread = max(0, self._tap.appended_bytes - self._read_bytes)
        return sum(sent.size for sent in self._sent) + unread

    # The task

    async def run(self) -> None:
        """Dial, ship, and dial again, until cancelled."""
        pause = self._config.retry_min_s
        while True:
            began = time.monotonic()
            refused = False
            try:
                await self._connection()
            except ShipRefusedError as error:
                refused = not error.retry
                self._set(ShipState.REFUSED if refused else ShipState.DISCONNECTED, error.message)
                if error.code == SPOILT and not self._suspicious:
                    self._suspicious, refused = True, False
                if error.code in PARTED:
                    refused = not await self._start_anew(error.message)
            except EbbError as error:
                self._set(ShipState.DISCONNECTED, error.message)
                if error.code == SPOILT:
                    # The spool's bytes will not get better: history goes on behind them.
                    self._suspicious = False
                    refused = not await self._start_anew(error.message)
            except grpc.RpcError as error:
                self._set(ShipState.DISCONNECTED, from_rpc(error, self.peer).message)
            except Exception as error:  # noqa: BLE001
                # A defect of ours must not end shipping for good: it is told, and tried again.
                self._log.exception("the stream failed")
                self._set(ShipState.DISCONNECTED, f"internal error: {error}")
            finally:
                self._break()
            if time.monotonic() - began > self._config.retry_max_s:
                pause = self._config.retry_min_s
            wait = REFUSED_S if refused else pause
            await asyncio.sleep(wait * random.uniform(0.8, 1.2))  # noqa: S311 (spreads dials)
            pause = min(pause * 2, self._config.retry_max_s)

    def _set(self, state: ShipState, detail: str = "") -> None:
        if (state, detail) != (self.state, self.detail):
            self._log.info("ship state", state=state.value, detail=detail)
        self.state, self.detail = state, detail

    def _break(self) -> None:
        """Forget the stream; what it carried waits again."""
        if self._sent:
            self._pending_since_us = self._sent[0].first_time_us
        self._sent.clear()
        self._sent_bytes = self._durable_bytes = 0
        self._read_bytes = None
        self.connected_since_us = 0

    async def _connection(self) -> None:
        end = await self._tap.wait_end(None)
        if self.state is not ShipState.DISCONNECTED:
            self._set(ShipState.CONNECTING)
        async with self._dial() as channel:
            # No serializers: what is given is what goes over the wire.
            ship: Any = channel.stream_stream
            call = ship(framing.SHIP_METHOD)()
            try:
                welcome = await self._greet(call, end)
                reader = await self._open(welcome)
                self.connects += 1
                self.connected_since_us = now_us()
                self._set(ShipState.CATCHING_UP)
                await self._until_first_ends(
                    self._send(call, reader),
                    self._receive(call),
                    self._release(),
                    self._ping(channel),
                )
            finally:
                call.cancel()

    @staticmethod
    async def _until_first_ends(*coroutines: Any) -> None:
        tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        # A refusal explains more than the cancelled write beside it.
        errors = [result for result in results if isinstance(result, Exception)]
        errors.sort(key=lambda error: not isinstance(error, ShipRefusedError))
        # grpc.aio ends a read or write on a stream that broke as if the task had been cancelled, or
        # with InvalidStateError.
        if not errors or isinstance(errors[0], asyncio.InvalidStateError):
            raise UnreachableError("the stream broke")
        raise errors[0]

    async def _read(self, call: Any) -> bytes:
        message = await call.read()
        if message is framing.END:
            code = await call.code()
            raise UnreachableError(f"{self.peer} ended the stream: {await call.details() or code}")
        tag = framing.tag_of(message)
        if tag == framing.FAIL:
            raise ShipRefusedError(framing.body_of(message, pb.ShipFailure))
        return bytes(message)

    async def _greet(self, call: Any, end: _native.LogEnd) -> pb.Welcome:
        hello = pb.Hello(
            protocol=framing.PROTOCOL,
            agent_version=self._version,
            group=self._record.group_id,
            generation_counter=self._record.generation_counter,
            generation_site=self._record.generation_site,
            last_seq=end.last_seq,
            last_time_us=end.last_time_us,
        )
        try:
            async with asyncio.timeout(self._config.dead_after_s):
                await call.write(framing.pack(framing.HELLO, hello))
                message = await self._read(call)
        except TimeoutError:
            raise UnreachableError(f"{self.peer} does not answer", code="timeout") from None
        if framing.tag_of(message) != framing.WELCOME:
            raise error_from("format", f"{self.peer} answered {message[:4]!r} to the greeting")
        welcome = framing.body_of(message, pb.Welcome)
        if welcome.protocol != framing.PROTOCOL:
            raise error_from("version", f"{self.peer} speaks protocol {welcome.protocol}")
        return welcome

    async def _open(self, welcome: pb.Welcome) -> _native.LogReader:
        """A reader at the place to go on from, after what the two ends compare."""
        self._target_end = (welcome.last_seq, welcome.last_time_us)
        reader = await self._thread.call(
            _native.LogReader,
            self._record.spool_dir,
            self._record.group_id,
            verify=self._suspicious,
        )
        end = self._tap.end
        parted = await self._parting(welcome, reader)
        if parted and not await self._start_anew(parted):
            # Going on behind a hole would show states that never were.
            raise RefusedError(f"{parted}; all volumes are copied once the tap records again")
        position = self._start
        if position is None and welcome.HasField("resume"):
            position = (welcome.resume.incarnation, welcome.resume.next_frame)
        await self._thread.call(reader.seek, position)
        self._window = max(welcome.window_bytes, BATCH_BYTES)
        self._read_bytes = self._tap.appended_bytes - (end.total_bytes if end else 0)
        # What is durable comes with the first acknowledgement: the welcome also counts what is not.
        return reader

    async def _parting(self, welcome: pb.Welcome, reader: _native.LogReader) -> str:
        """Why what the target holds is not the beginning of what we have; empty if it is."""
        if welcome.last_seq < self._record.durable_seq:
            return (
                f"{self.peer} holds history up to seq {welcome.last_seq}, but had acknowledged "
                f"{self._record.durable_seq}: it lost some"
            )
        if self._start is not None or not welcome.HasField("resume"):
            return ""
        resume = (welcome.resume.incarnation, welcome.resume.next_frame)
        end = await self._tap.wait_end(None)
        if await self._thread.call(reader.agrees, resume, welcome.last_digest, end):
            return ""
        # What we gave numbers to since may differ from what the target holds under the same ones,
        # and what was written in between is not among the regions known to be dirty.
        return (
            f"{self.peer} holds history up to seq {welcome.last_seq} that this source does not "
            "know: it was rolled back, or lost the end of its spool"
        )

    async def _start_anew(self, reason: str) -> bool:
        """The lines parted: a new incarnation in a span that copies everything.

        Returns false if the tap does not do it now.
        """
        self._note(f"{reason}; a new incarnation begins and all volumes are copied again")
        try:
            # Twice: the parent of the second is one of which the target never saw a frame, so that
            # nothing is missing between what it holds and where we go on.
            await self._tap.new_incarnation(*self._target_end)
            await self._tap.new_incarnation(*self._target_end, copy=True)
        except (EbbError, TimeoutError) as error:
            self._log.error("cannot start anew", error=str(error))
            return False
        end = self._tap.end
        if end is not None and end.incarnation is not None:
            self._start = (end.incarnation, 0)
        self._record.durable_seq = 0
        self._remember()
        return True

    def _note(self, text: str) -> None:
        self._log.warning("notice", text=text)
        self.notices = [*self.notices[-19:], text]

    async def _send(self, call: Any, reader: _native.LogReader) -> None:
        while True:
            while self._sent_bytes - self._durable_bytes >= self._window:
                await self._moved.wait()
            end = await self._tap.wait_end(None)
            batch = await self._thread.call(reader.next_batch, end, BATCH_BYTES)
            if batch is None:
                if self._tap.end == end:
                    self._read_bytes = self._tap.appended_bytes
                if self.state is ShipState.CATCHING_UP:
                    self._set(ShipState.STREAMING)
                self._pending_since_us = 0
                newer = await self._tap.wait_end(end)
                self._pending_since_us = newer.last_time_us
                continue
            size = len(batch.message) - framing.TAG_LEN
            self._sent_bytes += size
            self._sent.append(
                _Sent(
                    end_bytes=self._sent_bytes,
                    first_time_us=batch.first_time_us,
                    last_time_us=batch.last_time_us,
                    size=size,
                )
            )
            self._pending_since_us = batch.last_time_us
            self._read_bytes = (self._read_bytes or 0) + size
            if batch.announcement is not None:
                await call.write(batch.announcement)
            await call.write(batch.message)
            self.shipped_bytes += size
            self.shipped_frames += batch.frame_count
            self.rates.sample(self.shipped_bytes)

    async def _receive(self, call: Any) -> None:
        while True:
            message = await self._read(call)
            if framing.tag_of(message) != framing.ACKNOWLEDGE:
                raise error_from("format", f"{self.peer} sent {message[:4]!r}")
            await self._take(framing.body_of(message, pb.Acknowledgement))

    async def _take(self, answer: pb.Acknowledgement) -> None:
        now = now_us()
        self.received_seq = answer.received_seq
        self._durable_bytes = max(self._durable_bytes, answer.durable_bytes)
        while self._sent and self._sent[0].end_bytes <= self._durable_bytes:
            self.latency.add(max(0, now - self._sent.popleft().last_time_us))
        self._acknowledge_seq(answer.durable_seq, answer.durable_time_us)
        if answer.paused:
            self._set(ShipState.PAUSED, f"paused: {answer.paused}")
        elif self.state is ShipState.PAUSED:
            self._set(ShipState.CATCHING_UP)
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()
        if not answer.HasField("durable"):
            return
        self._suspicious = False
        if self._start is not None and answer.durable.incarnation == self._start[0]:
            self._start = None
        position = (answer.durable.incarnation, answer.durable.next_frame)
        self._record.durable_incarnation = position[0].hex()
        self._record.durable_next_frame = position[1]
        self._durable = position
        self._releasable.set()

    async def _release(self) -> None:
        """Tell the tap what it may trim, now and then."""
        while True:
            await self._releasable.wait()
            self._releasable.clear()
            if self._durable is not None:
                self._remember()
                with contextlib.suppress(EbbError):
                    await self._tap.release(*self._durable)
            await asyncio.sleep(RELEASE_S)

    def _acknowledge_seq(self, seq: int, time_us: int) -> None:
        self._record.durable_seq = max(self._record.durable_seq, seq)
        self.durable_time_us = max(self.durable_time_us, time_us)

    async def _ping(self, channel: grpc.aio.Channel) -> None:
        call = channel.unary_unary(
            "/ebbtide.v1.Replication/Ping",
            request_serializer=pb.PingRequest.SerializeToString,
            response_deserializer=pb.PingResult.FromString,
        )
        while True:
            began = time.monotonic()
            await call(pb.PingRequest(sent_us=now_us()), timeout=self._config.dead_after_s)
            self.rtt_us = int((time.monotonic() - began) * 1e6)
            await asyncio.sleep(PING_S)
