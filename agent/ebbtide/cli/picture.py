"""The status as lines of text: fits 40 columns as well as 200, still or live."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from ebbtide.cli.condition import Condition, Level, of_source, of_target, of_view
from ebbtide.cli.output import plural
from ebbtide.times import US_PER_S, format_duration, format_time
from ebbtide.units import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ebbtide.rpc.agent_pb2 import AgentStatus, SourceGroup, TargetGroup, View

_SHADES = {Level.OK: "bold green", Level.WARN: "bold yellow", Level.FAIL: "bold red"}
_BARS = " .:-=+*#"
#: Samples of the live picture's small curves.
CURVE_LEN = 40


@dataclass(slots=True)
class Curves:
    """The last samples of each group, for the live picture."""

    lag_s: dict[str, deque[float]] = field(default_factory=dict)
    writes: dict[str, deque[float]] = field(default_factory=dict)

    def add(self, status: AgentStatus) -> None:
        """Take a sample of every source group."""
        for group in status.sources:
            for curve, value in (
                (self.lag_s, group.shipping.lag_us / US_PER_S),
                (self.writes, group.rates.writes),
            ):
                curve.setdefault(group.name, deque(maxlen=CURVE_LEN)).append(value)


def curve(samples: deque[float], width: int) -> str:
    """Samples as one line of ASCII, the newest on the right, scaled to their largest."""
    newest = list(samples)[-width:]
    top = max(newest, default=0.0)
    if top <= 0:
        return "_" * len(newest)
    steps = len(_BARS) - 1
    return "".join("_" if v <= 0 else _BARS[max(1, round(v / top * steps))] for v in newest)


def picture(status: AgentStatus, width: int, curves: Curves | None = None) -> RenderableType:
    """Everything an agent says, worst first within each group."""
    role = "+".join(
        word
        for word, is_set in (("source", status.source_role), ("target", status.target_role))
        if is_set
    )
    up = format_duration(max(0, status.now_us - status.started_us) / US_PER_S)
    lines = _flow(
        [f"agent {status.name}", role, f"up {up}", format_time(status.now_us)], width, indent=0
    )
    lines[0].stylize("bold")
    for source in status.sources:
        lines += _source(source, status.now_us, width, curves)
    for target in status.targets:
        lines += _target(target, width)
    for view in status.views:
        lines += _view(view, width)
    if not (status.sources or status.targets):
        lines.append(Text("  no group yet: ebb protect GROUP VOLUME=PATH --to PEER"))
    return Group(*lines)


def _source(group: SourceGroup, now_us: int, width: int, curves: Curves | None) -> list[Text]:
    lines = _head(group.name, of_source(group, now_us))
    ship = group.shipping
    if group.HasField("shipping"):
        lines += _flow(
            [
                f"lag {format_duration(ship.lag_us / US_PER_S)}",
                f"{plural(ship.lag_writes, 'write')} behind",
                f"{format_size(ship.lag_bytes)} behind",
                f"to {ship.peer} in {_us(ship.ack_p50_us)} (p99 {_us(ship.ack_p99_us)})",
            ],
            width,
        )
    rates = group.rates
    items = [
        f"writes {rates.writes:,.0f}/s {format_size(rates.write_bytes)}/s",
        f"reads {rates.reads:,.0f}/s {format_size(rates.read_bytes)}/s",
    ]
    if group.HasField("shipping"):
        items.append(f"shipping {format_size(ship.bytes_per_s)}/s")
    spool = f"spool {format_size(group.tap.spool_bytes)}"
    items.append(
        spool + (f" of {format_size(group.spool_bytes_max)}" * bool(group.spool_bytes_max))
    )
    lines += _flow(items, width)
    if curves is not None and group.name in curves.writes:
        room = max(10, min(CURVE_LEN, width - 12))
        lines.append(Text(f"  writes/s {curve(curves.writes[group.name], room)}", style="cyan"))
        if group.HasField("shipping"):
            lag = curve(curves.lag_s[group.name], room)
            lines.append(Text(f"  lag      {lag}", style="magenta"))
    for volume in group.volumes:
        where = volume.device or volume.nbd_uri
        lines += _flow([f"{volume.name} {format_size(volume.size)}", volume.backing, where], width)
    return lines + _notices(group.notices)


def _target(group: TargetGroup, width: int) -> list[Text]:
    lines = _head(f"{group.name} (history)", of_target(group))
    newest = format_time(group.durable_time_us) if group.durable_time_us else "nothing yet"
    lines += _flow(
        [
            f"durable up to {newest}",
            f"{format_size(group.bytes_per_s)}/s",
            f"journal {format_size(group.journal_bytes)}",
            f"{format_size(group.free_bytes)} free",
        ],
        width,
    )
    return lines + _notices(group.notices)


def _view(view: View, width: int) -> list[Text]:
    lines = _head(f"view {view.id} of {view.group_name}", of_view(view))
    kind = f"writable, {format_size(view.overlay_bytes)} written" if view.writable else "read-only"
    lines += _flow([f"as of {format_time(view.time_us)}", kind], width)
    for mount in view.mounts:
        lines += _flow([f"{mount.volume} at {mount.directory}"], width)
    return lines


def _head(name: str, conditions: list[Condition]) -> list[Text]:
    first, *others = conditions
    head = Text(f"{name}  ", style="bold")
    head.append(first.word.upper().replace("-", " "), style=_SHADES[first.level])
    if first.text:
        head.append(f"  {first.text}", style="not bold")
    return [head, *(Text(f"  {other.text}", style=_SHADES[other.level]) for other in others)]


def _notices(notices: object) -> list[Text]:
    texts = [str(notice) for notice in notices] if hasattr(notices, "__iter__") else []
    return [Text(f"  note: {text}", style="yellow") for text in texts]


def _flow(items: list[str], width: int, indent: int = 2) -> list[Text]:
    """Items side by side while they fit, else on lines of their own."""
    lines: list[str] = []
    for item in items:
        if not item:
            continue
        if lines and len(lines[-1]) + 3 + len(item) <= width:
            lines[-1] += f"   {item}"
        else:
            lines.append(" " * indent + item)
    return [Text(line, overflow="fold") for line in lines]


def _us(value: int) -> str:
    return format_duration(value / US_PER_S)
