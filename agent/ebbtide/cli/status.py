"""`ebb status`: the truth at a glance, once or live."""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from ebbtide.cli.condition import of_source, of_target, of_view
from ebbtide.cli.picture import Curves, picture
from ebbtide.cli.plain import to_plain
from ebbtide.cli.session import Session, verb
from ebbtide.errors import UsageError
from ebbtide.rpc import agent_pb2
from ebbtide.times import parse_duration_us


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    verb(app)(status)


def status(
    session: Session,
    group: Annotated[str, typer.Argument(metavar="GROUP", help="Only this group.")] = "",
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="A live picture, until Ctrl-C.")
    ] = False,
    interval: Annotated[
        str, typer.Option("--interval", metavar="DURATION", help="Of the live picture.")
    ] = "1s",
) -> None:
    """Show each group's state, how far its target is behind, and the rates."""
    interval_ms = parse_duration_us(interval) // 1000
    if not 100 <= interval_ms <= 60_000:
        raise UsageError(f"--interval {interval}", hint="between 100ms and 60s")
    with session.connect() as client:
        if not watch:
            answer = client.call("Status", agent_pb2.AgentStatusRequest(group=group))
            session.out.data(status_plain(answer))
            session.out.say(picture(answer, session.out.console.width))
            return
        request = agent_pb2.WatchRequest(group=group, interval_ms=interval_ms)
        with client.stream("Watch", request) as answers:
            _watch(session, answers)


def _watch(session: Session, answers: Any) -> None:
    console = session.out.console
    if session.out.json or not console.is_terminal:
        for answer in answers:
            session.out.data(status_plain(answer))
            session.out.say(picture(answer, console.width))
        return
    curves = Curves()
    screen = Console(highlight=False)  # folds long lines; the other one leaves that to the terminal
    with Live(console=screen, auto_refresh=False, screen=True) as live:
        for answer in answers:
            curves.add(answer)
            live.update(picture(answer, screen.width, curves), refresh=True)


def status_plain(answer: agent_pb2.AgentStatus) -> dict[str, Any]:
    """The message as plain data; each group and view gets its `conditions`, the worst first."""
    plain = to_plain(answer)
    for entry, source in zip(plain["sources"], answer.sources, strict=True):
        entry["conditions"] = [c.as_dict() for c in of_source(source, answer.now_us)]
    for entry, target in zip(plain["targets"], answer.targets, strict=True):
        entry["conditions"] = [c.as_dict() for c in of_target(target)]
    for entry, view in zip(plain["views"], answer.views, strict=True):
        entry["conditions"] = [c.as_dict() for c in of_view(view)]
    return plain
