"""`ebb points` and `ebb bookmark`: what can be opened, and naming the present moment."""

from typing import Annotated

import typer
from rich.markup import escape

from ebbtide.cli.output import Output, plural
from ebbtide.cli.plain import to_plain
from ebbtide.cli.point import point_text
from ebbtide.cli.protect import GroupArgument
from ebbtide.cli.session import Session, verb
from ebbtide.rpc import agent_pb2
from ebbtide.times import US_PER_S, format_duration, format_time, parse_time
from ebbtide.units import format_size


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    verb(app)(points)
    verb(app)(bookmark)


def points(
    session: Session,
    group: GroupArgument,
    begin: Annotated[
        str, typer.Option("--from", metavar="TIME", help="Only from this time on.")
    ] = "",
    end: Annotated[str, typer.Option("--to", metavar="TIME", help="Only up to this time.")] = "",
    writes: Annotated[bool, typer.Option("--writes", help="List every recorded write.")] = False,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, max=100_000, help="Writes to list.")
    ] = 10_000,
    volume: Annotated[
        str, typer.Option("--volume", metavar="NAME", help="Writes of this volume only.")
    ] = "",
) -> None:
    """Show the history that can be opened: its span, bookmarks, gaps, inconsistent spans."""
    request = agent_pb2.PointsRequest(
        group=group,
        from_us=parse_time(begin) if begin else 0,
        to_us=parse_time(end) if end else 0,
        writes=writes,
        limit=limit if writes else 0,
        volume=volume,
    )
    with session.connect() as client:
        result = client.call("Points", request, timeout_s=60.0)
    session.out.data(to_plain(result))
    if not session.out.json:
        _show(session.out, result)


def _show(out: Output, result: agent_pb2.PointsResult) -> None:
    out.say(f"[bold]{escape(result.name)}[/]")
    if not result.HasField("newest"):
        out.say("  [yellow]no recovery point yet[/]: the first copy is still running")
    else:
        first, last = result.horizon, result.newest
        span_s = (last.time_us - first.time_us) / US_PER_S
        out.say(f"  from {point_text(first.seq, first.time_us)}")
        out.say(f"  to   {point_text(last.seq, last.time_us)}")
        out.say(
            f"  {format_duration(span_s)}, {plural(result.record_count, 'record')}, "
            f"{format_size(result.log_bytes)} of history; every write is a point, to the "
            f"microsecond"
        )
    if result.last_record.seq > result.newest.seq:
        out.say(
            f"  [yellow]recorded up to {format_time(result.last_record.time_us)}, which lies in an "
            f"open inconsistent span[/]"
        )
    for mark in result.bookmarks:
        out.say(
            f"  bookmark {format_time(mark.time_us)}  [bold]{escape(mark.label)}[/]  "
            f"(write {mark.seq:,})"
        )
    for gap in result.gaps:
        out.say(
            f"  [red]gap[/] {format_time(gap.first_time_us)} .. {format_time(gap.end_time_us)}  "
            f"{format_size(gap.bytes)} not recorded: {escape(gap.cause)}"
        )
    for span in result.spans:
        end = format_time(span.end_time_us) if span.end_seq else "still open"
        out.say(
            f"  [yellow]inconsistent span[/] {format_time(span.first_time_us)} .. {end}  "
            f"{escape(span.cause)}: no point inside"
        )
    for record in result.records:
        where = (
            f"{record.volume} {record.offset}+{record.length}" if record.length else record.label
        )
        out.say(
            f"  {record.seq:>12,}  {format_time(record.time_us)}  {record.kind:<9} {escape(where)}"
        )
    if result.truncated:
        out.say("  ... more writes lie in the range: narrow it with --from and --to, or --limit")


def bookmark(
    session: Session,
    group: GroupArgument,
    label: Annotated[str, typer.Argument(metavar="LABEL", help="At most 255 bytes.")],
) -> None:
    """Give the present moment a name. Writes that were answered before are before it."""
    request = agent_pb2.PlaceBookmarkRequest(group=group, label=label)
    with session.connect() as client:
        placed = client.call("Bookmark", request)
    session.out.data({"label": label, **to_plain(placed)})
    session.out.say(f"bookmark '{escape(label)}' at {point_text(placed.seq, placed.time_us)}")
