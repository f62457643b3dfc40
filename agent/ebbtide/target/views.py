"""The open views of an agent: opened, found again after a restart, mounted, closed."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from ebbtide.control import devices
from ebbtide.control.devices import BlockDevices
from ebbtide.control.names import check_name, short_of
from ebbtide.control.state import ViewRecord
from ebbtide.errors import EbbError, NotFoundError, PrivilegeError, RefusedError, UsageError
from ebbtide.target.view import ViewServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from ebbtide.config import Config
    from ebbtide.control.history import GroupLog
    from ebbtide.control.state import Attachment, MountRecord, StateStore
    from ebbtide.rpc import agent_pb2 as api

#: More at once means that something forgets to close them.
VIEWS_MAX = 256


@dataclass(slots=True, kw_only=True)
class View:
    """One open view."""

    record: ViewRecord
    log: GroupLog
    server: ViewServer
    devices: BlockDevices

    def volumes(self) -> list[str]:
        return [volume.name for volume in self.server.status.volumes] if self.server.status else []


class Views:
    """All views of this agent. `find_log` names the log of a group; it raises if there is none."""

    def __init__(
        self, *, config: Config, state: StateStore, find_log: Callable[[str], GroupLog]
    ) -> None:
        self._config = config
        self._state = state
        self._find_log = find_log
        self._views: dict[str, View] = {}
        self._run_dir = config.agent.state_dir / "run"
        self._log_dir = config.agent.state_dir / "log"
        self._log = structlog.get_logger()

    def all(self) -> list[View]:
        return list(self._views.values())

    def of(self, group: str) -> list[View]:
        """Views of a group, by its identity."""
        return [view for view in self._views.values() if view.record.group == group]

    def find(self, name: str) -> View:
        """Raises `NotFoundError`."""
        view = self._views.get(name)
        if view is None:
            known = ", ".join(sorted(self._views)) or "none"
            raise NotFoundError(
                f"no view '{name}' is open", code="unknown-view", hint=f"open views: {known}"
            )
        return view

    async def begin(self) -> None:
        """Adopt or start what the state names."""
        for record in list(self._state.value.views.values()):
            try:
                log = self._find_log(record.group)
            except EbbError:
                del self._state.value.views[record.view]
                continue
            view = self._make(record, log, None)
            if record.attachment is not None:
                await view.devices.adopt(record.attachment)
            view.server.begin()

    async def abandon(self) -> None:
        """Views run on without us."""
        for view in self._views.values():
            await view.server.abandon()
            await view.devices.abandon()

    def _make(self, record: ViewRecord, log: GroupLog, point: api.PointSpec | None) -> View:
        async def reattach() -> None:
            await view.devices.join()

        short = short_of(record.view)
        server = ViewServer(
            record,
            log,
            socket=self._run_dir / f"v-{short}.sock",
            nbd_unix=self._run_dir / f"n-{short}.sock",
            log_file=self._log_dir / f"view-{record.view}.log",
            cache_bytes=self._config.target.view_cache_bytes,
            reattach=reattach,
            point=point,
        )
        view = View(
            record=record,
            log=log,
            server=server,
            devices=BlockDevices(
                name=short,
                server=server,
                nbd_unix=server.nbd_unix,
                run_dir=self._run_dir,
                log_dir=self._log_dir,
                config=self._config.attach,
            ),
        )
        self._views[record.view] = view
        return view

    async def open(self, request: api.OpenViewRequest) -> View:
        """Start a view server; returns when it serves. Raises `PointError` and others."""
        log = self._find_log(request.group)
        if failure := log.failure():
            raise failure
        name = request.name or f"v{secrets.token_hex(3)}"
        check_name(name, "view")
        if len(name) > 32:
            raise UsageError("the name of a view has at most 32 characters")
        if name in self._views:
            raise RefusedError(f"a view '{name}' is open already", code="exists")
        if len(self._views) >= VIEWS_MAX:
            raise RefusedError(f"{VIEWS_MAX} views are open", hint="close some: 'ebb view list'")
        record = ViewRecord(
            view=name,
            group=log.group,
            seq=0,
            time_us=0,
            nbd_tcp=request.nbd_tcp,
            opened_us=0,
        )
        if request.writable:
            overlay = Path(self._config.target.overlay_dir) / name
            try:
                overlay.mkdir(mode=0o700, parents=True)
            except FileExistsError:
                raise RefusedError(
                    f"{overlay} exists, from a view that was not closed",
                    hint="remove it if nothing in it is wanted, or choose another name",
                ) from None
            except OSError as error:
                raise PrivilegeError(f"{overlay} cannot be made: {error.strerror}") from None
            record.overlay_dir = str(overlay)
            record.overlay_bytes_max = (
                request.overlay_bytes_max or self._config.target.overlay_bytes_max
            )
        view = self._make(record, log, request.point)
        try:
            view.server.begin()
            await view.server.until_settled()
            self._state.value.views[name] = record
            await self._state.save()
        except BaseException:
            self._state.value.views.pop(name, None)
            del self._views[name]
            with contextlib.suppress(EbbError):
                await view.server.stop()
            await self._remove_files(view)
            raise
        self._log.info("view open", view=name, group=log.name, seq=record.seq)
        return view

    async def close(self, view: View, *, force: bool) -> None:
        """Unmount, detach, end. Raises `RefusedError` while it is used, unless forced."""
        if not force:
            status = await view.server.refresh()
            if status is not None and (clients := status.clients - view.devices.clients) > 0:
                raise RefusedError(
                    f"{clients} clients are connected to view '{view.record.view}'",
                    code="in-use",
                    hint="end them first, or use --force",
                )
        await self.unmount(view, "")
        await self.detach(view, view.volumes())
        await view.server.stop()
        await self._remove_files(view)
        del self._views[view.record.view]
        self._state.value.views.pop(view.record.view, None)
        await self._state.save()

    async def _remove_files(self, view: View) -> None:
        if view.record.overlay_dir:
            await asyncio.to_thread(shutil.rmtree, view.record.overlay_dir, ignore_errors=True)
        for path in (view.server.log_file, view.server.socket, view.server.nbd_unix):
            path.unlink(missing_ok=True)

    async def attach(
        self, view: View, volumes: list[str], *, read_only: bool, method: str = "auto"
    ) -> dict[str, str]:
        """Block devices for volumes, remembered."""
        try:
            return await view.devices.attach(
                volumes, read_only=read_only or not view.record.overlay_dir, method=method
            )
        finally:
            await self._remember(view, view.devices.attachment)

    async def detach(self, view: View, volumes: list[str]) -> dict[str, str]:
        """Take block devices away."""
        try:
            return await view.devices.detach(volumes)
        finally:
            await self._remember(view, view.devices.attachment)

    async def _remember(self, view: View, attachment: Attachment | None) -> None:
        view.record.attachment = attachment.model_copy(deep=True) if attachment else None
        await self._state.save()

    async def mount(
        self, view: View, volume: str, directory: str, *, read_only: bool
    ) -> MountRecord:
        """Attach one volume and mount its file system."""
        names = view.volumes()
        if not volume and len(names) != 1:
            raise UsageError(
                f"view '{view.record.view}' has {len(names)} volumes", hint=", ".join(names)
            )
        chosen = volume or names[0]
        if chosen not in names:
            raise NotFoundError(
                f"no volume '{chosen}' is in view '{view.record.view}'",
                code="unknown-volume",
                hint=f"volumes: {', '.join(names)}",
            )
        read_only = read_only or not view.record.overlay_dir
        before = view.devices.attachment is not None and chosen in view.devices.attachment.devices
        attached = await self.attach(view, [chosen], read_only=read_only)
        try:
            mounted = await devices.mount(chosen, attached[chosen], directory, read_only=read_only)
        except EbbError:
            if not before:
                with contextlib.suppress(EbbError):
                    await self.detach(view, [chosen])
            raise
        view.record.mounts = [*view.record.mounts, mounted]
        await self._state.save()
        return mounted

    async def unmount(self, view: View, directory: str) -> list[str]:
        """Unmount one directory, or all if empty; the devices go with the last mount on them."""
        chosen = [
            mount for mount in view.record.mounts if not directory or mount.directory == directory
        ]
        if directory and not chosen:
            raise NotFoundError(
                f"view '{view.record.view}' is not mounted at {directory}",
                hint="'ebb view list' shows the mounts",
            )
        for mount in chosen:
            await devices.unmount(mount.directory)
            view.record.mounts = [other for other in view.record.mounts if other is not mount]
            if not any(other.volume == mount.volume for other in view.record.mounts):
                await self.detach(view, [mount.volume])
            await self._state.save()
        return [mount.directory for mount in chosen]
