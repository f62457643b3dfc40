"""Names of groups, volumes and views: each becomes an export, a file or a socket."""

from __future__ import annotations

import re

from ebbtide.errors import UsageError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_name(name: str, what: str) -> None:
    """Raises `UsageError` unless the name is fit."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot be the name of a {what}",
            hint="letters, digits, '-', '_' and '.', at most 64, the first a letter or digit",
        )
