"""One tree of errors: a stable code word, a message, a hint and an exit code.

Every failure that a person or a script can meet is an `EbbError`. The code word is the name that
travels (control sockets, gRPC, `--json`); the class decides the exit code; message and hint are
for people and may change. `docs/operating/exit-codes.md` is this module's page, and a test holds
the two together.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar

__all__ = [
    "CODE_WORDS",
    "KINDS",
    "ConfigError",
    "DamagedError",
    "EbbError",
    "ExitCode",
    "InternalError",
    "NoSpaceError",
    "NotFoundError",
    "PointError",
    "PrivilegeError",
    "RefusedError",
    "UnreachableError",
    "UsageError",
    "error_from",
]


class ExitCode(IntEnum):
    """What `ebb` returns to the shell. Numbers are never reused."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    CONFIG = 3
    NOT_FOUND = 4
    REFUSED = 5
    UNREACHABLE = 6
    DAMAGED = 7
    NO_SPACE = 8
    PRIVILEGE = 9
    POINT = 10
    #: 128 + SIGINT, as shells report it.
    INTERRUPTED = 130
    #: 128 + SIGPIPE: the reader of our output went away.
    CLOSED_PIPE = 141


class EbbError(Exception):
    """A failure with a stable name. Raise a subclass."""

    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL
    default_code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.default_code

    def as_dict(self) -> dict[str, str | int]:
        """The object that `--json` prints on standard error under the key `error`."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "exit_code": int(self.exit_code),
        }


class InternalError(EbbError):
    """A defect of ours, or an answer that nobody foresaw."""


class UsageError(EbbError):
    """The command line asks for something that does not exist or contradicts itself."""

    exit_code = ExitCode.USAGE
    default_code = "usage"


class ConfigError(EbbError):
    """`agent.toml`, an identity or a key file is missing or wrong."""

    exit_code = ExitCode.CONFIG
    default_code = "config"


class NotFoundError(EbbError):
    """A group, volume, view, peer or file by that name does not exist."""

    exit_code = ExitCode.NOT_FOUND
    default_code = "not-found"


class RefusedError(EbbError):
    """The request is clear, but the present state does not allow it."""

    exit_code = ExitCode.REFUSED
    default_code = "refused"


class UnreachableError(EbbError):
    """An agent, a server process or a peer does not answer, or is not who we pinned."""

    exit_code = ExitCode.UNREACHABLE
    default_code = "unreachable"


class DamagedError(EbbError):
    """Stored or received bytes fail their checks."""

    exit_code = ExitCode.DAMAGED
    default_code = "damaged"


class NoSpaceError(EbbError):
    """A disk, a limit or an overlay is full."""

    exit_code = ExitCode.NO_SPACE
    default_code = "no-space"


class PrivilegeError(EbbError):
    """The operating system or the agent does not let this caller do it."""

    exit_code = ExitCode.PRIVILEGE
    default_code = "privilege"


class PointError(EbbError):
    """The recovery point does not exist: before the horizon, in the future, inside a span."""

    exit_code = ExitCode.POINT
    default_code = "no-point"


#: Code words that our own processes send, and their class. Most words need no entry: the class
#: travels beside them as a number (`AgentFailure.kind`). Control sockets carry the word alone.
CODE_WORDS: dict[str, type[EbbError]] = {
    "internal": InternalError,
    "usage": UsageError,
    "bad-request": UsageError,
    "config": ConfigError,
    "version": ConfigError,
    "not-found": NotFoundError,
    "unknown-group": NotFoundError,
    "unknown-volume": NotFoundError,
    "unknown-view": NotFoundError,
    "unknown-peer": NotFoundError,
    "refused": RefusedError,
    "exists": RefusedError,
    "in-use": RefusedError,
    "busy": RefusedError,
    "locked": RefusedError,
    "fenced": RefusedError,
    "conflict": RefusedError,
    "not-unlocked": RefusedError,
    "on-protected-volume": RefusedError,
    "volume-shrank": RefusedError,
    "backing-changed": RefusedError,
    "read-only": RefusedError,
    "stopping": RefusedError,
    "unconfirmed": RefusedError,
    "unreachable": UnreachableError,
    "timeout": UnreachableError,
    "untrusted": UnreachableError,
    "io": DamagedError,
    "damaged": DamagedError,
    "format": DamagedError,
    "poisoned": DamagedError,
    "no-space": NoSpaceError,
    "limit": NoSpaceError,
    "privilege": PrivilegeError,
    "unsupported": PrivilegeError,
    "no-point": PointError,
    "before-horizon": PointError,
    "in-future": PointError,
    "inside-span": PointError,
    "no-bookmark": PointError,
}

#: Class of an `AgentFailure.kind`, which equals the exit code.
KINDS: dict[int, type[EbbError]] = {
    int(kind.exit_code): kind
    for kind in (
        InternalError,
        UsageError,
        ConfigError,
        NotFoundError,
        RefusedError,
        UnreachableError,
        DamagedError,
        NoSpaceError,
        PrivilegeError,
        PointError,
    )
}


def error_from(code: str, message: str, hint: str = "", *, kind: int = 0) -> EbbError:
    """Rebuild the error that another process named.

    `kind` (an exit code) decides the class if given, else the code word; a word that neither
    explains is an `InternalError`.
    """
    chosen = KINDS.get(kind) or CODE_WORDS.get(code, InternalError)
    return chosen(message, hint=hint, code=code)
