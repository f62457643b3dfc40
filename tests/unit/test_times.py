"""A person's time becomes the right microsecond, or a refusal; never a guess."""

from __future__ import annotations

from datetime import UTC, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbtide.errors import UsageError
from ebbtide.times import (
    TIME_US_MAX,
    format_duration,
    format_time,
    parse_duration_us,
    parse_time,
)

NOW = 1_772_345_678_123_456


@settings(deadline=None)  # the machine may be busy
@given(st.integers(0, TIME_US_MAX - 2 * 86_400_000_000), st.integers(-23 * 60, 23 * 60))
def test_what_is_printed_is_read_back(time_us: int, offset_minutes: int) -> None:
    zone = timezone(timedelta(minutes=offset_minutes))
    time_us = max(time_us, 86_400_000_000)
    assert parse_time(format_time(time_us, zone)) == time_us


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01t00:00:00.000001z", 1),
        ("1970-01-01 08:00:00.5+08:00", 500_000),
        ("1970-01-01T00:00:01.123456000Z", 1_123_456),
        ("now", NOW),
        (" NOW ", NOW),
        ("now-5m", NOW - 300_000_000),
        ("now - 1h30m", NOW - 5_400_000_000),
        ("-1us", NOW - 1),
        ("90s ago", NOW - 90_000_000),
        ("1.5s ago", NOW - 1_500_000),
        ("@1772345678123456", NOW),
        ("@1772345678123456-1us", NOW - 1),
        ("1970-01-01T00:00:00Z+1us", 1),
        ("1970-01-01T02:00:00+01:00-1s", 3_599_000_000),
    ],
)
def test_forms(text: str, expected: int) -> None:
    assert parse_time(text, now=NOW) == expected


@pytest.mark.parametrize(
    "text",
    [
        "yesterday",
        "2026-03-01",
        "2026-13-01T00:00:00Z",
        "2026-02-30T00:00:00Z",
        "2026-03-01T25:00:00Z",
        "2026-03-01T00:00:00+24:00",
        "2026-03-01T00:00:00.1234567Z",
        "1969-12-31T23:59:59Z",
        "@-1",
        "@99999999999999999999",
        "now-5parsecs",
        "5 bananas ago",
    ],
)
def test_nonsense_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_time(text, now=NOW)
    assert caught.value.hint


def test_a_time_without_offset_is_not_guessed() -> None:
    with pytest.raises(UsageError, match="no offset") as caught:
        parse_time("2026-03-01T14:00:00")
    assert "append Z" in caught.value.hint


def test_format_is_rfc3339_with_six_digits() -> None:
    assert format_time(1, UTC) == "1970-01-01T00:00:00.000001+00:00"
    assert format_time(2**64 - 1) == f"@{2**64 - 1}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("250ms", 250_000), ("1h30m", 5_400_000_000), ("0.5s", 500_000), ("2d", 172_800_000_000)],
)
def test_durations(text: str, expected: int) -> None:
    assert parse_duration_us(text) == expected


@pytest.mark.parametrize("text", ["", "5", "m5", "5m x", "-5m"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(UsageError):
        parse_duration_us(text)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0.0 ms"),
        (0.0004, "0.4 ms"),
        (3.21, "3.2 s"),
        (245, "4m 05s"),
        (7_980, "2h 13m"),
        (446_400, "5d 04h"),
        (-3, "-3.0 s"),
    ],
)
def test_duration_for_people(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected
