"""A log that history is read from: a journal, or the spool of a group without a target.

Views, points and restore know only this; which role writes the log is no concern of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ebbtide.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from ebbtide import _native
    from ebbtide.errors import EbbError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLog:
    """The log of one group on this host."""

    #: Identity in hexadecimal, and name.
    group: str
    name: str
    directory: str
    #: The group key, unwrapped. Raises `DamagedError` or `ConfigError`.
    key: Callable[[], bytes]
    #: How far the log is written now, as its writer says; None if it is not known.
    end: Callable[[], Awaitable[_native.LogEnd | None]]
    #: Why the log cannot be read now, if so.
    failure: Callable[[], EbbError | None]

    @property
    def group_id(self) -> bytes:
        return bytes.fromhex(self.group)


def find_log(logs: Iterable[GroupLog], name: str) -> GroupLog:
    """A log by the group's name or identity. Raises `NotFoundError`, `UsageError` if ambiguous."""
    return find_group(logs, name, lambda log: (log.group, log.name))


def find_group(known: Iterable[T], name: str, called: Callable[[T], tuple[str, str]]) -> T:
    """What keeps history of a group, by name or identity; `called` tells identity and name.

    Raises `NotFoundError`, `UsageError` if ambiguous.
    """
    named = [(*called(one), one) for one in known]
    found = [each for each in named if name == each[0]] or [
        each for each in named if name == each[1]
    ]
    if len(found) > 1:
        raise UsageError(
            f"{len(found)} groups are called '{name}'",
            hint="use the identity: " + ", ".join(identity for identity, *_ in found),
        )
    if not found:
        names = ", ".join(sorted(each[1] for each in named))
        raise NotFoundError(
            f"this agent holds no history of a group '{name}'",
            code="unknown-group",
            hint=f"it holds history of: {names or 'none'}",
        )
    return found[0][2]
