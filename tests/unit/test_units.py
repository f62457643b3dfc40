"""Sizes: what is written is read back, nonsense is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbtide.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("64K", 65536), ("1.5GiB", 3 << 29), ("2 tb", 2 << 40), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1", "1.5.1G", "1 XiB", "G", "0x10"])
def test_nonsense(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@settings(deadline=None)  # the machine may be busy
@given(st.integers(0, 1 << 60))
def test_what_is_shown_is_near_what_is_meant(size: int) -> None:
    assert abs(parse_size(format_size(size).replace(" ", "")) - size) <= size * 0.06 + 1
