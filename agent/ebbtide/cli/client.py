"""A connection to an agent: over its unix socket, or over mutual TLS to a pinned peer.

Every failure comes out as the `EbbError` that the agent named, or says precisely why there is no
answer: no socket, nobody behind it, not ours to open, not the agent that we pinned.
"""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError

from ebbtide.errors import (
    ConfigError,
    EbbError,
    InternalError,
    PrivilegeError,
    UnreachableError,
    error_from,
)
from ebbtide.rpc import agent_pb2
from ebbtide.rpc.agent_pb2_grpc import AgentStub
from ebbtide.security.tls import CHANNEL_OPTIONS, client_credentials, client_options

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from google.protobuf.message import Message

    from ebbtide.security.identity import Identity
    from ebbtide.security.peers import Peer

T = TypeVar("T")

#: Key of the trailing metadata that carries an `AgentFailure`.
FAILURE_KEY = "ebbtide-failure-bin"
#: Seconds for calls that only look.
LOOK_S = 10.0
#: Seconds for calls that start or stop processes, file systems or devices.
WORK_S = 120.0


class Client:
    """Calls one agent. Use as a context manager."""

    def __init__(self, channel: grpc.Channel, where: str, hint: str) -> None:
        self._channel = channel
        self.stub = AgentStub(channel)
        self.where = where
        self._hint = hint

    @classmethod
    def over_socket(cls, path: Path) -> Client:
        """The agent of this host. Raises `UnreachableError`, `PrivilegeError`."""
        hint = "start the agent: ebb agent --config FILE; or name another one with --agent"
        try:
            if not stat.S_ISSOCK(path.stat().st_mode):
                raise UnreachableError(f"{path} is no socket", hint=hint)
        except FileNotFoundError:
            raise UnreachableError(
                f"no agent runs here: {path} does not exist", hint=hint
            ) from None
        except PermissionError:
            raise PrivilegeError(
                f"{path} is not accessible to us", hint="run as the agent's user or as root"
            ) from None
        if not os.access(path, os.R_OK | os.W_OK):
            raise PrivilegeError(
                f"{path} belongs to another user", hint="run as the agent's user or as root"
            )
        if len(os.fsencode(path)) > 107:
            raise ConfigError(
                f"{path} is too long for a unix socket", hint="set [agent] socket to a shorter path"
            )
        channel = grpc.insecure_channel(f"unix:{path}", list(CHANNEL_OPTIONS))
        return cls(channel, str(path), hint)

    @classmethod
    def over_tls(cls, identity: Identity, peer: Peer, address: str) -> Client:
        """A remote agent that shows exactly the certificate we pinned."""
        hint = (
            f"is the agent up and listening there, does it show the certificate pinned as "
            f"'{peer.name}', and has it pinned ours ({identity.certificate.fingerprint[:16]})?"
        )
        credentials = client_credentials(identity, peer)
        return cls(grpc.secure_channel(address, credentials, client_options()), address, hint)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; running calls are cancelled."""
        self._channel.close()

    def call(self, method: str, request: Message, *, timeout_s: float = LOOK_S) -> Any:
        """Call a unary method by name. Raises `EbbError`."""
        with self._errors():
            return getattr(self.stub, method)(request, timeout=timeout_s)

    @contextmanager
    def stream(self, method: str, request: Message) -> Iterator[Iterator[Any]]:
        """Call a streaming method; leaving the block cancels it. Raises `EbbError`."""
        with self._errors():
            answers = getattr(self.stub, method)(request)
        try:
            yield self._guarded(answers)
        finally:
            answers.cancel()

    def _guarded(self, answers: Iterator[T]) -> Iterator[T]:
        while True:
            with self._errors():
                try:
                    answer = next(answers)
                except StopIteration:
                    return
            yield answer

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise self.explain(cast("grpc.Call", error)) from None

    def explain(self, error: grpc.Call) -> EbbError:
        """The `EbbError` behind a failed call."""
        for key, value in error.trailing_metadata() or ():
            if key == FAILURE_KEY and isinstance(value, bytes):
                try:
                    failure = agent_pb2.AgentFailure.FromString(value)
                except DecodeError:
                    break
                return error_from(
                    failure.code, failure.message, failure.hint, kind=int(failure.kind)
                )
        details = error.details() or "no details"
        match error.code():
            case grpc.StatusCode.UNAVAILABLE:
                return UnreachableError(
                    f"the agent at {self.where} does not answer", hint=self._hint
                )
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return UnreachableError(
                    f"the agent at {self.where} did not answer in time",
                    code="timeout",
                    hint="look at its log; 'ebb doctor' checks this host",
                )
            case grpc.StatusCode.UNIMPLEMENTED:
                return ConfigError(
                    f"the agent at {self.where} does not know this request",
                    code="version",
                    hint="run the same version of ebbtide on both sides",
                )
            case grpc.StatusCode.PERMISSION_DENIED | grpc.StatusCode.UNAUTHENTICATED:
                return PrivilegeError(f"the agent at {self.where} refuses us: {details}")
            case grpc.StatusCode.CANCELLED:
                return UnreachableError(
                    f"the agent at {self.where} ended the call", hint=self._hint
                )
            case code:
                return InternalError(f"the agent at {self.where} failed: {code.name}: {details}")
