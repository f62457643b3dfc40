"""The agent: one process, both roles. Holds no volume data; what it starts outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import stat
import sys
from importlib import metadata
from typing import TYPE_CHECKING

import grpc
import structlog
import uvloop

from ebbtide import _native
from ebbtide.config import load_config
from ebbtide.control.history import find_log
from ebbtide.control.names import SHORT_LEN
from ebbtide.control.state import StateStore
from ebbtide.errors import ConfigError, NotFoundError, PrivilegeError, RefusedError
from ebbtide.rpc import agent_pb2_grpc
from ebbtide.rpc.failure import from_native
from ebbtide.rpc.peers import Dialer
from ebbtide.security.keys import MasterKey
from ebbtide.security.peers import load_peers
from ebbtide.security.tls import SERVER_OPTIONS, server_credentials
from ebbtide.services import AgentService, ReplicationService
from ebbtide.source.groups import SourceGroups
from ebbtide.target.journals import TargetGroups
from ebbtide.target.receiver import Receiver
from ebbtide.target.views import Views
from ebbtide.times import now_us

if TYPE_CHECKING:
    from pathlib import Path

    from ebbtide.config import Config
    from ebbtide.control.history import GroupLog

#: Calls that run when the agent ends get this long.
GRACE_S = 2.0
#: Length of a unix socket's path, terminator included (unix(7)).
SOCKET_PATH_MAX = 108
#: Characters that the names of our sockets add to the state directory.
SOCKET_NAME_LEN = len("/run/h-") + SHORT_LEN + len(".sock")


class AgentProcess:
    """Everything that one agent runs."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.version = metadata.version("ebbtide")
        self.started_us = now_us()
        self.listening = ""
        self.identity, self.peers = load_peers(config)
        self.master = MasterKey.load(config.identity.master_key)
        self.dialer = Dialer(self.identity, self.peers, self.version)
        state = StateStore(config.agent.state_dir / "agent.json")
        self.sources = SourceGroups(
            config=config,
            state=state,
            master=self.master,
            dialer=self.dialer,
            site=self.identity.certificate.site,
        )
        self.targets = TargetGroups(config=config, state=state, master=self.master)
        self.views = Views(config=config, state=state, find_log=self.find_log)
        self.receiver = Receiver(self.targets, config.ship.window_bytes)
        self._log = structlog.get_logger()
        self._servers: list[grpc.aio.Server] = []

    def find_log(self, name: str) -> GroupLog:
        """The log that holds a group's history here. Raises `NotFoundError`, `UsageError`."""
        logs = [*self.targets.logs(), *self.sources.logs()]
        if self.sources.has(name) and not any(name in {log.name, log.group} for log in logs):
            peer = self.sources.find(name).record.target_peer
            raise NotFoundError(
                f"the history of '{name}' is kept by its target, {peer}",
                code="unknown-group",
                hint=f"ask that agent: --agent {peer}",
            )
        return find_log(logs, name)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        ending = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ending.set)
        try:
            await self.targets.begin()
            await self.sources.begin()
            await self.views.begin()
            await self._listen()
            self._log.info("agent serves", name=self.config.agent.name, listen=self.listening)
            await ending.wait()
        finally:
            self._log.info("agent ends")
            await asyncio.gather(*(server.stop(GRACE_S) for server in self._servers))
            await self.sources.abandon()
            await self.views.abandon()
            await self.targets.close()
            with contextlib.suppress(OSError):
                self.config.socket.unlink(missing_ok=True)

    async def _listen(self) -> None:
        service, replication = AgentService(self), ReplicationService(self)
        if self.config.agent.listen:
            server = grpc.aio.server(options=SERVER_OPTIONS)
            agent_pb2_grpc.add_AgentServicer_to_server(service, server)
            server.add_generic_rpc_handlers((replication.handler(),))
            await self._bind_tcp(server)
            self._servers.append(server)
        local = grpc.aio.server(options=SERVER_OPTIONS)
        agent_pb2_grpc.add_AgentServicer_to_server(service, local)
        await self._bind_unix(local)
        self._servers.append(local)

    async def _bind_tcp(self, server: grpc.aio.Server) -> None:
        listen = self.config.agent.listen
        try:
            port = server.add_secure_port(listen, server_credentials(self.identity, self.peers))
        except RuntimeError:
            raise RefusedError(
                f"cannot listen on {listen}",
                code="in-use",
                hint="another process uses the port, or the address is not this host's",
            ) from None
        self.listening = f"{listen.rpartition(':')[0]}:{port}"
        await server.start()

    async def _bind_unix(self, server: grpc.aio.Server) -> None:
        path = self.config.socket
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(os.fsencode(path)) >= SOCKET_PATH_MAX:
            raise ConfigError(f"{path} is too long for a unix socket", hint="agent.socket")
        before = os.umask(0o177)
        try:
            server.add_insecure_port(f"unix:{path}")
            await server.start()
        except RuntimeError:
            raise RefusedError(f"cannot listen on {path}", code="in-use") from None
        finally:
            os.umask(before)
        if stat.S_IMODE(path.stat().st_mode) != 0o600:
            path.chmod(0o600)


def _prepare(config: Config) -> int:
    """Make the directories; be the only agent on them. Returns the lock's descriptor."""
    state_dir = config.agent.state_dir
    if len(os.fsencode(state_dir)) + SOCKET_NAME_LEN >= SOCKET_PATH_MAX:
        raise ConfigError(
            f"{state_dir} is too long a path: unix sockets lie below it",
            hint=f"at most {SOCKET_PATH_MAX - SOCKET_NAME_LEN - 1} characters for agent.state_dir",
        )
    try:
        for name in ("", "run", "log", "tap"):
            (state_dir / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise PrivilegeError(
            f"{state_dir} cannot be used: {error.strerror}", hint="run as root, or change state_dir"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RefusedError(
            f"another agent runs on {state_dir}", code="in-use", hint="end it first"
        ) from None
    return descriptor


def _log_to_stderr(config: Config) -> None:
    levels = {"debug": 10, "info": 20, "warning": 30, "error": 40}
    renderer = (
        structlog.processors.JSONRenderer()
        if config.log.format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(levels[config.log.level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def run(path: Path) -> int:
    """Be the agent until a signal ends it; returns 0. Raises `EbbError` if it cannot start."""
    # Before there is a key to keep.
    _native.forbid_core_files()
    config = load_config(path)
    try:
        _native.sm4_kernel()
    except _native.NativeError as error:
        raise from_native(error) from error
    _log_to_stderr(config)
    lock = _prepare(config)

    async def main() -> None:
        await AgentProcess(config).run()

    try:
        uvloop.run(main())
    finally:
        os.close(lock)
    return 0
