"""Names of groups, volumes and views: each becomes an export, a file or a socket."""

from __future__ import annotations

import hashlib
import re

from ebbtide.errors import UsageError

#: Paths of unix sockets are short: 107 bytes (unix(7)).
SHORT_LEN = 12

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def short_of(name: str) -> str:
    """At most 12 characters that stand for a name in the path of a socket."""
    if len(name) <= SHORT_LEN:
        return name
    return hashlib.sha256(name.encode()).hexdigest()[:SHORT_LEN]


def check_name(name: str, what: str) -> None:
    """Raises `UsageError` unless the name is fit."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot be the name of a {what}",
            hint="letters, digits, '-', '_' and '.', at most 64, the first a letter or digit",
        )
