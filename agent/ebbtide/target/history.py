"""What history holds, and bringing it back: points and restore. Reads a log, never writes."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ebbtide import _native
from ebbtide.control.native import in_thread
from ebbtide.errors import NotFoundError, PrivilegeError, RefusedError, UsageError
from ebbtide.rpc import agent_pb2 as api
from ebbtide.rpc import control_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ebbtide.control.history import GroupLog

RECORDS_DEFAULT = 10_000
RECORDS_MAX = 100_000
#: Seconds between two messages of progress.
PROGRESS_S = 0.25


def _point(pair: tuple[int, int] | None) -> api.Point | None:
    return None if pair is None else api.Point(seq=pair[0], time_us=pair[1])


async def _open(log: GroupLog) -> _native.History:
    """What the log holds now. Raises `EbbError`s."""
    return await in_thread(_native.History, log.directory, log.group_id, await log.end())


async def points(log: GroupLog, request: api.PointsRequest) -> api.PointsResult:
    """Describe the history in a log."""
    history = await _open(log)
    timeline = await in_thread(history.timeline)
    result = api.PointsResult(
        group=log.group_id,
        name=log.name,
        horizon=_point(timeline.oldest),
        newest=_point(timeline.newest),
        last_record=_point(timeline.last_record),
        volumes=[
            control_pb2.VolumeStatus(index=index, name=volume, size=size)
            for index, volume, size in timeline.volumes
        ],
        log_bytes=timeline.log_bytes,
        record_count=timeline.records,
    )
    to_us = request.to_us or (1 << 63)
    for seq, time_us, label, _ in timeline.bookmarks:
        if request.from_us <= time_us <= to_us:
            result.bookmarks.add(seq=seq, time_us=time_us, label=label)
    for seq, first_us, end_us, size, cause in timeline.gaps:
        if end_us >= request.from_us and first_us <= to_us:
            result.gaps.add(
                seq=seq, first_time_us=first_us, end_time_us=end_us, bytes=size, cause=cause
            )
    for first, last, cause in timeline.spans:
        if first[1] <= to_us and (last is None or last[1] >= request.from_us):
            result.spans.add(
                first_seq=first[0],
                first_time_us=first[1],
                end_seq=last[0] if last else 0,
                end_time_us=last[1] if last else 0,
                cause=cause,
            )
    if request.writes:
        await _add_records(history, timeline, request, to_us, result)
    return result


async def _add_records(
    history: _native.History,
    timeline: _native.Timeline,
    request: api.PointsRequest,
    to_us: int,
    result: api.PointsResult,
) -> None:
    names = {index: name for index, name, _ in timeline.volumes}
    wanted: int | None = None
    if request.volume:
        wanted = next((i for i, name in names.items() if name == request.volume), None)
        if wanted is None:
            raise NotFoundError(
                f"no volume '{request.volume}' is in this group", code="unknown-volume"
            )
    if request.limit > RECORDS_MAX:
        raise UsageError(f"at most {RECORDS_MAX} records are listed at once")
    limit = request.limit or RECORDS_DEFAULT
    records = await in_thread(history.records, request.from_us, to_us, wanted, limit + 1)
    result.truncated = len(records) > limit
    for seq, time_us, kind, volume, offset, length, label in records[:limit]:
        result.records.add(
            seq=seq,
            time_us=time_us,
            kind=kind,
            volume="" if volume is None else names.get(volume, str(volume)),
            offset=offset,
            length=length,
            label=label,
        )


def _check_target(wanted: api.RestoreVolume) -> bool:
    """Whether the path exists. Raises what stands against writing there. Blocks."""
    path = Path(wanted.path)
    if not path.is_absolute():
        raise UsageError(f"{path} is not an absolute path")
    try:
        found = path.stat()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise NotFoundError(f"{path.parent} does not exist") from None
        return False
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        raise UsageError(f"{path} is neither a file nor a block device")
    if not wanted.overwrite:
        raise RefusedError(f"{path} exists", code="exists", hint="--force overwrites it")
    if not os.access(path, os.W_OK):
        raise PrivilegeError(f"{path} cannot be written", hint="run the agent as root")
    return True


async def restore(
    log: GroupLog, request: api.RestoreRequest, cache_bytes: int
) -> AsyncIterator[api.RestoreProgress]:
    """Write volumes as of a point. Blocks that are right already are not written again, so that a
    repeated restore goes on where the last one stopped."""
    if not request.volumes:
        raise UsageError("no volume is named to restore")
    for wanted in request.volumes:
        await asyncio.to_thread(_check_target, wanted)
    key = log.key()
    history = await _open(log)
    kind = request.point.WhichOneof("point")
    value = getattr(request.point, kind) if kind else None
    view = await in_thread(
        _native.HistoryView, history, key, kind or "newest", value, request.point.exact, cache_bytes
    )
    sizes = {name: (index, size) for index, name, size in view.volumes}
    for wanted in request.volumes:
        if wanted.volume not in sizes:
            raise NotFoundError(
                f"no volume '{wanted.volume}' is in this group at that point",
                code="unknown-volume",
                hint=f"volumes: {', '.join(sorted(sizes))}",
            )
    total = sum(sizes[wanted.volume][1] for wanted in request.volumes)
    before = 0
    began = time.monotonic()
    progress = api.RestoreProgress(bytes_total=total, seq=view.seq, time_us=view.time_us)
    for wanted in request.volumes:
        index, size = sizes[wanted.volume]
        copy = _native.Restore(view, index, wanted.path)
        work = asyncio.create_task(in_thread(copy.run))
        try:
            while True:
                done, _ = await asyncio.wait((work,), timeout=PROGRESS_S)
                progress.volume = wanted.volume
                progress.bytes_done = before + copy.bytes_done
                elapsed = time.monotonic() - began
                progress.bytes_per_s = int(progress.bytes_done / max(elapsed, 1e-3))
                left = total - progress.bytes_done
                progress.eta_s = left / progress.bytes_per_s if progress.bytes_per_s else -1.0
                yield progress
                if done:
                    work.result()
                    break
        finally:
            copy.cancel()
            await asyncio.gather(work, return_exceptions=True)
        before += size
    progress.bytes_done, progress.eta_s, progress.done = total, 0.0, True
    yield progress
