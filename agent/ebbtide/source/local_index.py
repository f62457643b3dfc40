"""Index runs for the spool of a group without a target: there the spool is the history.

The tap seals segments and knows nothing of runs; this agent builds them beside, as a target does
beside its journal. What is not indexed yet costs readers time, not answers.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from ebbtide import _native
from ebbtide.control.native import NativeThread
from ebbtide.errors import EbbError

if TYPE_CHECKING:
    from ebbtide.control.state import SourceRecord
    from ebbtide.source.tap import Tap

#: After a new segment was begun: time for the tap to seal the one before.
SEAL_S = 1.0


class LocalIndex:
    """Indexes the sealed segments of one spool, each time the tap begins a new one."""

    def __init__(self, record: SourceRecord, tap: Tap) -> None:
        #: Why the newest attempt failed, if it did.
        self.error = ""
        self._tap = tap
        self._record = record
        self._thread = NativeThread(f"index-{record.name}")
        self._indexer: _native.Indexer | None = None
        self._task: asyncio.Task[None] | None = None
        self._log = structlog.get_logger(group=record.name)

    def begin(self) -> None:
        """Start the task."""
        self._task = asyncio.create_task(self._run(), name=f"index {self._record.name}")

    async def end(self) -> None:
        """Stop; a run that is half written is thrown away by the next indexer."""
        if self._indexer is not None:
            self._indexer.stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        # Nothing is written into the directory after this.
        await self._thread.call(lambda: None)
        self._thread.close()

    async def _run(self) -> None:
        end: _native.LogEnd | None = None
        while True:
            await self._index()
            open_segment = end.open_segment if end else None
            while (end := await self._tap.wait_end(end)).open_segment == open_segment:
                pass
            await asyncio.sleep(SEAL_S)

    async def _index(self) -> None:
        try:
            if self._indexer is None:
                self._indexer = await self._thread.call(
                    _native.Indexer, self._record.spool_dir, self._record.group_id
                )
            await self._thread.call(self._indexer.index_sealed)
        except EbbError as error:
            # The next segment is the next attempt; views build meanwhile what they miss.
            self.error = error.message
            self._log.warning("history is not indexed", code=error.code, error=error.message)
        else:
            self.error = ""
