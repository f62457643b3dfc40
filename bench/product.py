"""The whole product for a measurement: source and target agent, tap, shipping, on this machine."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import UnavailableError
from bench.peers import Export

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Words that every process of ours has in its command line.
_OURS = (b"ebbtide", b"ebb\0", b"/ebb")


@dataclass(frozen=True, slots=True)
class Suite:
    """A cipher of history: its number in the protocol, and what its rows are called."""

    number: int
    name: str
    suffix: str


#: The first cipher that was measured, hence the plain names.
AES_256_GCM = Suite(2, "AES-256-GCM", "")
SM4_GCM = Suite(1, "SM4-GCM", "_sm4")
SUITES = (AES_256_GCM, SM4_GCM)


class Product:
    """A running source and target that know each other."""

    def __init__(self, stack: Any) -> None:
        self._stack = stack

    @classmethod
    @contextlib.contextmanager
    def run(cls, work: Path) -> Iterator[Product]:
        """Start both agents in a new directory; raises UnavailableError if they do not come up."""
        try:
            from tests.support.stack import Stack
        except ImportError as error:
            raise UnavailableError(f"the product is not built: {error}") from error
        with contextlib.ExitStack() as stack:
            # What a killed process still writes must not fail the clean-up.
            directory = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="run-", dir=work, ignore_cleanup_errors=True)
            )
            try:
                running = stack.enter_context(Stack.run(Path(directory)))
            except (AssertionError, OSError) as error:
                reason = " ".join(str(error).split())[-200:]
                raise UnavailableError(f"the agents do not start: {reason}") from error
            product = cls(running)
            product._idle_agents()
            try:
                yield product
            finally:
                product._normal_all()

    def _agents(self) -> tuple[int, int]:
        return self._stack.source.process.pid, self._stack.target.process.pid

    def _idle_agents(self) -> None:
        """Both agents run only when the data path does not want the processor."""
        for pid in self._agents():
            _schedule(pid, os.SCHED_IDLE)

    def _normal_helpers(self) -> None:
        """What an agent started has inherited its priority; tap and views get theirs back."""
        agents = self._agents()
        for pid in self._processes():
            if pid not in agents:
                _schedule(pid, os.SCHED_OTHER)

    def _normal_all(self) -> None:
        """An agent at idle priority may take minutes to end on a busy machine."""
        for pid in self._processes():
            _schedule(pid, os.SCHED_OTHER)

    def _processes(self) -> list[int]:
        """Both agents and all that descends from them or was started by them."""
        agents = self._agents()
        found = list(agents)
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in agents:
                continue
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                opened = str(self._stack.directory).encode()
                if any(word in command for word in _OURS) and (
                    opened in command or self._touches(entry)
                ):
                    found.append(int(entry.name))
        return found

    def _touches(self, process: Path) -> bool:
        """The process has a file of this stack open; a tap names no path in its command line."""
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(descriptor.readlink()).startswith(str(self._stack.directory)):
                        return True
        return False

    def protect(self, group: str, image: Path, suite: Suite, *, wait: bool = True) -> None:
        """Protect an existing image; `wait`: until its present content is part of history."""
        from ebbtide.rpc import agent_pb2

        self._stack.source.stub.Protect(
            agent_pb2.ProtectRequest(
                name=group,
                target_peer=self._stack.target.name,
                suite=suite.number,
                volumes=[agent_pb2.ProtectVolume(name="disk", backing=str(image))],
            ),
            timeout=120,
        )
        self._normal_helpers()
        if wait:
            self.wait_copied(group)
            self.settle(group)

    def drop(self, group: str) -> None:
        """End protection and delete the history on both sides."""
        from ebbtide.rpc import agent_pb2

        self._stack.source.stub.Unprotect(
            agent_pb2.UnprotectRequest(
                group=group, history=agent_pb2.UnprotectRequest.HISTORY_DROP, force=True
            ),
            timeout=120,
        )

    def export(self, group: str) -> Export:
        """The protected volume, and the processes whose time counts for it."""
        found = self._stack.source.source(group)
        return Export(Path(found.nbd_unix), "disk", tuple(self._processes()))

    def last_seq(self, group: str) -> int:
        return int(self._stack.source.source(group).tap.last_seq)

    def durable_seq(self, group: str) -> int:
        return int(self._stack.target.target(group).durable_seq)

    def journal(self, group: str) -> Path:
        """Directory of the history at the target."""
        return Path(self._stack.target.target(group).journal_dir)

    def wait_copied(self, group: str, within_s: float = 600) -> None:
        """Wait until no region is left to copy and no span is open."""
        begun, begun_us = time.monotonic(), time.time_ns() // 1000
        while True:
            found = self._stack.source.source(group)
            copying = found.tap.copy_regions_left or found.tap.in_span
            # What the tap said before the copier began proves nothing.
            if found.tap_at_us > begun_us + 200_000 and not copying:
                return
            if time.monotonic() - begun > within_s:
                raise UnavailableError(f"the first copy did not end within {within_s:.0f} s")
            time.sleep(0.01)

    def settle(self, group: str, within_s: float = 300) -> float:
        """Wait until the target holds durably what the tap has numbered; seconds that it took."""
        begun = time.monotonic()
        wanted = self.last_seq(group)
        while self.durable_seq(group) < wanted:
            if time.monotonic() - begun > within_s:
                raise UnavailableError(f"the target did not catch up within {within_s:.0f} s")
            time.sleep(0.002)
        return time.monotonic() - begun

    def read_view(self, group: str, seq: int, offset: int) -> float:
        """Open a view as of `seq` and read its 4 KiB at `offset`; milliseconds for both."""
        from ebbtide.rpc import agent_pb2
        from tests.support.nbd import Client, nbd_error

        begun = time.monotonic()
        view = self._stack.target.stub.OpenView(
            agent_pb2.OpenViewRequest(group=group, point=agent_pb2.PointSpec(at_seq=seq)),
            timeout=120,
        )
        try:
            with Client(view.volumes[0].nbd_uri) as client:
                client.pread(4096, offset)
                took = time.monotonic() - begun
        except nbd_error() as error:
            raise UnavailableError(f"the view does not answer: {error}") from error
        finally:
            self._stack.target.stub.CloseView(
                agent_pb2.CloseViewRequest(view=view.id, force=True), timeout=60
            )
        return took * 1000

    def records(self, group: str) -> int:
        """Records of the history that the target holds."""
        from ebbtide.rpc import agent_pb2

        request = agent_pb2.PointsRequest(group=group, limit=1)
        return int(self._stack.target.stub.Points(request, timeout=60).record_count)


def _schedule(pid: int, policy: int) -> None:
    """Give every thread of a process a scheduling policy, as far as it still runs."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                os.sched_setscheduler(int(task.name), policy, os.sched_param(0))
