"""The groups that this agent protects: each a record, a tap, a shipper, block devices."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import structlog

from ebbtide.control.devices import BlockDevices
from ebbtide.control.history import GroupLog
from ebbtide.control.names import SHORT_LEN, check_name
from ebbtide.control.state import SourceRecord, TargetRecord
from ebbtide.errors import (
    EbbError,
    NotFoundError,
    PrivilegeError,
    RefusedError,
    UsageError,
)
from ebbtide.rpc import agent_pb2 as api
from ebbtide.rpc import control_pb2, replication_pb2, replication_pb2_grpc
from ebbtide.rpc.failure import from_rpc
from ebbtide.security.keys import new_group_key
from ebbtide.source.local_index import LocalIndex
from ebbtide.source.shipper import Shipper
from ebbtide.source.tap import Tap
from ebbtide.source.volumes import prepare

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ebbtide.config import Config
    from ebbtide.control.state import Attachment, StateStore
    from ebbtide.rpc.peers import Dialer
    from ebbtide.security.keys import MasterKey

#: How long `unprotect` waits for the rest of history to reach the target.
DRAIN_S = 60.0
#: Deadline of a control call to a peer.
PEER_CALL_S = 10.0
SUITES = {0: 1, 1: 1, 2: 2}


@dataclass(slots=True, kw_only=True)
class Group:
    """One running group. It has a target and a shipper, or it is its own history."""

    record: SourceRecord
    tap: Tap
    devices: BlockDevices
    shipper: Shipper | None
    index: LocalIndex | None

    def begin(self) -> None:
        """Start what feeds on the tap."""
        if self.shipper is not None:
            self.shipper.begin()
        if self.index is not None:
            self.index.begin()

    async def end(self) -> None:
        """Stop what feeds on the tap."""
        if self.shipper is not None:
            await self.shipper.end()
        if self.index is not None:
            await self.index.end()


class SourceGroups:
    """All groups of the source role."""

    def __init__(
        self, *, config: Config, state: StateStore, master: MasterKey, dialer: Dialer, site: int
    ) -> None:
        self._config = config
        self._state = state
        self._master = master
        self._dialer = dialer
        self._site = site
        self._groups: dict[str, Group] = {}
        self._changing = asyncio.Lock()
        self._run_dir = config.agent.state_dir / "run"
        self._log_dir = config.agent.state_dir / "log"
        self._tap_dir = config.agent.state_dir / "tap"
        self._saving: asyncio.Task[None] | None = None
        self._log = structlog.get_logger()

    def all(self) -> list[Group]:
        return list(self._groups.values())

    def find(self, name: str) -> Group:
        """A group by name or identity. Raises `NotFoundError`."""
        for group in self._groups.values():
            if name in {group.record.name, group.record.group}:
                return group
        known = ", ".join(sorted(group.record.name for group in self._groups.values()))
        raise NotFoundError(
            f"this agent protects no group '{name}'",
            code="unknown-group",
            hint=f"it protects: {known or 'none'}",
        )

    def has(self, name: str) -> bool:
        return any(name in {g.record.name, g.record.group} for g in self._groups.values())

    def logs(self) -> list[GroupLog]:
        """The spools that are history themselves: those of groups without a target."""
        return [
            GroupLog(
                group=group.record.group,
                name=group.record.name,
                directory=group.record.spool_dir,
                key=partial(self._unwrap, group.record),
                end=group.tap.end_now,
                failure=lambda: None,
            )
            for group in self._groups.values()
            if not group.record.target_peer
        ]

    def _unwrap(self, record: SourceRecord) -> bytes:
        return self._master.unwrap(bytes.fromhex(record.wrapped_key), record.group_id)

    # Life

    async def begin(self) -> None:
        """Adopt or start what the state names."""
        for record in self._state.value.sources.values():
            group = self._make(record)
            if record.attachment is not None:
                await group.devices.adopt(record.attachment)
            self._run(group)

    async def abandon(self) -> None:
        """End what is ours; taps and holders run on."""
        for group in self._groups.values():
            await group.end()
            await group.tap.abandon()
            await group.devices.abandon()
        if self._saving is not None:
            await asyncio.gather(self._saving, return_exceptions=True)
        if self._groups:
            await self._state.save()

    def _make(self, record: SourceRecord) -> Group:
        short = record.group[:SHORT_LEN]

        async def reattach() -> None:
            await group.devices.join()

        tap = Tap(
            record,
            socket=self._run_dir / f"t-{short}.sock",
            nbd_unix=self._run_dir / f"n-{short}.sock",
            state_dir=self._tap_dir / record.group,
            log=self._log_dir / f"tap-{short}.log",
            unwrap=self._unwrap,
            reattach=reattach,
        )
        group = Group(
            record=record,
            tap=tap,
            devices=BlockDevices(
                name=short,
                server=tap,
                nbd_unix=tap.nbd_unix,
                run_dir=self._run_dir,
                log_dir=self._log_dir,
                config=self._config.attach,
            ),
            shipper=self._shipper(record, tap) if record.target_peer else None,
            index=None if record.target_peer else LocalIndex(record, tap),
        )
        return group

    def _shipper(self, record: SourceRecord, tap: Tap) -> Shipper:
        return Shipper(
            record,
            tap=tap,
            peer=record.target_peer,
            address=self._dialer.address(record.target_peer),
            dial=lambda: self._dialer.dial(record.target_peer),
            config=self._config.ship,
            version=self._dialer.version,
            remember=self._save_soon,
        )

    def _run(self, group: Group) -> None:
        self._groups[group.record.group] = group
        group.tap.begin()
        group.begin()

    def _save_soon(self) -> None:
        """Positions in the state are hints: lost ones are learnt from the target again."""

        async def save() -> None:
            await asyncio.sleep(2.0)
            with contextlib.suppress(EbbError):
                await self._state.save()

        if self._saving is None or self._saving.done():
            self._saving = asyncio.create_task(save(), name="save state")

    # Protect

    async def protect(self, request: api.ProtectRequest) -> Group:
        """Make a group, hand its key to the target, start tap and shipper."""
        async with self._changing:
            return await self._protect(request)

    async def _protect(self, request: api.ProtectRequest) -> Group:
        check_name(request.name, "group")
        if self.has(request.name):
            raise RefusedError(f"a group '{request.name}' exists already", code="exists")
        if request.suite not in SUITES:
            raise UsageError(f"suite {request.suite} is unknown", hint="1 SM4-GCM, 2 AES-256-GCM")
        if request.target_peer:
            self._dialer.address(request.target_peer)
        volumes, made = await asyncio.to_thread(
            prepare, request.volumes, [group.record for group in self._groups.values()]
        )
        group_id = secrets.token_bytes(16)
        key = new_group_key()
        source = self._config.source
        record = SourceRecord(
            group=group_id.hex(),
            name=request.name,
            suite=SUITES[request.suite],
            wrapped_key=self._master.wrap(key, group_id).hex(),
            generation_counter=1,
            generation_site=self._site,
            target_peer=request.target_peer,
            spool_dir=str(Path(request.spool_dir or source.spool_dir) / group_id.hex()),
            spool_bytes_max=request.spool_bytes_max or source.spool_bytes_max,
            cache_bytes=request.cache_bytes or source.cache_bytes,
            frame_delay_ms=request.frame_delay_ms or source.frame_delay_ms,
            nbd_tcp=request.nbd_tcp,
            volumes=volumes,
        )
        offered = False
        group: Group | None = None
        try:
            await asyncio.to_thread(self._make_directories, record)
            if record.target_peer:
                await self._offer(record, key)
                offered = True
            group = self._make(record)
            group.tap.begin()
            await group.tap.until_settled()
            self._state.value.sources[record.group] = record
            await self._state.save()
        except BaseException:
            self._state.value.sources.pop(record.group, None)
            if group is not None:
                with contextlib.suppress(EbbError):
                    await group.tap.stop()
            await self._undo(record, made, offered=offered)
            raise
        self._groups[record.group] = group
        group.begin()
        self._log.info("protected", group=record.name, volumes=len(volumes))
        return group

    def _make_directories(self, record: SourceRecord) -> None:
        for path in (Path(record.spool_dir), self._tap_dir / record.group):
            try:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise PrivilegeError(f"{path} cannot be made: {error.strerror}") from None

    async def _undo(self, record: SourceRecord, made: list[Path], *, offered: bool) -> None:
        """Leave nothing of a group that did not come to be; it has no history yet."""
        if offered:
            with contextlib.suppress(EbbError):
                await self._withdraw(record, drop=True)
        for path in made:
            path.unlink(missing_ok=True)
        for directory in (Path(record.spool_dir), self._tap_dir / record.group):
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    async def _offer(self, record: SourceRecord, key: bytes) -> None:
        async with self._dialer.dial(record.target_peer) as channel:
            stub = replication_pb2_grpc.ReplicationStub(channel)
            try:
                await stub.Offer(
                    replication_pb2.OfferRequest(
                        group=record.group_id,
                        name=record.name,
                        suite=record.suite,
                        key=key,
                        generation_counter=record.generation_counter,
                        generation_site=record.generation_site,
                    ),
                    timeout=PEER_CALL_S,
                )
            except grpc.RpcError as error:
                raise from_rpc(error, f"target '{record.target_peer}'") from None

    async def _withdraw(
        self, record: SourceRecord, *, drop: bool
    ) -> replication_pb2.WithdrawResult:
        async with self._dialer.dial(record.target_peer) as channel:
            stub = replication_pb2_grpc.ReplicationStub(channel)
            try:
                return await stub.Withdraw(
                    replication_pb2.WithdrawRequest(group=record.group_id, drop=drop),
                    timeout=PEER_CALL_S,
                )
            except grpc.RpcError as error:
                raise from_rpc(error, f"target '{record.target_peer}'") from None

    # Unprotect

    async def unprotect(
        self,
        request: api.UnprotectRequest,
        *,
        keep: Callable[[TargetRecord], Awaitable[None]],
    ) -> api.UnprotectResult:
        """Stop a group's tap. History is kept or dropped as asked, never silently.

        `keep` takes over a log that only this host has. No view of the group is open.
        """
        async with self._changing:
            return await self._unprotect(request, keep)

    async def _unprotect(
        self, request: api.UnprotectRequest, keep: Callable[[TargetRecord], Awaitable[None]]
    ) -> api.UnprotectResult:
        group = self.find(request.group)
        record = group.record
        if request.history == api.UnprotectRequest.HISTORY_UNSPECIFIED:
            raise UsageError(
                "it is not said what becomes of the history", hint="keep it, or drop it"
            )
        drop = request.history == api.UnprotectRequest.HISTORY_DROP
        if group.tap.client is not None and not request.force:
            status = await group.tap.refresh()
            if (clients := status.clients - group.devices.clients) > 0:
                raise RefusedError(
                    f"{clients} clients are connected to group '{record.name}'",
                    code="in-use",
                    hint="end them first, or use --force",
                )
        result = api.UnprotectResult()
        # First: a device in use refuses, and then nothing must be gone yet.
        await self.detach(group, [volume.name for volume in record.volumes])
        if drop and record.target_peer:
            try:
                answer = await self._withdraw(record, drop=True)
                result.dropped.append(f"{record.target_peer}:{answer.journal_dir}")
            except EbbError:
                if not request.force:
                    raise
                result.kept.append(f"{record.target_peer}: journal (not reached)")
        await group.tap.stop()
        shipped = await self._drain(group) if record.target_peer and not drop else False
        await group.end()
        if record.target_peer and not drop:
            with contextlib.suppress(EbbError):
                answer = await self._withdraw(record, drop=False)
                result.kept.append(f"{record.target_peer}:{answer.journal_dir}")
        if drop or shipped:
            await asyncio.to_thread(shutil.rmtree, record.spool_dir, ignore_errors=True)
            if drop:
                result.dropped.append(record.spool_dir)
        else:
            result.kept.append(record.spool_dir)
        await asyncio.to_thread(shutil.rmtree, self._tap_dir / record.group, ignore_errors=True)
        del self._groups[record.group]
        del self._state.value.sources[record.group]
        if not record.target_peer and not drop:
            # Its key lives on only in the record.
            await keep(_kept(record))
        await self._state.save()
        self._log.info("unprotected", group=record.name, dropped=drop, shipped=shipped)
        return result

    async def _drain(self, group: Group) -> bool:
        """Wait until the target holds all; false if it does not come to that in time."""
        deadline = time.monotonic() + DRAIN_S
        while group.shipper is not None and time.monotonic() < deadline:
            end = group.tap.end
            if end is None or end.last_seq <= group.record.durable_seq:
                return True
            if group.shipper.connected_since_us == 0:
                return False
            await asyncio.sleep(0.05)
        return False

    # Devices and bookmarks

    async def attach(
        self, group: Group, volumes: list[str], *, read_only: bool, method: str
    ) -> dict[str, str]:
        """Block devices for volumes, remembered."""
        try:
            return await group.devices.attach(volumes, read_only=read_only, method=method)
        finally:
            await self._remember(group, group.devices.attachment)

    async def detach(self, group: Group, volumes: list[str]) -> dict[str, str]:
        """Take block devices away."""
        try:
            return await group.devices.detach(volumes)
        finally:
            await self._remember(group, group.devices.attachment)

    async def _remember(self, group: Group, attachment: Attachment | None) -> None:
        group.record.attachment = attachment.model_copy(deep=True) if attachment else None
        if group.record.group in self._state.value.sources:
            await self._state.save()

    async def bookmark(self, group: Group, label: str) -> control_pb2.BookmarkPlaced:
        """Name the present moment. Raises `UsageError` for an unfit label."""
        if not label or len(label.encode()) > 255:
            raise UsageError("a label has 1 to 255 bytes")
        response = await group.tap.request(
            control_pb2.Request(bookmark=control_pb2.BookmarkRequest(label=label))
        )
        return response.bookmark


def _kept(record: SourceRecord) -> TargetRecord:
    """The record of a group whose only log stays when its tap has gone."""
    return TargetRecord(
        group=record.group,
        name=record.name,
        suite=record.suite,
        wrapped_key=record.wrapped_key,
        source_peer="",
        journal_dir=record.spool_dir,
        promised_counter=record.generation_counter,
        promised_site=record.generation_site,
    )
