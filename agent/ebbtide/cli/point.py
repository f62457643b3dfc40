"""Naming a recovery point on the command line: `--at TIME`, `--seq N`, `--bookmark LABEL`."""

from typing import Annotated

import typer

from ebbtide.errors import UsageError
from ebbtide.rpc import agent_pb2
from ebbtide.times import format_time, parse_time

AtOption = Annotated[
    str,
    typer.Option(
        "--at",
        metavar="TIME",
        help="Newest point at or before this time: RFC 3339 with offset, now-5m, '90s ago'.",
    ),
]
SeqOption = Annotated[int, typer.Option("--seq", metavar="N", min=0, help="The point of a write.")]
BookmarkOption = Annotated[
    str, typer.Option("--bookmark", metavar="LABEL", help="The point of a bookmark.")
]
ExactOption = Annotated[
    bool,
    typer.Option("--exact", help="Refuse a point inside an inconsistent span; do not go back."),
]


def point_spec(at: str, seq: int, bookmark: str, exact: bool) -> agent_pb2.PointSpec:
    """The point that the options name, the newest if none. Raises `UsageError`."""
    given = [
        name for name, value in (("--at", at), ("--seq", seq), ("--bookmark", bookmark)) if value
    ]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} name a point twice", hint="give one of them")
    spec = agent_pb2.PointSpec(exact=exact)
    if at:
        spec.at_time_us = parse_time(at)
    elif seq:
        spec.at_seq = seq
    elif bookmark:
        spec.bookmark = bookmark
    return spec


def point_text(seq: int, time_us: int) -> str:
    """A point for people."""
    return f"{format_time(time_us)} (write {seq:,})"
