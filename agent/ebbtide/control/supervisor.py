"""Keeps one detached server process alive: adopts a running one, else starts it, again and again.

The process survives the agent. A new agent finds it by its control socket; only if nobody answers
there is a new one started. What keeps two of them off one volume is the server's own exclusive
lock: a start that fails with "in-use" is repeated, by adopting.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from enum import StrEnum
from typing import TYPE_CHECKING

import structlog

from ebbtide.control import process
from ebbtide.control.client import ControlClient
from ebbtide.errors import EbbError, UnreachableError
from ebbtide.rpc import control_pb2 as pb
from ebbtide.rpc.failure import known

if TYPE_CHECKING:
    from pathlib import Path

#: Pauses between attempts when a process dies young or refuses to start.
RETRY_S = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
#: A process that served this long starts again at once.
YOUNG_S = 10.0
#: How long the kernel may take to clear away a killed process.
REAP_S = 5.0


class ProcessState(StrEnum):
    STARTING = "starting"
    SERVING = "serving"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


class Supervisor(ABC):
    """One server process. `run` is its task; `client` is set while it serves."""

    #: Python module of the launcher.
    module: str

    def __init__(self, *, name: str, socket: Path, log: Path) -> None:
        self.name = name
        self.socket = socket
        self.log_file = log
        self.state = ProcessState.STARTING
        self.failure: EbbError | None = None
        self.client: ControlClient | None = None
        self.pid = 0
        self.restarts = 0
        self._settled = asyncio.Event()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._log = structlog.get_logger(process=name)

    @abstractmethod
    async def launch_message(self) -> bytes:
        """The message that the launcher reads; made anew for each start."""

    @abstractmethod
    async def adopted(self, client: ControlClient) -> int:
        """Ask an answering process for its pid, and take note of its status."""

    async def serving(self, client: ControlClient) -> None:  # noqa: B027 (nothing to do is fine)
        """Do what must follow whenever a process serves (again).

        Repeated, the process living, until it succeeds: what it needs may come up later.
        """

    def lost(self) -> None:  # noqa: B027 (nothing to do is fine)
        """Take note that the process is gone."""

    def begin(self) -> None:
        """Start the task."""
        self._task = asyncio.create_task(self.run(), name=f"supervise {self.name}")

    async def until_settled(self) -> None:
        """Wait for the first success or failure. Raises the failure."""
        await self._settled.wait()
        if self.failure is not None:
            raise self.failure

    async def request(self, message: pb.Request, *, timeout_s: float = 10.0) -> pb.Response:
        """Ask the process. Raises `UnreachableError` while it does not serve."""
        if self.client is None:
            raise UnreachableError(
                f"the process of {self.name} does not run",
                hint=self.failure.message if self.failure else "it is being started again",
            )
        return await self.client.request(message, timeout_s=timeout_s)

    async def run(self) -> None:
        """Observe, decide, act, until `stop` or `abandon`."""
        attempt = 0
        while not self._stopping.is_set():
            try:
                client, watch = await self._adopt_or_start()
            except Exception as error:  # noqa: BLE001
                # Also what is no error of ours, such as no memory for a process: it passes.
                self._failed(known(error))
                attempt = min(attempt + 1, len(RETRY_S) - 1)
                await self._pause(RETRY_S[attempt])
                continue
            began = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                serve = tasks.create_task(self._serve(client), name=f"serve {self.name}")
                await self._until_gone(client, watch)
                serve.cancel()
            self.lost()
            if self._stopping.is_set():
                # Whoever stops us takes the client, also one of a restart that was under way.
                break
            self.client = None
            self.state = ProcessState.RESTARTING
            self.restarts += 1
            self._log.warning("process ended", pid=self.pid, restarts=self.restarts)
            young = time.monotonic() - began < YOUNG_S
            attempt = min(attempt + 1, len(RETRY_S) - 1) if young else 0
            if attempt > 1:
                await self._pause(RETRY_S[attempt - 1])

    async def _serve(self, client: ControlClient) -> None:
        attempt = 0
        while not (client.closed.is_set() or self._stopping.is_set()):
            try:
                await self.serving(client)
            except Exception as error:  # noqa: BLE001
                self._failed(known(error))
                attempt = min(attempt + 1, len(RETRY_S) - 1)
                await self._pause(RETRY_S[attempt])
            else:
                self.failure = None
                self.state = ProcessState.SERVING
                self._settled.set()
                return

    def _failed(self, error: EbbError) -> None:
        if self.failure is None or self.failure.message != error.message:
            self._log.error("process failed", code=error.code, error=error.message)
        self.failure = error
        self.state = ProcessState.FAILED
        self._settled.set()

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    async def _adopt_or_start(self) -> tuple[ControlClient, process.Watch]:
        started: process.Started | None = None
        try:
            client = await ControlClient.connect(self.socket)
        except UnreachableError:
            message = await self.launch_message()
            started = await asyncio.to_thread(
                process.start, self.module, message, socket=self.socket, log=self.log_file
            )
            client = await ControlClient.connect(self.socket)
        try:
            self.pid = await self.adopted(client)
        except EbbError:
            client.close()
            raise
        self.client = client
        self._log.info("process serves", pid=self.pid, adopted=started is None)
        return client, process.Watch(self.pid)

    async def _until_gone(self, client: ControlClient, watch: process.Watch) -> None:
        """Wait until the process ended, or its connection did, or we are asked to stop."""
        waits = [
            asyncio.create_task(event.wait())
            for event in (client.closed, watch.ended, self._stopping)
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not self._stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REAP_S):
                        await watch.ended.wait()
        finally:
            for wait in waits:
                wait.cancel()
            if not self._stopping.is_set():
                client.close()
            watch.close()

    async def abandon(self) -> None:
        """Let the process run on, for the next agent to adopt."""
        await self._end_task()
        client, self.client = self.client, None
        if client is not None:
            client.close()

    async def stop(self, *, timeout_s: float = 60.0) -> None:
        """Ask the process to end cleanly, and wait until it has."""
        await self._end_task()
        client, self.client, pid = self.client, None, self.pid
        self.state = ProcessState.STOPPED
        if client is None:
            return
        watch = process.Watch(pid)
        try:
            with contextlib.suppress(UnreachableError):
                await client.request(pb.Request(stop=pb.StopRequest()), timeout_s=timeout_s)
            async with asyncio.timeout(timeout_s):
                await watch.ended.wait()
        except TimeoutError:
            raise UnreachableError(
                f"the process of {self.name} (pid {pid}) does not end", code="timeout"
            ) from None
        finally:
            watch.close()
            client.close()

    async def _end_task(self) -> None:
        self._stopping.set()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
