"""`ebb view`: block devices that show a group as of a point."""

from typing import Annotated

import typer
from rich.markup import escape

from ebbtide.cli.client import WORK_S
from ebbtide.cli.output import Output
from ebbtide.cli.plain import enum_word, to_plain
from ebbtide.cli.point import (
    AtOption,
    BookmarkOption,
    ExactOption,
    SeqOption,
    point_spec,
    point_text,
)
from ebbtide.cli.protect import GroupArgument, YesOption, size_option
from ebbtide.cli.session import Session, verb
from ebbtide.rpc import agent_pb2
from ebbtide.times import US_PER_S, format_duration
from ebbtide.units import format_size

ViewArgument = Annotated[str, typer.Argument(metavar="VIEW", help="Id of the view.")]


def register(app: typer.Typer) -> None:
    """Add `ebb view` and its verbs."""
    views = typer.Typer(help="Open any recovery point as block devices.", no_args_is_help=False)
    verb(views, "open")(open_view)
    verb(views, "list")(list_views)
    verb(views, "close")(close_view)
    verb(views, "mount")(mount_view)
    verb(views, "unmount")(unmount_view)
    app.add_typer(views, name="view")


def open_view(
    session: Session,
    group: GroupArgument,
    at: AtOption = "",
    seq: SeqOption = 0,
    bookmark: BookmarkOption = "",
    exact: ExactOption = False,
    writable: Annotated[
        bool, typer.Option("--writable", help="Writes go to an overlay, history stays as it is.")
    ] = False,
    overlay_max: Annotated[
        str, typer.Option("--overlay-bytes-max", metavar="SIZE", help="Limit of the overlay.")
    ] = "",
    name: Annotated[
        str, typer.Option("--name", metavar="VIEW", help="Instead of a generated id.")
    ] = "",
    nbd_tcp: Annotated[
        str, typer.Option("--nbd-tcp", metavar="ADDRESS:PORT", help="Serve NBD over TCP too.")
    ] = "",
) -> None:
    """Open a group as of a point (the newest, unless told otherwise)."""
    request = agent_pb2.OpenViewRequest(
        group=group,
        point=point_spec(at, seq, bookmark, exact),
        writable=writable,
        overlay_bytes_max=size_option(overlay_max, "--overlay-bytes-max"),
        nbd_tcp=nbd_tcp,
        name=name,
    )
    with session.connect() as client:
        view = client.call("OpenView", request, timeout_s=WORK_S)
    session.out.data(to_plain(view))
    show_view(session.out, view)
    session.out.say(f"next: ebb view mount {view.id} DIRECTORY   or   ebb attach --view {view.id}")


def show_view(out: Output, view: agent_pb2.View) -> None:
    """A view for people."""
    state = enum_word(agent_pb2.View.State.DESCRIPTOR, view.state)
    shade = "green" if view.state == agent_pb2.View.STATE_SERVING else "red"
    kind = f"writable, overlay {format_size(view.overlay_bytes)}" if view.writable else "read-only"
    out.say(
        f"[bold]{escape(view.id)}[/]  {escape(view.group_name)} at "
        f"{point_text(view.seq, view.time_us)}"
    )
    took = format_duration(view.open_took_us / US_PER_S)
    out.say(f"  [{shade}]{state}[/], {kind}, opened in {took} {escape(view.detail)}".rstrip())
    for volume in view.volumes:
        where = f"  {volume.device}" if volume.device else ""
        out.say(f"  {volume.name}  {format_size(volume.size)}  {volume.nbd_uri}{where}")
    if view.nbd_tcp:
        out.say(f"  NBD over TCP at {view.nbd_tcp}")
    for mount in view.mounts:
        out.say(f"  {mount.volume} ({mount.filesystem}) mounted at {escape(mount.directory)}")


def list_views(
    session: Session,
    group: Annotated[str, typer.Argument(metavar="GROUP", help="Only of this group.")] = "",
) -> None:
    """List the open views."""
    with session.connect() as client:
        result = client.call("ListViews", agent_pb2.ListViewsRequest(group=group))
    session.out.data(to_plain(result))
    if not result.views:
        session.out.say("no view is open")
    for view in result.views:
        show_view(session.out, view)


def close_view(
    session: Session,
    view: ViewArgument,
    force: Annotated[bool, typer.Option("--force", help="Also with clients connected.")] = False,
    yes: YesOption = False,
) -> None:
    """Unmount and detach what hangs on a view, and end it. Its overlay is lost."""
    with session.connect() as client:
        if not yes:
            listed = client.call("ListViews", agent_pb2.ListViewsRequest())
            for other in listed.views:
                if other.id == view and other.overlay_bytes:
                    size = format_size(other.overlay_bytes)
                    session.out.confirm(f"{size} written to view '{view}' will be lost.", yes=yes)
        result = client.call(
            "CloseView", agent_pb2.CloseViewRequest(view=view, force=force), timeout_s=WORK_S
        )
    session.out.data(to_plain(result))
    session.out.say(f"view {escape(view)} is closed")


def mount_view(
    session: Session,
    view: ViewArgument,
    directory: Annotated[str, typer.Argument(metavar="DIRECTORY", help="Exists and is empty.")],
    volume: Annotated[
        str, typer.Option("--volume", metavar="NAME", help="If the view has several.")
    ] = "",
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Also if the view is writable.")
    ] = False,
) -> None:
    """Mount the file system on one volume of a view."""
    request = agent_pb2.MountViewRequest(
        view=view, volume=volume, directory=session.path(directory), read_only=read_only
    )
    with session.connect() as client:
        mount = client.call("MountView", request, timeout_s=WORK_S)
    session.out.data(to_plain(mount))
    session.out.say(
        f"{mount.volume} ({mount.filesystem}, {mount.options}) is mounted at "
        f"[bold]{escape(mount.directory)}[/]"
    )


def unmount_view(
    session: Session,
    view: ViewArgument,
    directory: Annotated[
        str, typer.Argument(metavar="DIRECTORY", help="Only there; else everywhere.")
    ] = "",
) -> None:
    """Unmount the file systems of a view; the view stays open."""
    request = agent_pb2.UnmountViewRequest(
        view=view, directory=session.path(directory) if directory else ""
    )
    with session.connect() as client:
        result = client.call("UnmountView", request, timeout_s=WORK_S)
    session.out.data(to_plain(result))
    for path in result.directories:
        session.out.say(f"unmounted {escape(path)}")
