"""The groups whose history this agent keeps."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from ebbtide.control.history import GroupLog, find_group
from ebbtide.control.state import TargetRecord
from ebbtide.errors import (
    EbbError,
    NoSpaceError,
    NotFoundError,
    PrivilegeError,
    RefusedError,
    UsageError,
)
from ebbtide.rpc import replication_pb2 as pb
from ebbtide.target.journal import GroupJournal, free_bytes
from ebbtide.target.receiver import check_generation
from ebbtide.times import now_us

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ebbtide import _native
    from ebbtide.config import Config
    from ebbtide.control.state import StateStore
    from ebbtide.security.keys import MasterKey


class TargetGroup:
    """One group: its record, its journal, and the stream that feeds it now."""

    def __init__(self, record: TargetRecord, journal: GroupJournal) -> None:
        self.record = record
        self.journal = journal
        self.connected_since_us = 0
        self._cut: asyncio.Event | None = None
        self._one_stream = asyncio.Lock()

    @asynccontextmanager
    async def intake(self) -> AsyncIterator[asyncio.Event]:
        """Be the one stream of the group; an older one is cut off first.

        The stream ends itself when the event is set. Cancelling its task would leave its peer
        waiting: gRPC says nothing to it then.
        """
        if self._cut is not None:
            self._cut.set()
        cut = self._cut = asyncio.Event()
        async with self._one_stream:
            self.connected_since_us = now_us()
            try:
                yield cut
            finally:
                self.connected_since_us = 0

    async def cut_off(self) -> None:
        """End the stream, if there is one."""
        if self._cut is not None:
            self._cut.set()
        async with self._one_stream:
            self._cut = None


class TargetGroups:
    """All groups of the target role."""

    def __init__(self, *, config: Config, state: StateStore, master: MasterKey) -> None:
        self._config = config
        self._state = state
        self._master = master
        self._groups: dict[str, TargetGroup] = {}
        self._changing = asyncio.Lock()
        self._log = structlog.get_logger()
        self._opening: set[asyncio.Task[None]] = set()

    def all(self) -> list[TargetGroup]:
        return list(self._groups.values())

    def find(self, name: str) -> TargetGroup:
        """A group by name or identity. Raises `NotFoundError`, `UsageError` if ambiguous."""
        return find_group(
            self._groups.values(), name, lambda group: (group.record.group, group.record.name)
        )

    def has(self, name: str) -> bool:
        return any(name in {g.record.name, g.record.group} for g in self._groups.values())

    def of_source(self, group: bytes, peer: str) -> TargetGroup:
        """The group that a source ships. Raises `NotFoundError` also if it is another's."""
        found = self._groups.get(group.hex())
        if found is None or found.record.source_peer != peer:
            raise NotFoundError(
                f"group {group.hex()} of '{peer}' is unknown here",
                code="unknown-group",
                hint="the target forgot it; protect it again",
            )
        return found

    def logs(self) -> list[GroupLog]:
        """The journals, to read history from."""
        return [self._log_of(group) for group in self._groups.values()]

    def _log_of(self, group: TargetGroup) -> GroupLog:
        record, journal = group.record, group.journal

        async def end() -> _native.LogEnd | None:
            return journal.appended

        return GroupLog(
            group=record.group,
            name=record.name,
            directory=record.journal_dir,
            key=lambda: self._master.unwrap(bytes.fromhex(record.wrapped_key), record.group_id),
            end=end,
            failure=lambda: journal.failure,
        )

    async def begin(self) -> None:
        """Open all journals; one that fails does not hinder the others."""
        for record in self._state.value.targets.values():
            await self._open(record)

    async def close(self) -> None:
        """Make durable what came, and let go."""
        for group in self._groups.values():
            await group.cut_off()
            await group.journal.close()

    async def _open(self, record: TargetRecord) -> TargetGroup:
        journal = GroupJournal(record, free_min=self._config.target.journal_free_min)
        group = TargetGroup(record, journal)
        self._groups[record.group] = group
        with contextlib.suppress(EbbError):
            await journal.open()
        return group

    async def promise(self, group: TargetGroup, counter: int, site: int) -> None:
        """Store the promise of a generation before anything of it is taken."""
        record = group.record
        if check_generation(record, counter, site):
            before = (record.promised_counter, record.promised_site)
            record.promised_counter, record.promised_site = counter, site
            try:
                await self._state.save()
            except EbbError:
                record.promised_counter, record.promised_site = before
                raise
        group.journal.promise(counter, site)

    async def offer(self, request: pb.OfferRequest, peer: str) -> pb.OfferResult:
        """Take over a group's key and make its journal."""
        async with self._changing:
            return await self._offer(request, peer)

    async def _offer(self, request: pb.OfferRequest, peer: str) -> pb.OfferResult:
        if len(request.group) != 16 or len(request.key) != 32 or not request.name:
            raise UsageError("an offer needs a group of 16 bytes, a key of 32 and a name")
        journal_dir = Path(self._config.target.journal_dir) / request.group.hex()
        existing = self._groups.get(request.group.hex())
        if existing is not None:
            if existing.record.source_peer != peer:
                raise RefusedError(f"group '{request.name}' belongs to another source")
            return pb.OfferResult(free_bytes=free_bytes(existing.record.journal_dir))
        try:
            journal_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise PrivilegeError(f"{journal_dir} cannot be made: {error.strerror}") from None
        free = free_bytes(str(journal_dir))
        if free < self._config.target.journal_free_min:
            journal_dir.rmdir()
            raise NoSpaceError(
                f"{free} bytes are free for journals, target.journal_free_min is "
                f"{self._config.target.journal_free_min}",
                hint="free space on the target's journal disk, or name another in agent.toml",
            )
        record = TargetRecord(
            group=request.group.hex(),
            name=request.name,
            suite=request.suite,
            wrapped_key=self._master.wrap(request.key, request.group).hex(),
            source_peer=peer,
            journal_dir=str(journal_dir),
            promised_counter=request.generation_counter,
            promised_site=request.generation_site,
        )
        self._state.value.targets[record.group] = record
        try:
            await self._state.save()
        except EbbError:
            del self._state.value.targets[record.group]
            raise
        group = await self._open(record)
        if failure := group.journal.failure:
            await self._forget(group)
            raise failure
        self._log.info("takes history", group=record.name, source=peer)
        return pb.OfferResult(free_bytes=free)

    async def keep(self, record: TargetRecord) -> None:
        """Keep the log of a group that is no longer protected here; the caller saves the state."""
        self._state.value.targets[record.group] = record
        await self._open(record)
        self._log.info("keeps history", group=record.name)

    async def withdraw(self, group: TargetGroup, *, drop: bool, in_use: bool) -> str:
        """The group ends. Its journal stays, or goes if `drop`; returns the directory."""
        async with self._changing:
            record = group.record
            if not drop:
                await group.cut_off()
                return record.journal_dir
            if in_use:
                raise RefusedError(
                    f"views of group '{record.name}' are open",
                    code="in-use",
                    hint="close them first: 'ebb view list'",
                )
            await self._forget(group)
            self._log.info("history dropped", group=record.name)
            return record.journal_dir

    async def _forget(self, group: TargetGroup) -> None:
        """Remove the group and its journal. The record goes first: a crash leaves a directory."""
        record = group.record
        await group.cut_off()
        await group.journal.close()
        del self._groups[record.group]
        del self._state.value.targets[record.group]
        await self._state.save()
        await asyncio.to_thread(shutil.rmtree, record.journal_dir, ignore_errors=True)
