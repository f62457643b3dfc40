"""Two agents as real processes on this machine: own directories, identities, sockets, TLS.

Tests speak to them as users do: `ebb` for what a person types, the gRPC control service on the unix
socket where a test asks a thousand times.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from ebbtide.rpc import agent_pb2, agent_pb2_grpc
from ebbtide.security.identity import create_identity
from ebbtide.security.keys import MasterKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EBB = str(Path(sys.executable).parent / "ebb")
ROOT = Path(__file__).parents[2]


def eventually(
    predicate: Callable[[], Any], within_s: float = 30.0, what: str = "the condition"
) -> Any:
    """Wait until `predicate` returns something true, and return it."""
    deadline = time.monotonic() + within_s
    while True:
        if value := predicate():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not hold within {within_s} s")
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


@dataclass
class Host:
    """One agent: its directory, its process, its control service."""

    name: str
    directory: Path
    port: int
    prefix: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    _channel: grpc.Channel | None = None

    @property
    def config(self) -> Path:
        return self.directory / "agent.toml"

    @property
    def log(self) -> Path:
        return self.directory / "agent.log"

    def lay_out(self, *, extra: str = "") -> None:
        """Make the directory, the identity and a configuration without peers."""
        (self.directory / "identity").mkdir(parents=True, mode=0o700)
        identity = self.directory / "identity"
        create_identity(identity / "agent.crt", identity / "agent.key", self.name)
        MasterKey.create(identity / "master.key")
        self.config.write_text(
            f'[agent]\nname = "{self.name}"\nlisten = "127.0.0.1:{self.port}"\n'
            f'socket = "agent.sock"\n{extra}\n'
        )

    def pin(self, peer: Host) -> None:
        with self.config.open("a") as file:
            file.write(
                f'\n[peer.{peer.name}]\naddress = "127.0.0.1:{peer.port}"\n'
                f'certificate = "{peer.directory}/identity/agent.crt"\n'
            )

    def start(self, within_s: float = 30) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, EBB, "agent", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.wait_ready(within_s)

    def wait_ready(self, within_s: float = 30) -> None:
        def ready() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"{self.name} ended: {self.log.read_text()[-4000:]}")
            with contextlib.suppress(grpc.RpcError):
                self.status(timeout=2)
                return True
            return False

        eventually(ready, within_s, f"{self.name} answers")

    @property
    def stub(self) -> agent_pb2_grpc.AgentStub:
        if self._channel is None:
            options = [("grpc.max_receive_message_length", 64 << 20)]
            self._channel = grpc.insecure_channel(f"unix:{self.directory}/agent.sock", options)
        return agent_pb2_grpc.AgentStub(self._channel)

    def status(self, timeout: float = 10) -> agent_pb2.AgentStatus:
        return self.stub.Status(agent_pb2.AgentStatusRequest(), timeout=timeout)

    def source(self, group: str) -> agent_pb2.SourceGroup:
        return next(found for found in self.status().sources if found.name == group)

    def target(self, group: str) -> agent_pb2.TargetGroup:
        return next(found for found in self.status().targets if found.name == group)

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """Send a signal to the agent and wait for its end; its tap and views live on."""
        self.close_channel()
        if self.process is not None:
            self.process.send_signal(sig)
            self.process.wait(30)
            self.process = None

    def close_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def helpers(self) -> list[int]:
        """Processes (tap, views, holders) whose command or launch names this host's directory."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    command = (entry / "cmdline").read_bytes()
                    if b"ebbtide." in command and str(self.directory).encode() in command:
                        found.append(int(entry.name))
        return found

    def ebb(
        self, *arguments: str, check: bool = True, timeout: float = 60, text_input: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run `ebb` against this agent as a user would."""
        done = subprocess.run(
            [EBB, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            input=text_input,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100", "EBB_CONFIG": str(self.config)},
        )
        assert "Traceback" not in done.stderr + done.stdout, done.stderr
        if check:
            assert done.returncode == 0, f"ebb {arguments}: {done.returncode}\n{done.stderr}"
        return done

    def ebb_json(self, *arguments: str, **options: Any) -> Any:
        return json.loads(self.ebb(*arguments, "--json", **options).stdout)


@dataclass
class Stack:
    """A source and a target that know each other."""

    directory: Path
    source: Host
    target: Host
    #: Groups are protected without a target: the source keeps their history.
    local: bool = False

    @classmethod
    @contextlib.contextmanager
    def run(
        cls,
        directory: Path,
        *,
        source: str = "",
        target: str = "",
        source_prefix: list[str] | None = None,
        local: bool = False,
    ) -> Iterator[Stack]:
        """Start both; end everything at the end.

        `source`, `target`: further configuration; `source_prefix`: words before the source agent's
        command.
        """
        stack = cls(
            directory,
            Host("source", directory / "source", free_port(), source_prefix or []),
            Host("target", directory / "target", free_port()),
            local,
        )
        stack.source.lay_out(extra=source)
        stack.target.lay_out(extra=target)
        stack.source.pin(stack.target)
        stack.target.pin(stack.source)
        try:
            stack.target.start()
            stack.source.start()
            yield stack
        except BaseException:
            for host in (stack.source, stack.target):
                lines = host.log.read_text(errors="replace").splitlines()[-40:]
                print(f"--- {host.name}", *lines, sep="\n")
            raise
        finally:
            stack.end()

    def end(self) -> None:
        """Leave nothing behind, whatever state the test left."""
        for host in (self.source, self.target):
            with contextlib.suppress(Exception):
                for view in host.status().views:
                    host.stub.CloseView(agent_pb2.CloseViewRequest(view=view.id, force=True))
                for group in host.status().sources:
                    host.stub.Detach(agent_pb2.DetachRequest(group=group.name))
            with contextlib.suppress(Exception):
                for group in host.status().sources:
                    host.stub.Unprotect(
                        agent_pb2.UnprotectRequest(
                            group=group.name,
                            history=agent_pb2.UnprotectRequest.HISTORY_KEEP,
                            force=True,
                        )
                    )
        for host in (self.source, self.target):
            with contextlib.suppress(Exception):
                host.kill(signal.SIGTERM)
            for pid in host.helpers():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    @property
    def history(self) -> Host:
        """The host that keeps history."""
        return self.source if self.local else self.target

    def protect(self, group: str, sizes: dict[str, int], **options: Any) -> agent_pb2.SourceGroup:
        """Protect new, empty image files and wait for their first copy, which is one record each.

        Options go into the ProtectRequest.
        """
        made = self.source.stub.Protect(
            agent_pb2.ProtectRequest(
                name=group,
                target_peer="" if self.local else self.target.name,
                volumes=[
                    agent_pb2.ProtectVolume(
                        name=name,
                        backing=str(self.directory / f"{group}-{name}.img"),
                        create_bytes=size,
                    )
                    for name, size in sizes.items()
                ],
                **options,
            ),
            timeout=60,
        )
        eventually(lambda: self.is_copied(group), what="the first copy ends")
        return made

    def is_copied(self, group: str) -> bool:
        """The tap serves, and no inconsistent span is open."""
        with contextlib.suppress(grpc.RpcError, StopIteration):
            tap = self.source.source(group).tap
            return is_alive(tap.pid) and tap.last_seq > 0 and not tap.in_span
        return False

    def uri(self, group: str, volume: str) -> str:
        """NBD address of a protected volume."""
        found = self.source.source(group)
        return next(one.nbd_uri for one in found.volumes if one.name == volume)

    def wait_durable(self, group: str, within_s: float = 60) -> int:
        """Wait until history holds everything the tap has recorded; return that seq."""
        wanted = self.source.source(group).tap.last_seq

        def durable() -> bool:
            with contextlib.suppress(grpc.RpcError, StopIteration):
                if self.local:
                    return self.source.source(group).tap.spooled_seq >= wanted
                return self.target.target(group).durable_seq >= wanted
            return False

        eventually(durable, within_s, f"history holds seq {wanted}")
        return int(wanted)

    @contextlib.contextmanager
    def view(self, group: str, **point: Any) -> Iterator[agent_pb2.View]:
        """Open a view where history is; `at_time_us`, `at_seq`, `bookmark`, `exact`, `writable`."""
        writable = point.pop("writable", False)
        view = self.history.stub.OpenView(
            agent_pb2.OpenViewRequest(
                group=group, point=agent_pb2.PointSpec(**point), writable=writable
            ),
            timeout=60,
        )
        try:
            yield view
        finally:
            self.history.stub.CloseView(agent_pb2.CloseViewRequest(view=view.id, force=True))
