"""Finding the write that did it: bisection over the recorded writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ebbtide.errors import InternalError
from ebbtide.rpc import agent_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from ebbtide.cli.client import Client

#: Records that change what a volume holds.
CHANGES = ("write", "zero", "discard", "resync")


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """The first write after which the data is no longer whole."""

    seq: int
    time_us: int
    volume: str
    offset: int
    length: int
    tried: int
    candidates: int


def recorded_writes(
    client: Client, group: str, from_us: int, to_us: int
) -> list[agent_pb2.HistoryRecord]:
    """All records in a stretch of history that change a volume, page by page."""
    found: list[agent_pb2.HistoryRecord] = []
    begin = from_us
    while True:
        request = agent_pb2.PointsRequest(
            group=group, from_us=begin, to_us=to_us, writes=True, limit=10_000
        )
        answer = client.call("Points", request, timeout_s=30.0)
        found += [record for record in answer.records if record.kind in CHANGES]
        if not answer.truncated or not answer.records:
            return found
        begin = answer.records[-1].time_us + 1


def first_bad(
    records: list[agent_pb2.HistoryRecord], is_whole: Callable[[agent_pb2.HistoryRecord], bool]
) -> Culprit:
    """The first record whose point is not whole. Raises `InternalError` unless the first record
    is whole and the last is not: then there is nothing to find between them."""
    if len(records) < 2 or not is_whole(records[0]) or is_whole(records[-1]):
        raise InternalError(
            "the accident is not within the recorded writes that were searched",
            hint="widen the search: 'ebb points GROUP --writes --from TIME --to TIME'",
        )
    good, bad, tried = 0, len(records) - 1, 2
    while bad - good > 1:
        middle = (good + bad) // 2
        tried += 1
        if is_whole(records[middle]):
            good = middle
        else:
            bad = middle
    culprit = records[bad]
    return Culprit(
        seq=culprit.seq,
        time_us=culprit.time_us,
        volume=culprit.volume,
        offset=culprit.offset,
        length=culprit.length,
        tried=tried,
        candidates=len(records),
    )
