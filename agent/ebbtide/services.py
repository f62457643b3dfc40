"""The two gRPC services of an agent: `Agent` for people, `Replication` for other agents."""

# Names and arguments of the methods are those of the services.
# ruff: noqa: ARG002, N802

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any

import grpc

from ebbtide import status
from ebbtide.diagnosis import diagnose
from ebbtide.errors import NotFoundError, RefusedError, UnreachableError, UsageError
from ebbtide.rpc import agent_pb2 as api
from ebbtide.rpc import agent_pb2_grpc, control_pb2
from ebbtide.rpc import replication_pb2 as pb
from ebbtide.rpc.failure import answers, streams
from ebbtide.target import history
from ebbtide.times import now_us

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ebbtide.agent import AgentProcess
    from ebbtide.control.devices import BlockDevices
    from ebbtide.source.groups import Group
    from ebbtide.target.journals import TargetGroup

Context = grpc.aio.ServicerContext[Any, Any]

_METHODS = {
    api.ATTACH_METHOD_UNSPECIFIED: "auto",
    api.ATTACH_METHOD_FUSE_LOOP: "fuse-loop",
    api.ATTACH_METHOD_NBD: "nbd",
}


class AgentService(agent_pb2_grpc.AgentServicer):
    """What `ebb` asks for."""

    def __init__(self, agent: AgentProcess) -> None:
        self._agent = agent

    # Status

    @answers
    async def Status(self, request: api.AgentStatusRequest, context: Context) -> api.AgentStatus:
        return await self._status(request.group)

    @streams
    async def Watch(
        self, request: api.WatchRequest, context: Context
    ) -> AsyncIterator[api.AgentStatus]:
        interval_ms = request.interval_ms or 1000
        if not 100 <= interval_ms <= 60_000:
            raise UsageError("the interval is 100 to 60000 ms")
        while True:
            yield await self._status(request.group)
            await asyncio.sleep(interval_ms / 1000)

    async def _status(self, name: str) -> api.AgentStatus:
        agent = self._agent
        sources = [g for g in agent.sources.all() if _called(g, name)]
        targets = [g for g in agent.targets.all() if _called(g, name)]
        if name and not sources and not targets:
            agent.targets.find(name)
        groups = {g.record.group for g in sources} | {g.record.group for g in targets}
        return api.AgentStatus(
            name=agent.config.agent.name,
            version=agent.version,
            pid=os.getpid(),
            now_us=now_us(),
            started_us=agent.started_us,
            source_role=bool(agent.sources.all()),
            target_role=bool(agent.config.agent.listen),
            sources=[await status.source_group(group) for group in sources],
            targets=[await self._target(group) for group in targets],
            views=[
                await status.view(view)
                for view in agent.views.all()
                if not name or view.record.group in groups
            ],
            fingerprint=agent.identity.certificate.fingerprint,
            listen=agent.listening,
        )

    async def _target(self, group: TargetGroup) -> api.TargetGroup:
        volumes = []
        if group.journal.failure is None:
            manifest = json.loads(await group.journal.manifest_json())
            volumes = [
                control_pb2.VolumeStatus(
                    index=volume["index"], name=volume["name"], size=volume["size"]
                )
                for volume in manifest["volumes"]
            ]
        return status.target_group(group, volumes)

    # Groups

    @answers
    async def Protect(self, request: api.ProtectRequest, context: Context) -> api.SourceGroup:
        return await status.source_group(await self._agent.sources.protect(request))

    @answers
    async def Unprotect(
        self, request: api.UnprotectRequest, context: Context
    ) -> api.UnprotectResult:
        agent = self._agent
        if agent.sources.has(request.group):
            source = agent.sources.find(request.group)
            drop = request.history == api.UnprotectRequest.HISTORY_DROP
            if drop and request.group != source.record.group and agent.targets.has(request.group):
                kept = agent.targets.find(request.group)
                raise UsageError(
                    f"'{request.group}' is a group that is protected here, and a history kept here",
                    hint=f"name one by its identity: {source.record.group} is protected, "
                    f"{kept.record.group} is kept",
                )
            if agent.views.of(source.record.group):
                raise RefusedError(
                    f"views of group '{source.record.name}' are open",
                    code="in-use",
                    hint="close them first: 'ebb view list'",
                )
            return await agent.sources.unprotect(request, keep=agent.targets.keep)
        group = agent.targets.find(request.group)
        if request.history != api.UnprotectRequest.HISTORY_DROP:
            raise RefusedError(
                f"group '{request.group}' is protected elsewhere; this agent keeps its history",
                hint="unprotect it at its source, or drop the history here",
            )
        if group.connected_since_us and not request.force:
            raise RefusedError(
                f"the source of '{request.group}' is connected",
                code="in-use",
                hint="unprotect the group at its source, or use --force",
            )
        directory = await agent.targets.withdraw(
            group, drop=True, in_use=bool(agent.views.of(group.record.group))
        )
        return api.UnprotectResult(dropped=[directory])

    @answers
    async def Bookmark(
        self, request: api.PlaceBookmarkRequest, context: Context
    ) -> control_pb2.BookmarkPlaced:
        group = self._agent.sources.find(request.group)
        return await self._agent.sources.bookmark(group, request.label)

    # Devices

    @answers
    async def Attach(self, request: api.AttachRequest, context: Context) -> api.AttachResult:
        method = _METHODS[request.method]
        views, sources = self._agent.views, self._agent.sources
        if request.WhichOneof("of") == "view":
            view = views.find(request.view)
            chosen = _choose(view.volumes(), request.volume)
            devices = await views.attach(view, chosen, read_only=request.read_only, method=method)
            made = view.devices
        else:
            group = sources.find(request.group)
            names = [volume.name for volume in group.record.volumes]
            chosen = _choose(names, request.volume)
            devices = await sources.attach(
                group, chosen, read_only=request.read_only, method=method
            )
            made = group.devices
        return api.AttachResult(devices=_attached(devices, _method(made)))

    @answers
    async def Detach(self, request: api.DetachRequest, context: Context) -> api.DetachResult:
        views, sources = self._agent.views, self._agent.sources
        if request.WhichOneof("of") == "view":
            view = views.find(request.view)
            chosen = _choose(view.volumes(), request.volume)
            method = _method(view.devices)
            devices = await views.detach(view, chosen)
        else:
            group = sources.find(request.group)
            names = [volume.name for volume in group.record.volumes]
            method = _method(group.devices)
            devices = await sources.detach(group, _choose(names, request.volume))
        return api.DetachResult(devices=_attached(devices, method))

    # History

    @answers
    async def Points(self, request: api.PointsRequest, context: Context) -> api.PointsResult:
        return await history.points(self._agent.find_log(request.group), request)

    @answers
    async def OpenView(self, request: api.OpenViewRequest, context: Context) -> api.View:
        return await status.view(await self._agent.views.open(request))

    @answers
    async def ListViews(
        self, request: api.ListViewsRequest, context: Context
    ) -> api.ListViewsResult:
        agent = self._agent
        chosen = agent.views.all()
        if request.group:
            chosen = agent.views.of(agent.find_log(request.group).group)
        return api.ListViewsResult(views=[await status.view(view) for view in chosen])

    @answers
    async def CloseView(
        self, request: api.CloseViewRequest, context: Context
    ) -> api.CloseViewResult:
        views = self._agent.views
        await views.close(views.find(request.view), force=request.force)
        return api.CloseViewResult()

    @answers
    async def MountView(self, request: api.MountViewRequest, context: Context) -> api.Mount:
        views = self._agent.views
        mounted = await views.mount(
            views.find(request.view),
            request.volume,
            request.directory,
            read_only=request.read_only,
        )
        return api.Mount(**mounted.model_dump())

    @answers
    async def UnmountView(
        self, request: api.UnmountViewRequest, context: Context
    ) -> api.UnmountViewResult:
        views = self._agent.views
        directories = await views.unmount(views.find(request.view), request.directory)
        return api.UnmountViewResult(directories=directories)

    @streams
    async def Restore(
        self, request: api.RestoreRequest, context: Context
    ) -> AsyncIterator[api.RestoreProgress]:
        agent = self._agent
        log = agent.find_log(request.group)
        async for progress in history.restore(log, request, agent.config.target.view_cache_bytes):
            yield progress

    @answers
    async def Diagnose(self, request: api.DiagnoseRequest, context: Context) -> api.DiagnoseResult:
        return await diagnose(self._agent)


