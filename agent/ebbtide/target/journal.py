"""The journal of one group: one thread appends, another makes durable what came meanwhile.

A full disk is not an error here: the batch waits and is tried again, nothing is acknowledged, and
`paused` says why. After any other failed write or sync the journal is opened anew, which recovers
it; whoever waited is told to come again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING, TypeVar

import structlog

from ebbtide import _native
from ebbtide.control.meter import Rates
from ebbtide.control.native import NativeThread
from ebbtide.errors import EbbError, NoSpaceError, UnreachableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ebbtide.control.state import TargetRecord

T = TypeVar("T")

#: Seconds between two attempts while the disk is full, and while the journal does not open.
RETRY_S = 1.0
#: Free space is asked for again after this many appended bytes, or this many seconds.
SPACE_CHECK_BYTES = 16 << 20
SPACE_CHECK_S = 1.0


def free_bytes(path: str) -> int:
    """Bytes that we may still use on the disk of `path`."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


class GroupJournal:
    """`appended` and `durable` are ends of the log; `changed` wakes who waits for either."""

    def __init__(self, record: TargetRecord, *, free_min: int) -> None:
        self.record = record
        self.appended: _native.LogEnd | None = None
        self.durable: _native.LogEnd | None = None
        #: Bytes of frames taken since the agent started, and how many of them are durable.
        self.appended_bytes = 0
        self.durable_bytes = 0
        self.paused = ""
        self.failure: EbbError | None = None
        self.notices: list[str] = []
        self.rates = Rates()
        self._journal: _native.Journal | None = None
        self._appender = NativeThread(f"append-{record.name}")
        self._syncer = NativeThread(f"sync-{record.name}")
        self._free_min = free_min
        self._checked_at = 0.0
        self._checked_bytes = 0
        self._to_sync = asyncio.Event()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._broken = False
        self._log = structlog.get_logger(group=record.name)

    async def open(self) -> None:
        """Open and recover. Raises the failure, which `failure` keeps too."""
        try:
            journal = await self._appender.call(
                _native.Journal, self.record.journal_dir, self.record.group_id
            )
        except EbbError as error:
            self.failure = error
            self._log.error("journal does not open", code=error.code, error=error.message)
            raise
        journal.promise(self.record.promised_counter, self.record.promised_site)
        self._journal = journal
        self._broken = False
        self.failure = None
        self.notices = [*self.notices[-19:], *journal.notices]
        # Recovery has made durable what it found.
        self.appended = self.durable = journal.end()
        self.durable_bytes = self.appended_bytes
        if self._task is None:
            self._task = asyncio.create_task(self._sync_loop(), name=f"sync {self.record.name}")
        self._tell()

    async def close(self) -> None:
        """Make durable what was appended, and let go of the directory."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        journal, self._journal = self._journal, None
        if journal is not None:
            with contextlib.suppress(EbbError):
                handle = await self._syncer.call(journal.sync_handle)
                await self._syncer.call(handle.sync)
            await self._appender.call(journal.close)
        self._appender.close()
        self._syncer.close()

    async def settle(self) -> None:
        """Let an append that a cut-off stream left running end, and take note of it."""
        if self._journal is not None and not self._broken:
            self.appended = await self._appender.call(self._journal.end)
            self._to_sync.set()

    def promise(self, counter: int, site: int) -> None:
        """Refuse older generations from now on; the record has been stored."""
        if self._journal is not None:
            self._journal.promise(counter, site)

    async def manifest_json(self) -> str:
        """The manifest with the events of the open segment."""
        return await self._appender.call(self._ready().manifest_json)

    async def begin(self, header: bytes) -> None:
        """Announce an incarnation."""
        await self._guarded(lambda: self._ready().begin(header))

    async def append(self, message: bytes, skip: int) -> None:
        """Append the frames of a message; waits while there is no room."""
        while True:
            if not self._has_room():
                await self._pause()
                continue
            try:
                end = await self._guarded(lambda: self._ready().append(message, skip))
            except NoSpaceError:
                await self._pause()
                continue
            break
        if self.paused:
            self.paused = ""
            self._log.info("goes on")
            self._tell()
        self.appended = end
        self.appended_bytes += len(message) - skip
        self.rates.sample(self.appended_bytes)
        self._to_sync.set()

    @property
    def changed(self) -> asyncio.Event:
        """Is set at the next change; ask for it before looking at the state."""
        return self._changed

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _ready(self) -> _native.Journal:
        if self._journal is None or self._broken:
            raise self.failure or UnreachableError("the journal is not open", code="poisoned")
        return self._journal

    def _has_room(self) -> bool:
        now = time.monotonic()
        due = (
            self.paused
            or now - self._checked_at > SPACE_CHECK_S
            or self.appended_bytes - self._checked_bytes > SPACE_CHECK_BYTES
        )
        if not due:
            return True
        self._checked_at, self._checked_bytes = now, self.appended_bytes
        return free_bytes(self.record.journal_dir) >= self._free_min

    async def _pause(self) -> None:
        if not self.paused:
            self.paused = "no space"
            self._log.warning("paused: no space", directory=self.record.journal_dir)
            self._tell()
        await asyncio.sleep(RETRY_S)

    async def _guarded(self, work: Callable[[], T]) -> T:
        """Run on the append thread; a failed write makes the journal unusable until reopened."""
        try:
            return await self._appender.call(work)
        except EbbError as error:
            if error.code in {"io", "poisoned", "internal"}:
                self._break(error)
            raise

    def _break(self, error: EbbError) -> None:
        if not self._broken:
            self._broken = True
            self.failure = error
            self._log.error("journal failed", code=error.code, error=error.message)
            self._to_sync.set()
            self._tell()

    async def _sync_loop(self) -> None:
        while True:
            await self._to_sync.wait()
            self._to_sync.clear()
            if self._broken or self._journal is None:
                await self._reopen()
                continue
            journal = self._journal
            taken = self.appended_bytes
            try:
                handle = await self._syncer.call(journal.sync_handle)
                await self._syncer.call(handle.sync)
            except EbbError as error:
                self._break(error)
                await self._reopen()
                continue
            self.durable = handle.end
            self.durable_bytes = taken
            self._tell()

    async def _reopen(self) -> None:
        """What was appended and not durable may be gone: recover, and be sent it again."""
        journal, self._journal = self._journal, None
        if journal is not None:
            await self._appender.call(journal.close)
        while True:
            await asyncio.sleep(RETRY_S)
            with contextlib.suppress(EbbError):
                await self.open()
                return
