"""A B A B: all sides in turn, so that what the machine does meanwhile meets all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Result = TypeVar("Result")


def take_turns(sides: Mapping[str, Callable[[], Result]], runs: int) -> dict[str, list[Result]]:
    """Run every side `runs` times; the order is reversed every other time."""
    results: dict[str, list[Result]] = {name: [] for name in sides}
    for run in range(runs):
        names = list(sides)
        for name in names if run % 2 == 0 else reversed(names):
            results[name].append(sides[name]())
    return results
