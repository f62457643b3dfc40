"""What status says of the lag is the age of the oldest record that is not durable at the target."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

from ebbtide.config import ShipSection
from ebbtide.rpc import replication_pb2 as pb
from ebbtide.source.shipper import Shipper


class FakeTap:
    """Publishes ends that a test gives it, each with one record."""

    status = None
    appended_bytes = 0

    def __init__(self) -> None:
        self.end: Any = None
        self._moved = asyncio.Event()

    def publish(self, time_us: int) -> None:
        seq = self.end.last_seq + 1 if self.end else 1
        self.end = SimpleNamespace(last_seq=seq, last_time_us=time_us, total_bytes=0)
        self._moved.set()
        self._moved = asyncio.Event()

    async def wait_end(self, seen: Any) -> Any:
        while self.end is None or self.end is seen:
            await self._moved.wait()
        return self.end


class FakeReader:
    """Reads each end once, as one batch, while `hold` is set."""

    def __init__(self) -> None:
        self._read: Any = None
        self.hold = threading.Event()
        self.hold.set()

    def next_batch(self, end: Any, max_bytes: int) -> Any:
        assert self.hold.wait(10)
        if end is self._read:
            return None
        self._read = end
        return SimpleNamespace(
            message=b"FRAM" + bytes(min(100, max_bytes)),
            announcement=None,
            first_time_us=end.last_time_us,
            last_time_us=end.last_time_us,
            frame_count=1,
        )


class FakeCall:
    async def write(self, message: bytes) -> None:
        pass


async def settle() -> None:
    await asyncio.sleep(0.05)


async def test_lag_counts_from_what_is_not_durable_also_when_something_was_always_in_flight() -> (
    None
):
    tap: Any = FakeTap()
    record: Any = SimpleNamespace(name="ward", durable_seq=0, group_id=b"", spool_dir="")
    shipper = Shipper(
        record,
        tap=tap,
        peer="refuge",
        address="",
        dial=lambda: None,  # type: ignore[arg-type,return-value]
        config=ShipSection(),
        version="",
        remember=lambda: None,
    )
    reader: Any = FakeReader()
    sending = asyncio.create_task(shipper._send(FakeCall(), reader))
    # The next one always comes before the last is acknowledged.
    for number, time_us in enumerate((1_000, 2_000, 3_000), 1):
        tap.publish(time_us)
        await settle()
        await shipper._take(
            pb.Acknowledgement(
                durable_bytes=100 * (number - 1), durable_seq=number - 1, received_seq=number
            )
        )
    assert shipper._sent[0].first_time_us == 3_000
    await shipper._take(pb.Acknowledgement(durable_bytes=300, durable_seq=3, received_seq=3))
    assert shipper.lag_us() == 0
    # Written, not read yet: it is this one whose age counts.
    reader.hold.clear()
    tap.publish(4_000)
    await settle()
    assert shipper._pending_since_us == 4_000
    assert shipper.lag_us() > 0
    reader.hold.set()
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    await shipper.end()
