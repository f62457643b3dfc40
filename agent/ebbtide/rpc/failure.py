"""Errors over gRPC: a status for machines in between, an `AgentFailure` for the other end."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc
import structlog

from ebbtide import _native
from ebbtide.errors import EbbError, ExitCode, InternalError, UnreachableError, error_from
from ebbtide.rpc import agent_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

METADATA_KEY: Final = "ebbtide-failure-bin"

_STATUS: Final = {
    ExitCode.USAGE: grpc.StatusCode.INVALID_ARGUMENT,
    ExitCode.CONFIG: grpc.StatusCode.FAILED_PRECONDITION,
    ExitCode.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ExitCode.REFUSED: grpc.StatusCode.FAILED_PRECONDITION,
    ExitCode.UNREACHABLE: grpc.StatusCode.UNAVAILABLE,
    ExitCode.DAMAGED: grpc.StatusCode.DATA_LOSS,
    ExitCode.NO_SPACE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ExitCode.PRIVILEGE: grpc.StatusCode.PERMISSION_DENIED,
    ExitCode.POINT: grpc.StatusCode.OUT_OF_RANGE,
}

T = TypeVar("T")


def from_native(error: _native.NativeError) -> EbbError:
    """The error that native code raised, in our tree."""
    code, message, hint, kind = error.args
    return error_from(code, message, hint, kind=kind)


def to_message(error: EbbError) -> agent_pb2.AgentFailure:
    """The message that carries an error."""
    return agent_pb2.AgentFailure(
        kind=agent_pb2.AgentFailure.Kind.ValueType(int(error.exit_code)),
        code=error.code,
        message=error.message,
        hint=error.hint,
    )


def from_rpc(error: grpc.RpcError, whom: str) -> EbbError:
    """The error that a peer answered, or why there was no answer."""
    metadata: Any = error.trailing_metadata() if hasattr(error, "trailing_metadata") else ()
    for key, value in metadata or ():
        if key == METADATA_KEY:
            failure = agent_pb2.AgentFailure.FromString(value)
            return error_from(failure.code, failure.message, failure.hint, kind=failure.kind)
    status = error.code() if hasattr(error, "code") else None
    details = error.details() if hasattr(error, "details") else str(error)
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnreachableError(f"{whom} does not answer", code="timeout")
    return UnreachableError(
        f"{whom} cannot be reached: {details}",
        hint="is its agent running, its address right, and each certificate pinned at the other?",
    )


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: EbbError) -> None:
    status = _STATUS.get(error.exit_code, grpc.StatusCode.INTERNAL)
    failure = to_message(error).SerializeToString()
    await context.abort(status, error.message, ((METADATA_KEY, failure),))


def known(error: Exception) -> EbbError:
    """An error of our tree. Any other is a defect: it is logged, and told as an internal error."""
    if isinstance(error, EbbError):
        return error
    if isinstance(error, _native.NativeError):
        return from_native(error)
    structlog.get_logger().exception("unforeseen error", exc_info=error)
    return InternalError(
        f"unforeseen: {type(error).__name__}: {error}", hint="the agent's log has the details"
    )


def answers(method: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """Wrap a unary method of a servicer: what it raises is told to the caller."""

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: Any) -> T:
        try:
            return await method(self, request, context)
        except Exception as error:
            await _abort(context, known(error))
            raise

    return call


def streams(method: Callable[..., AsyncIterator[T]]) -> Callable[..., AsyncIterator[T]]:
    """Wrap a server-streaming method of a servicer."""

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: Any) -> AsyncIterator[T]:
        try:
            async for message in method(self, request, context):
                yield message
        except Exception as error:
            await _abort(context, known(error))
            raise

    return call
