"""An agent in memory: the gRPC service with canned answers, on a real unix socket."""

from __future__ import annotations

import threading
from concurrent import futures
from typing import TYPE_CHECKING, Any

import grpc

from ebbtide.rpc import agent_pb2
from ebbtide.rpc.agent_pb2_grpc import AgentServicer, add_AgentServicer_to_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from google.protobuf.message import Message

#: 2026-03-01T06:03:07.123456Z
NOW = 1_772_344_987_123_456


def full_status() -> agent_pb2.AgentStatus:
    """A source in good health, a journal, and a view."""
    status = agent_pb2.AgentStatus(
        name="his-a",
        version="0.1.0",
        now_us=NOW,
        started_us=NOW - 3_600_000_000,
        source_role=True,
        target_role=True,
    )
    group = status.sources.add(
        group=bytes(range(16)),
        name="his",
        state=agent_pb2.SourceGroup.STATE_SERVING,
        suite=1,
        generation_counter=1,
        generation_site=2**64 - 1,
        spool_bytes_max=1 << 30,
    )
    group.tap.mode = "recording"
    group.tap.spool_bytes = 4096
    group.volumes.add(name="data", backing="/dev/vg0/his", size=1 << 28, device="/dev/loop3")
    group.shipping.peer = "refuge"
    group.shipping.state = agent_pb2.Shipping.STATE_STREAMING
    group.shipping.lag_us = 12_345
    group.shipping.lag_writes = 3
    group.shipping.durable_time_us = NOW - 12_345
    group.rates.writes = 1234.5
    status.targets.add(
        name="pacs", state=agent_pb2.TargetGroup.STATE_RECEIVING, source_peer="pacs-a"
    )
    status.views.add(id="v1", group_name="pacs", time_us=NOW, state=agent_pb2.View.STATE_SERVING)
    return status


class FakeAgent(AgentServicer):
    """Records requests, gives `answers[method]`, or fails with `failures[method]`."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.answers: dict[str, Any] = {}
        self.failures: dict[str, agent_pb2.AgentFailure] = {}
        self.cancelled = threading.Event()

    def only_request(self, method: str) -> Any:
        found = [request for name, request in self.requests if name == method]
        assert len(found) == 1, self.requests
        return found[0]

    def _answer(self, method: str, request: Message, context: grpc.ServicerContext) -> Any:
        self.requests.append((method, request))
        if failure := self.failures.get(method):
            metadata = (("ebbtide-failure-bin", failure.SerializeToString()),)
            context.set_trailing_metadata(metadata)
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, failure.message)
        return self.answers[method]

    def _stream(self, method: str, request: Message, context: grpc.ServicerContext) -> Any:
        context.add_callback(self.cancelled.set)
        yield from self._answer(method, request, context)


def _unary(name: str) -> Any:
    return lambda self, request, context: self._answer(name, request, context)


def _streaming(name: str) -> Any:
    return lambda self, request, context: self._stream(name, request, context)


for _method in agent_pb2.DESCRIPTOR.services_by_name["Agent"].methods:
    _make = _streaming if _method.server_streaming else _unary
    setattr(FakeAgent, _method.name, _make(_method.name))


def serve(path: Path) -> Iterator[FakeAgent]:
    """Serve a fake agent on a unix socket; for fixtures."""
    agent = FakeAgent()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_AgentServicer_to_server(agent, server)
    server.add_insecure_port(f"unix:{path}")
    server.start()
    yield agent
    server.stop(None).wait()
