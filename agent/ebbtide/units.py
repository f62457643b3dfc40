"""Byte sizes for people, in powers of 1024."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d+)(?:\.(\d{1,3}))?\s*(|[KMGTP]i?B?|B)", re.IGNORECASE)
_STEPS = "KMGTP"


def parse_size(text: str) -> int:
    """Bytes of `4096`, `64K`, `256MiB`, `1.5GiB`. Raises `ValueError`."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"'{text}' is not a size; write 4096, 64KiB, 256MiB or 1.5GiB")
    letter = found.group(3)[:1].upper()
    unit = 1024 ** (_STEPS.index(letter) + 1) if letter in _STEPS and letter else 1
    fraction = int((found.group(2) or "").ljust(3, "0"))
    return int(found.group(1)) * unit + fraction * unit // 1000


def format_size(size: float) -> str:
    """`0 B`, `512 B`, `4.0 KiB`, `1.2 GiB`."""
    value = float(size)
    if abs(value) < 1024:
        return f"{value:.0f} B"
    for letter in _STEPS:
        value /= 1024
        if abs(value) < 999.95 or letter == _STEPS[-1]:
            return f"{value:.1f} {letter}iB"
    raise AssertionError("unreachable: the last step always returns")


def format_count(count: int) -> str:
    """A count with thin grouping: `12,345`."""
    return f"{count:,}"
