"""`ebb restore`: write volumes as of a point into files or devices."""

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ebbtide.cli.plain import to_plain
from ebbtide.cli.point import (
    AtOption,
    BookmarkOption,
    ExactOption,
    SeqOption,
    point_spec,
    point_text,
)
from ebbtide.cli.protect import GroupArgument, pairs
from ebbtide.cli.session import Session, verb
from ebbtide.errors import InternalError
from ebbtide.rpc import agent_pb2
from ebbtide.units import format_size


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    verb(app)(restore)


def restore(
    session: Session,
    group: GroupArgument,
    volumes: Annotated[
        list[str],
        typer.Argument(metavar="VOLUME=PATH...", help="A file to make, or a device to overwrite."),
    ],
    at: AtOption = "",
    seq: SeqOption = 0,
    bookmark: BookmarkOption = "",
    exact: ExactOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite files that exist, and devices.")
    ] = False,
) -> None:
    """Write volumes as of a point (the newest, unless told otherwise) to files or devices."""
    request = agent_pb2.RestoreRequest(group=group, point=point_spec(at, seq, bookmark, exact))
    for name, path in pairs(volumes, "name a volume and where it goes"):
        request.volumes.add(volume=name, path=session.path(path), overwrite=force)
    last = None
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=session.out.json or not session.out.err.is_terminal,
        transient=True,
    )
    with session.connect() as client, client.stream("Restore", request) as answers, bar:
        task = bar.add_task("restore", total=None)
        for answer in answers:
            last = answer
            session.out.data(to_plain(answer))
            bar.update(
                task,
                description=answer.volume or "restore",
                total=answer.bytes_total or None,
                completed=answer.bytes_done,
            )
    if last is None or not last.done:
        raise InternalError(
            "the agent ended the restore without saying that it is done",
            hint="look at the agent's log; what was written is not complete",
        )
    session.out.say(
        f"restored {format_size(last.bytes_done)} as of {point_text(last.seq, last.time_us)}"
    )
    for volume in request.volumes:
        session.out.say(f"  {volume.volume}  {volume.path}")