class ReplicationService:
    """What other agents ask for. Every caller is a pinned peer."""

    def __init__(self, agent: AgentProcess) -> None:
        self._agent = agent

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Ship moves raw bytes, hence no generated registration."""
        return grpc.method_handlers_generic_handler(
            "ebbtide.v1.Replication",
            {
                "Offer": grpc.unary_unary_rpc_method_handler(
                    self.offer, pb.OfferRequest.FromString, pb.OfferResult.SerializeToString
                ),
                "Withdraw": grpc.unary_unary_rpc_method_handler(
                    self.withdraw,
                    pb.WithdrawRequest.FromString,
                    pb.WithdrawResult.SerializeToString,
                ),
                "Ping": grpc.unary_unary_rpc_method_handler(
                    self.ping, pb.PingRequest.FromString, pb.PingResult.SerializeToString
                ),
                "Ship": grpc.stream_stream_rpc_method_handler(self.ship, None, None),
            },
        )

    def _peer(self, context: Context) -> str:
        """Name of the caller, by the certificate that the connection showed."""
        for certificate in context.auth_context().get("x509_pem_cert") or ():
            return self._agent.peers.identify(bytes(certificate)).name
        raise UnreachableError("the caller showed no certificate", code="untrusted")

    @answers
    async def offer(self, request: pb.OfferRequest, context: Context) -> pb.OfferResult:
        return await self._agent.targets.offer(request, self._peer(context))

    @answers
    async def withdraw(self, request: pb.WithdrawRequest, context: Context) -> pb.WithdrawResult:
        targets = self._agent.targets
        group = targets.of_source(request.group, self._peer(context))
        directory = await targets.withdraw(
            group, drop=request.drop, in_use=bool(self._agent.views.of(group.record.group))
        )
        return pb.WithdrawResult(journal_dir=directory, dropped=request.drop)

    @answers
    async def ping(self, request: pb.PingRequest, context: Context) -> pb.PingResult:
        self._peer(context)
        agent = self._agent
        return pb.PingResult(
            received_us=now_us(), name=agent.config.agent.name, version=agent.version
        )

    @answers
    async def ship(self, _request: Any, context: Context) -> None:
        await self._agent.receiver.ship(self._peer(context), context)


def _called(group: Group | TargetGroup, name: str) -> bool:
    return not name or name in {group.record.name, group.record.group}


def _choose(names: list[str], wanted: str) -> list[str]:
    if not wanted:
        return names
    if wanted not in names:
        raise NotFoundError(
            f"no volume is called '{wanted}'",
            code="unknown-volume",
            hint=f"volumes: {', '.join(names)}",
        )
    return [wanted]


def _method(devices: BlockDevices) -> api.AttachMethod.ValueType:
    nbd = devices.attachment is not None and devices.attachment.method == "nbd"
    return api.ATTACH_METHOD_NBD if nbd else api.ATTACH_METHOD_FUSE_LOOP


def _attached(
    devices: dict[str, str], method: api.AttachMethod.ValueType
) -> list[api.AttachedDevice]:
    return [
        api.AttachedDevice(volume=volume, device=device, method=method)
        for volume, device in devices.items()
    ]
