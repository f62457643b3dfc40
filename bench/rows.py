"""Rows of a result: one number with its spread, the peer's beside it, or null and a reason."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`value` is the median of `runs` runs; None with a `reason` where nothing was measured."""

    name: str
    value: float | None
    min: float | None
    max: float | None
    unit: str
    better: Better
    peer: str | None = None
    peer_value: float | None = None
    runs: int
    reason: str | None = None


def measured(
    name: str,
    values: Sequence[float],
    unit: str,
    better: Better,
    *,
    peer: str | None = None,
    peer_values: Sequence[float] = (),
) -> Row:
    """A row of what was measured; at least one value."""
    return Row(
        name=name,
        value=statistics.median(values),
        min=min(values),
        max=max(values),
        unit=unit,
        better=better,
        peer=peer,
        peer_value=statistics.median(peer_values) if peer_values else None,
        runs=len(values),
    )


def ratio(
    name: str, ours: Sequence[float], theirs: Sequence[float], peer: str, better: Better = "higher"
) -> Row:
    """Median over median; the spread is that of the runs that stood next to each other."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Row(
        name=name,
        value=statistics.median(ours) / statistics.median(theirs),
        min=min(pairs),
        max=max(pairs),
        unit="ratio",
        better=better,
        peer=peer,
        peer_value=1.0,
        runs=len(pairs),
    )


def missing(name: str, unit: str, better: Better, reason: str, peer: str | None = None) -> Row:
    """A row for what could not be measured here: null, and why."""
    return Row(
        name=name,
        value=None,
        min=None,
        max=None,
        unit=unit,
        better=better,
        peer=peer,
        runs=0,
        reason=reason,
    )


def write(rows: Sequence[Row], path: Path) -> None:
    """Replace `path` with the rows as a JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def number(value: float | None) -> str:
    """A value as tables show it."""
    return "-" if value is None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def show(title: str, rows: Sequence[Row]) -> None:
    """Print a table; a missing row tells its reason."""
    table = Table(title=title, title_justify="left")
    table.add_column("name", no_wrap=True)
    for column in ("value", "min", "max"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("unit")
    table.add_column("better")
    table.add_column("peer")
    table.add_column("peer's", justify="right", no_wrap=True)
    table.add_column("runs", justify="right")
    for row in rows:
        table.add_row(
            row.name,
            number(row.value),
            number(row.min),
            number(row.max),
            row.unit,
            row.better,
            row.reason or row.peer or "",
            number(row.peer_value),
            str(row.runs),
        )
    Console(width=150).print(table)
