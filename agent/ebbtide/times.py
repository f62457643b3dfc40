"""Points in time for people: RFC 3339 with offset and microseconds; durations; `now`.

Inside the program a time is an integer: microseconds since the Unix epoch (`time_us`). A time
without an offset is refused, not guessed: whoever restores at 3 a.m. may sit in another zone.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta, timezone, tzinfo

from ebbtide.errors import UsageError

US_PER_S = 1_000_000

_RFC3339 = re.compile(
    r"(?P<date>\d{4}-\d{2}-\d{2})[Tt ](?P<clock>\d{2}:\d{2}:\d{2})"
    r"(?:\.(?P<fraction>\d{1,9}))?(?P<offset>[Zz]|[+-]\d{2}:\d{2})?"
)
_DURATION_PART = re.compile(r"(\d+(?:\.\d{1,6})?)\s*(us|ms|s|m|h|d|w)")
_UNIT_US = {
    "us": 1,
    "ms": 1_000,
    "s": US_PER_S,
    "m": 60 * US_PER_S,
    "h": 3_600 * US_PER_S,
    "d": 86_400 * US_PER_S,
    "w": 604_800 * US_PER_S,
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: Last microsecond of year 9999, what RFC 3339 can write.
TIME_US_MAX = 253_402_300_799_999_999

FORMS = (
    "2026-03-01T14:03:07.123456+08:00, now, now-5m, '90s ago', a time less or plus microseconds "
    "(2026-03-01T06:03:07Z-1us), or @<microseconds since the epoch>"
)


def now_us() -> int:
    """The wall clock in microseconds since the epoch."""
    return time.time_ns() // 1_000


def format_time(time_us: int, zone: tzinfo | None = None) -> str:
    """Write `time_us` as RFC 3339 with six digits and an offset; the local zone by default."""
    if not 0 <= time_us <= TIME_US_MAX:
        return f"@{time_us}"
    moment = _EPOCH + timedelta(microseconds=time_us)
    return moment.astimezone(zone).isoformat(sep="T", timespec="microseconds")


def parse_duration_us(text: str) -> int:
    """Microseconds of `1h30m`, `250ms`, `1.5s`, `2d`. Raises `UsageError`."""
    position, total = 0, 0
    stripped = text.strip().lower()
    for part in _DURATION_PART.finditer(stripped):
        if stripped[position : part.start()].strip():
            break
        whole, _, fraction = part.group(1).partition(".")
        unit = _UNIT_US[part.group(2)]
        total += int(whole) * unit + (int(fraction.ljust(6, "0")) * unit // US_PER_S)
        position = part.end()
    if position == 0 or stripped[position:].strip():
        raise UsageError(
            f"'{text}' is not a duration", hint="write 250ms, 90s, 5m, 1h30m, 2d or 1w"
        )
    return total


def parse_time(text: str, *, now: int | None = None) -> int:
    """`time_us` of a time that a person wrote (see `FORMS`). Raises `UsageError`.

    `now` (microseconds) replaces the clock for relative forms.
    """
    stripped = text.strip()
    base, shift = _split_shift(stripped)
    lowered = base.lower()
    if lowered == "now" or not base:
        moment = now_us() if now is None else now
    elif lowered.startswith("@") and lowered[1:].isdigit():
        moment = int(lowered[1:])
    elif lowered.endswith(" ago"):
        moment = (now_us() if now is None else now) - parse_duration_us(lowered[:-4])
    else:
        moment = _parse_rfc3339(base)
    moment += shift
    if not 0 <= moment <= TIME_US_MAX:
        raise UsageError(f"'{text}' lies outside the years 1970 to 9999", hint=f"write {FORMS}")
    return moment


def _split_shift(text: str) -> tuple[str, int]:
    """Split a trailing `-5m` or `+1us` from its base; an RFC 3339 offset is no shift."""
    found = re.search(r"\s*([+-])\s*((?:\d+(?:\.\d{1,6})?(?:us|ms|s|m|h|d|w))+)$", text.lower())
    if found is None:
        return text, 0
    amount = parse_duration_us(found.group(2))
    return text[: found.start()].strip(), -amount if found.group(1) == "-" else amount


def _parse_rfc3339(text: str) -> int:
    found = _RFC3339.fullmatch(text)
    if found is None:
        raise UsageError(f"'{text}' is not a time", hint=f"write {FORMS}")
    offset = found.group("offset")
    if offset is None:
        here = datetime.now().astimezone().strftime("%z")
        raise UsageError(
            f"'{text}' has no offset from UTC",
            hint=f"append Z, or this host's offset {here[:3]}:{here[3:]}",
        )
    fraction = found.group("fraction") or ""
    if len(fraction) > 6 and fraction[6:].strip("0"):
        raise UsageError(
            f"'{text}' is finer than a microsecond", hint="history counts whole microseconds"
        )
    try:
        zone = UTC if offset in "Zz" else _zone(offset)
        moment = datetime.fromisoformat(f"{found.group('date')}T{found.group('clock')}")
        whole = (moment.replace(tzinfo=zone) - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"'{text}' is not a time: {error}", hint=f"write {FORMS}") from None
    return whole + int(fraction[:6].ljust(6, "0"))


def _zone(offset: str) -> tzinfo:
    hours, minutes = int(offset[1:3]), int(offset[4:6])
    if hours > 23 or minutes > 59:
        raise ValueError(f"offset {offset} is out of range")
    span = timedelta(hours=hours, minutes=minutes)
    return timezone(-span if offset[0] == "-" else span)


def format_duration(seconds: float) -> str:
    """A duration for people: `0.4 ms`, `3.2 s`, `4m 05s`, `2h 13m`, `5d 04h`."""
    if seconds < 0:
        return f"-{format_duration(-seconds)}"
    if seconds < 0.0995:
        return f"{seconds * 1_000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h {minutes:02d}m"
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}h"
