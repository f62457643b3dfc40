"""The target's end of Ship: greet, append, acknowledge what is durable."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from ebbtide.errors import EbbError, RefusedError, UsageError
from ebbtide.rpc import framing
from ebbtide.rpc import replication_pb2 as pb

if TYPE_CHECKING:
    from ebbtide import _native
    from ebbtide.control.state import TargetRecord
    from ebbtide.target.journal import GroupJournal
    from ebbtide.target.journals import TargetGroups

#: A source that says nothing after connecting is cut off.
GREETING_S = 10.0
#: A source that does not take its last acknowledgement for this long is not told why it ends.
LAST_WORD_S = 5.0
#: Failures after which a new stream may go well without a hand.
PASSING = frozenset({"poisoned", "io", "no-space", "timeout", "stopping", "unreachable", "locked"})


def position_of(end: _native.LogEnd | None) -> pb.Position | None:
    """The place behind the last frame; None for an empty log."""
    if end is None or end.incarnation is None:
        return None
    return pb.Position(incarnation=end.incarnation, next_frame=end.next_frame)


class Receiver:
    """Serves Ship streams; one a group, a newer one replaces the older."""

    def __init__(self, groups: TargetGroups, window_bytes: int) -> None:
        self._groups = groups
        self._window_bytes = window_bytes
        self._log = structlog.get_logger()

    async def ship(self, peer: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """One stream, to its end."""
        try:
            await self._stream(peer, context)
        except EbbError as error:
            self._log.warning("stream refused", peer=peer, code=error.code, error=error.message)
            counter = site = 0
            if error.code == "fenced" and isinstance(error, _FencedError):
                counter, site = error.counter, error.site
            failure = pb.ShipFailure(
                code=error.code,
                message=error.message,
                retry=error.code in PASSING,
                promised_counter=counter,
                promised_site=site,
            )
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                await context.write(framing.pack(framing.FAIL, failure))

    async def _stream(self, peer: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        try:
            async with asyncio.timeout(GREETING_S):
                message = await context.read()
        except TimeoutError:
            raise UsageError("no greeting came", code="timeout") from None
        if message is framing.END:
            return
        if framing.tag_of(message) != framing.HELLO:
            raise UsageError("the stream does not begin with a greeting", code="format")
        hello = framing.body_of(message, pb.Hello)
        if hello.protocol != framing.PROTOCOL:
            raise UsageError(
                f"this agent speaks protocol {framing.PROTOCOL}, not {hello.protocol}",
                code="version",
            )
        group = self._groups.of_source(hello.group, peer)
        await self._groups.promise(group, hello.generation_counter, hello.generation_site)
        async with group.intake() as cut:
            journal = group.journal
            if journal.failure is not None:
                raise journal.failure
            await journal.settle()
            base = journal.appended_bytes
            # What is appended and not durable may be lost, but it is there: go on behind it.
            end = journal.appended
            await context.write(
                framing.pack(
                    framing.WELCOME,
                    pb.Welcome(
                        protocol=framing.PROTOCOL,
                        resume=position_of(end),
                        last_seq=end.last_seq if end else 0,
                        last_time_us=end.last_time_us if end else 0,
                        last_digest=end.last_digest if end else b"",
                        window_bytes=self._window_bytes,
                    ),
                )
            )
            taking = asyncio.create_task(_take(journal, context))
            acknowledging = asyncio.create_task(_acknowledge(journal, context, base, taking))
            ending = asyncio.create_task(cut.wait())
            tasks = (taking, acknowledging, ending)
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                taking.cancel()
                # A write that is cut off still occupies the stream: what is said last must wait.
                await asyncio.wait((acknowledging,), timeout=LAST_WORD_S)
            finally:
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
            for result in results:
                if isinstance(result, EbbError):
                    raise result
            if cut.is_set():
                raise RefusedError(
                    "the stream was cut off: a newer one came, or the group ends here",
                    code="stopping",
                )


async def _take(journal: GroupJournal, context: Any) -> None:
    while True:
        message = await context.read()
        if message is framing.END:
            return
        match framing.tag_of(message):
            case framing.FRAMES:
                await journal.append(message, framing.TAG_LEN)
            case framing.ANNOUNCE:
                await journal.begin(message[framing.TAG_LEN :])
            case tag:
                raise UsageError(f"a message {tag!r} came on the stream", code="format")


async def _acknowledge(
    journal: GroupJournal, context: Any, base: int, taking: asyncio.Task[None]
) -> None:
    """Say what is durable whenever that changed, and when intake pauses or goes on.

    Ends when `taking` has.
    """
    while not taking.done():
        changed = journal.changed
        if journal.failure is not None:
            raise journal.failure
        received, durable = journal.appended, journal.durable
        await context.write(
            framing.pack(
                framing.ACKNOWLEDGE,
                pb.Acknowledgement(
                    received=position_of(received),
                    received_seq=received.last_seq if received else 0,
                    durable=position_of(durable),
                    durable_seq=durable.last_seq if durable else 0,
                    durable_time_us=durable.last_time_us if durable else 0,
                    paused=journal.paused,
                    received_bytes=max(0, journal.appended_bytes - base),
                    durable_bytes=max(0, journal.durable_bytes - base),
                ),
            )
        )
        waiting = asyncio.create_task(changed.wait())
        try:
            await asyncio.wait((waiting, taking), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()


class _FencedError(RefusedError):
    """The source's generation is older than the one promised."""

    def __init__(self, record: TargetRecord) -> None:
        super().__init__(
            f"generation {record.promised_counter}@{record.promised_site:016x} was promised",
            code="fenced",
            hint="this source is out of date",
        )
        self.counter, self.site = record.promised_counter, record.promised_site


def check_generation(record: TargetRecord, counter: int, site: int) -> bool:
    """Whether a promise must be stored first. Raises if the generation is older."""
    promised = (record.promised_counter, record.promised_site)
    if (counter, site) < promised:
        raise _FencedError(record)
    return (counter, site) > promised
