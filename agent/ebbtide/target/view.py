"""One open view: its supervised server process, its block devices, its mounts."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from ebbtide.control.supervisor import Supervisor
from ebbtide.errors import EbbError
from ebbtide.rpc import control_pb2 as pb
from ebbtide.times import now_us

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from ebbtide.control.client import ControlClient
    from ebbtide.control.history import GroupLog
    from ebbtide.control.state import ViewRecord
    from ebbtide.rpc import agent_pb2 as api


class ViewServer(Supervisor):
    """The process of one view. Started again, it shows the same point with the same overlay."""

    module = "ebbtide.target.view_server"

    def __init__(
        self,
        record: ViewRecord,
        log: GroupLog,
        *,
        socket: Path,
        nbd_unix: Path,
        log_file: Path,
        cache_bytes: int,
        reattach: Callable[[], Awaitable[None]],
        point: api.PointSpec | None = None,
    ) -> None:
        super().__init__(name=f"view {record.view}", socket=socket, log=log_file)
        self.nbd_unix = nbd_unix
        self.status: pb.ViewStatus | None = None
        self._record = record
        self._group_log = log
        self._cache_bytes = cache_bytes
        self._reattach = reattach
        self._point = point
        self._began = time.monotonic()

    async def launch_message(self) -> bytes:
        record, log = self._record, self._group_log
        # Before the launch looks at the directory: what is written up to here must be seen.
        end = await log.end()
        launch = pb.ViewLaunch(
            group=log.group_id,
            group_name=log.name,
            key=log.key(),
            log_dir=log.directory,
            overlay_dir=record.overlay_dir,
            overlay_bytes_max=record.overlay_bytes_max,
            cache_bytes=self._cache_bytes,
            control_socket=str(self.socket),
            nbd_unix=str(self.nbd_unix),
            nbd_tcp=record.nbd_tcp,
        )
        if end is not None and end.incarnation is not None:
            launch.end.ParseFromString(end.to_proto())
        if record.seq:
            launch.at_seq = record.seq
        elif self._point is not None:
            launch.exact = self._point.exact
            match self._point.WhichOneof("point"):
                case "at_time_us":
                    launch.at_time_us = self._point.at_time_us
                case "at_seq":
                    launch.at_seq = self._point.at_seq
                case "bookmark":
                    launch.bookmark = self._point.bookmark
                case _:
                    pass
        return launch.SerializeToString()

    async def adopted(self, client: ControlClient) -> int:
        response = await client.request(pb.Request(status=pb.StatusRequest()))
        status = response.view_status
        self.status = status
        if not self._record.opened_us:
            self._record.seq, self._record.time_us = status.seq, status.time_us
            self._record.opened_us = now_us()
            self._record.open_took_us = int((time.monotonic() - self._began) * 1e6)
        return status.pid

    async def serving(self, client: ControlClient) -> None:  # noqa: ARG002 (of the base class)
        await self._reattach()

    async def refresh(self) -> pb.ViewStatus | None:
        """The status now; the last one known while the process is away."""
        with contextlib.suppress(EbbError):
            response = await self.request(pb.Request(status=pb.StatusRequest()))
            self.status = response.view_status
        return self.status
