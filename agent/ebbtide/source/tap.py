"""The tap server of one group, as the agent sees it: supervised, subscribed to, asked."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from ebbtide import _native
from ebbtide.control.meter import Rates
from ebbtide.control.supervisor import Supervisor
from ebbtide.errors import EbbError
from ebbtide.rpc import control_pb2 as pb
from ebbtide.times import now_us

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from ebbtide.control.client import ControlClient
    from ebbtide.control.state import SourceRecord

#: Seconds between two samples of the tap's counters, for rates.
SAMPLE_S = 1.0


class Tap(Supervisor):
    """Publishes the committed end of the spool, `end`, and wakes who waits for it."""

    module = "ebbtide.source.tap_server"

    def __init__(
        self,
        record: SourceRecord,
        *,
        socket: Path,
        nbd_unix: Path,
        state_dir: Path,
        log: Path,
        unwrap: Callable[[SourceRecord], bytes],
        reattach: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(name=f"tap of {record.name}", socket=socket, log=log)
        self.nbd_unix = nbd_unix
        self.end: _native.LogEnd | None = None
        self.status: pb.TapStatus | None = None
        self.status_at_us = 0
        #: Of writes, write_bytes, reads, read_bytes, frame_bytes.
        self.rates = Rates()
        self._record = record
        self._state_dir = state_dir
        self._unwrap = unwrap
        self._reattach = reattach
        self._moved = asyncio.Event()
        self._sampler: asyncio.Task[None] | None = None
        self._trimmed_bytes = 0

    async def launch_message(self) -> bytes:
        record = self._record
        return pb.TapLaunch(
            group=record.group_id,
            group_name=record.name,
            generation_counter=record.generation_counter,
            generation_site=record.generation_site,
            suite=record.suite,
            key=self._unwrap(record),
            volumes=[
                pb.TapVolume(index=volume.index, name=volume.name, backing=volume.backing)
                for volume in record.volumes
            ],
            spool_dir=record.spool_dir,
            state_dir=str(self._state_dir),
            control_socket=str(self.socket),
            nbd_unix=str(self.nbd_unix),
            nbd_tcp=record.nbd_tcp,
            spool_bytes_max=record.spool_bytes_max,
            cache_bytes=record.cache_bytes,
            frame_delay_ms=record.frame_delay_ms,
            kept=not record.target_peer,
        ).SerializeToString()

    async def adopted(self, client: ControlClient) -> int:
        client.on_event = self._event
        response = await client.request(pb.Request(status=pb.StatusRequest()))
        self._take(response.tap_status)
        return response.tap_status.pid

    async def serving(self, client: ControlClient) -> None:
        response = await client.request(pb.Request(subscribe=pb.SubscribeRequest()))
        self._publish(response.log_end)
        if self._sampler is None:
            self._sampler = asyncio.create_task(self._sample(), name=f"sample {self.name}")
        await self._reattach()

    def lost(self) -> None:
        if self._sampler is not None:
            self._sampler.cancel()
            self._sampler = None

    async def refresh(self) -> pb.TapStatus:
        """Ask for the status now. Raises `UnreachableError` while the tap does not serve."""
        response = await self.request(pb.Request(status=pb.StatusRequest()))
        self._take(response.tap_status)
        return response.tap_status

    @property
    def appended_bytes(self) -> int:
        """Sealed bytes that ever were in the spool, as far as this agent saw; it only grows."""
        return self._trimmed_bytes + (self.end.total_bytes if self.end else 0)

    async def end_now(self) -> _native.LogEnd | None:
        """The end as the tap says now; the last one heard of while it does not serve."""
        with contextlib.suppress(EbbError):
            status = await self.refresh()
            return _native.LogEnd.from_proto(status.log_end.SerializeToString())
        return self.end

    async def wait_end(self, seen: _native.LogEnd | None) -> _native.LogEnd:
        """Wait until the end of the spool is known and is not `seen`."""
        while self.end is None or self.end == seen:
            await self._moved.wait()
        return self.end

    async def release(self, incarnation: bytes, next_frame: int) -> None:
        """Everything before the position is durable at the target."""
        await self.request(
            pb.Request(release=pb.ReleaseRequest(incarnation=incarnation, next_frame=next_frame))
        )

    async def new_incarnation(
        self, above_seq: int, above_time_us: int, *, copy: bool = False
    ) -> None:
        """Start an incarnation whose numbers lie above; returns when its first frame is there.

        `copy`: it begins with a span in which all volumes are copied.
        """
        before = self.end
        await self.request(
            pb.Request(
                new_incarnation=pb.NewIncarnationRequest(
                    above_seq=above_seq, above_time_us=above_time_us, copy=copy
                )
            ),
            timeout_s=30.0,
        )
        async with asyncio.timeout(10):
            while (end := await self.wait_end(before)).incarnation == (
                before.incarnation if before else None
            ):
                before = end

    def _event(self, event: pb.Response) -> None:
        if event.WhichOneof("result") == "log_end":
            self._publish(event.log_end)

    def _publish(self, message: pb.LogEnd) -> None:
        before = self.end.total_bytes if self.end else 0
        self.end = _native.LogEnd.from_proto(message.SerializeToString())
        self._trimmed_bytes += max(0, before - self.end.total_bytes)
        # Whoever waits holds the old event, so that nobody has to clear it.
        self._moved.set()
        self._moved = asyncio.Event()

    def _take(self, status: pb.TapStatus) -> None:
        self.status = status
        self.status_at_us = now_us()
        self.rates.sample(
            status.writes,
            status.write_bytes,
            status.reads,
            status.read_bytes,
            status.frame_bytes,
        )

    async def _sample(self) -> None:
        while True:
            began = time.monotonic()
            try:
                await self.refresh()
            except EbbError:
                return
            await asyncio.sleep(max(0.0, SAMPLE_S - (time.monotonic() - began)))
