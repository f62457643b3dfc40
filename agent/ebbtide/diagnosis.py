"""What only the running agent can check for `ebb doctor`."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from ebbtide.control.supervisor import ProcessState
from ebbtide.errors import EbbError
from ebbtide.rpc import agent_pb2 as api
from ebbtide.rpc import replication_pb2 as pb
from ebbtide.rpc import replication_pb2_grpc
from ebbtide.rpc.failure import from_rpc
from ebbtide.target.journal import free_bytes
from ebbtide.times import now_us

if TYPE_CHECKING:
    from ebbtide.agent import AgentProcess

OK = api.Finding.LEVEL_OK
WARNING = api.Finding.LEVEL_WARNING
FAILURE = api.Finding.LEVEL_FAILURE

PEER_S = 5.0
#: Offsets between two hosts below this are what NTP gives; above, times of two sites mislead.
CLOCK_OFFSET_MAX_US = 1_000_000
CERTIFICATE_WARN = timedelta(days=30)
SPACE_WARN_BYTES = 1 << 30


async def diagnose(agent: AgentProcess) -> api.DiagnoseResult:
    """All findings, good ones too."""
    result = api.DiagnoseResult()
    _certificate(agent, result)
    for peer in agent.peers:
        await _peer(agent, peer.name, bool(peer.address), result)
    for group in agent.sources.all():
        _process(result, "tap", group.record.name, group.tap.state, group.tap.failure)
        _space(result, "spool-space", group.record.spool_dir)
        _key(agent, result, group.record.name, group.record.wrapped_key, group.record.group_id)
        holder = group.devices.holder_state()
        if holder is not None:
            _process(result, "holder", group.record.name, holder, None)
    for target in agent.targets.all():
        failure = target.journal.failure
        result.findings.add(
            check="journal",
            subject=target.record.name,
            level=FAILURE if failure else OK,
            message=failure.message if failure else "open",
            hint=failure.hint if failure else "",
        )
        _space(result, "journal-space", target.record.journal_dir)
        _key(agent, result, target.record.name, target.record.wrapped_key, target.record.group_id)
    for view in agent.views.all():
        _process(result, "view", view.record.view, view.server.state, view.server.failure)
    return result


def _certificate(agent: AgentProcess, result: api.DiagnoseResult) -> None:
    until = agent.identity.certificate.not_after
    left = until - datetime.now(UTC)
    result.findings.add(
        check="certificate",
        subject=agent.config.agent.name,
        level=OK if left > CERTIFICATE_WARN else WARNING,
        message=f"valid until {until:%Y-%m-%d}",
        hint="" if left > CERTIFICATE_WARN else "make a new identity and pin it at the peers",
    )


async def _peer(agent: AgentProcess, name: str, dialled: bool, result: api.DiagnoseResult) -> None:
    if not dialled:
        result.findings.add(
            check="peer-reachable", subject=name, level=OK, message="has no address: it dials us"
        )
        return
    try:
        async with agent.dialer.dial(name) as channel:
            began, sent_us = time.monotonic(), now_us()
            stub = replication_pb2_grpc.ReplicationStub(channel)
            answer = await stub.Ping(pb.PingRequest(sent_us=sent_us), timeout=PEER_S)
            rtt_us = int((time.monotonic() - began) * 1e6)
    except grpc.RpcError as error:
        failure = from_rpc(error, f"peer '{name}'")
        result.findings.add(
            check="peer-reachable",
            subject=name,
            level=FAILURE,
            message=failure.message,
            hint=failure.hint,
        )
        return
    result.findings.add(
        check="peer-reachable",
        subject=name,
        level=OK,
        message=f"answers in {rtt_us / 1000:.1f} ms, version {answer.version}",
    )
    offset_us = answer.received_us - (sent_us + rtt_us // 2)
    far = abs(offset_us) > CLOCK_OFFSET_MAX_US
    result.findings.add(
        check="clock-offset",
        subject=name,
        level=WARNING if far else OK,
        message=f"its clock differs by {offset_us / 1000:.1f} ms",
        hint="set both hosts' clocks by NTP" if far else "",
    )


def _process(
    result: api.DiagnoseResult,
    what: str,
    subject: str,
    state: ProcessState,
    failure: EbbError | None,
) -> None:
    good = state is ProcessState.SERVING
    result.findings.add(
        check=f"{what}-process",
        subject=subject,
        level=OK if good else FAILURE,
        message=failure.message if failure and not good else state.value,
        hint=failure.hint if failure and not good else "",
    )


def _space(result: api.DiagnoseResult, check: str, directory: str) -> None:
    try:
        free = free_bytes(directory)
    except OSError as error:
        result.findings.add(
            check=check, subject=directory, level=FAILURE, message=str(error.strerror)
        )
        return
    low = free < SPACE_WARN_BYTES
    result.findings.add(
        check=check,
        subject=directory,
        level=WARNING if low else OK,
        message=f"{free >> 20} MiB are free",
        hint=f"free space on the disk of {Path(directory).name}" if low else "",
    )


def _key(
    agent: AgentProcess, result: api.DiagnoseResult, subject: str, wrapped: str, group: bytes
) -> None:
    try:
        agent.master.unwrap(bytes.fromhex(wrapped), group)
    except EbbError as error:
        result.findings.add(
            check="group-key",
            subject=subject,
            level=FAILURE,
            message=error.message,
            hint=error.hint,
        )
        return
    result.findings.add(check="group-key", subject=subject, level=OK, message="unwraps")
