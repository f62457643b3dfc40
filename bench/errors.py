"""Why something was not measured."""

from __future__ import annotations

import subprocess

import grpc


class UnavailableError(Exception):
    """A peer, a tool or a part of the product is not here; the text becomes the row's reason."""


#: What ends a measurement and not the suite: its row becomes null and tells the reason.
NOT_MEASURED = (
    UnavailableError,
    grpc.RpcError,
    AssertionError,
    OSError,
    subprocess.SubprocessError,
)


def reason_of(error: BaseException) -> str:
    """One line for a row's reason."""
    if isinstance(error, grpc.RpcError) and hasattr(error, "details"):
        return f"{error.code().name}: {error.details()}"[:200]
    return " ".join(str(error).split())[:200] or type(error).__name__
