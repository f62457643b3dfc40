"""`ebb protect`, `unprotect`, `attach`, `detach`: what is protected, and as which device."""

from enum import StrEnum
from typing import Annotated

import typer

from ebbtide.cli.client import WORK_S
from ebbtide.cli.output import plural
from ebbtide.cli.plain import enum_word, to_plain
from ebbtide.cli.session import Session, verb
from ebbtide.errors import UsageError
from ebbtide.rpc import agent_pb2
from ebbtide.units import format_size, parse_size

GroupArgument = Annotated[str, typer.Argument(metavar="GROUP", help="Name or id of the group.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


class Suite(StrEnum):
    """Ciphers of `--suite`."""

    SM4_GCM = "sm4-gcm"
    AES_256_GCM = "aes-256-gcm"


class Method(StrEnum):
    """Ways of `--method`."""

    AUTO = "auto"
    FUSE_LOOP = "fuse-loop"
    NBD = "nbd"


_SUITES = {Suite.SM4_GCM: 1, Suite.AES_256_GCM: 2}
_METHODS = {
    Method.AUTO: agent_pb2.ATTACH_METHOD_UNSPECIFIED,
    Method.FUSE_LOOP: agent_pb2.ATTACH_METHOD_FUSE_LOOP,
    Method.NBD: agent_pb2.ATTACH_METHOD_NBD,
}


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    verb(app)(protect)
    verb(app)(unprotect)
    verb(app)(attach)
    verb(app)(detach)


def size_option(text: str, name: str) -> int:
    """Bytes of a size option; 0 if it was not given. Raises `UsageError`."""
    try:
        return parse_size(text) if text else 0
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None


def pairs(texts: list[str], what: str) -> list[tuple[str, str]]:
    """`name=path` arguments. Raises `UsageError` for a malformed or repeated one."""
    result: dict[str, str] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not separator or not name or not path:
            raise UsageError(
                f"'{text}' is not NAME=PATH", hint=f"{what}, such as data=/dev/vg0/his"
            )
        if name in result:
            raise UsageError(f"volume '{name}' is named twice")
        result[name] = path
    return list(result.items())


def protect(
    session: Session,
    group: Annotated[str, typer.Argument(metavar="GROUP", help="Name of the new group.")],
    volumes: Annotated[
        list[str],
        typer.Argument(metavar="VOLUME=PATH...", help="Block devices or image files, by name."),
    ],
    to: Annotated[
        str,
        typer.Option("--to", metavar="PEER", help="Target, by its name in agent.toml."),
    ] = "",
    create: Annotated[
        str, typer.Option("--create", metavar="SIZE", help="Make absent image files, this large.")
    ] = "",
    suite: Annotated[Suite, typer.Option("--suite", help="Cipher of history.")] = Suite.SM4_GCM,
    spool_dir: Annotated[
        str, typer.Option("--spool-dir", metavar="DIR", help="Instead of the configured one.")
    ] = "",
    spool_max: Annotated[
        str, typer.Option("--spool-bytes-max", metavar="SIZE", help="Limit of the spool.")
    ] = "",
    cache: Annotated[
        str, typer.Option("--cache-bytes", metavar="SIZE", help="Memory for recent contents.")
    ] = "",
    frame_delay_ms: Annotated[
        int, typer.Option("--frame-delay-ms", min=0, max=1000, help="0 for the configured one.")
    ] = 0,
    nbd_tcp: Annotated[
        str, typer.Option("--nbd-tcp", metavar="ADDRESS:PORT", help="Serve NBD over TCP too.")
    ] = "",
) -> None:
    """Record every write to these volumes from now on, and ship it to the target.

    Without --to history is kept in the spool of this host, and only until that is full.
    """
    request = agent_pb2.ProtectRequest(
        name=group,
        target_peer=to,
        suite=_SUITES[suite],
        spool_dir=session.path(spool_dir) if spool_dir else "",
        spool_bytes_max=size_option(spool_max, "--spool-bytes-max"),
        cache_bytes=size_option(cache, "--cache-bytes"),
        frame_delay_ms=frame_delay_ms,
        nbd_tcp=nbd_tcp,
    )
    create_bytes = size_option(create, "--create")
    for name, path in pairs(volumes, "a volume has a name and a path"):
        request.volumes.add(name=name, backing=session.path(path), create_bytes=create_bytes)
    with session.connect() as client:
        made = client.call("Protect", request, timeout_s=WORK_S)
    session.out.data(to_plain(made))
    session.out.say(f"[bold green]protected[/] {made.name}  {plural(len(made.volumes), 'volume')}")
    for volume in made.volumes:
        session.out.say(f"  {volume.name}  {format_size(volume.size)}  {volume.backing}")
        session.out.say(f"    {volume.nbd_uri}")
    if not to:
        limit = format_size(made.spool_bytes_max)
        session.out.say(
            "  [yellow]no target was named (--to PEER)[/]: history is kept on this host"
        )
        session.out.say(f"  alone, in the spool, and ends when that is full ({limit})")
    session.out.say(f"next: ebb attach {made.name}   (a block device that records)")
    session.out.say(f"      ebb status {made.name} --watch")


def unprotect(
    session: Session,
    group: GroupArgument,
    delete_history: Annotated[
        bool,
        typer.Option("--delete-history", help="Delete spool here and journal at the target."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also with clients connected or the target away.")
    ] = False,
    yes: YesOption = False,
) -> None:
    """Stop recording a group. Its history is kept unless --delete-history is given."""
    if delete_history:
        session.out.confirm(f"All history of '{group}' will be deleted for ever.", yes=yes)
    kind = agent_pb2.UnprotectRequest
    request = kind(
        group=group, history=kind.HISTORY_DROP if delete_history else kind.HISTORY_KEEP, force=force
    )
    with session.connect() as client:
        result = client.call("Unprotect", request, timeout_s=WORK_S)
    session.out.data(to_plain(result))
    session.out.say(f"{group} is no longer protected")
    for path in result.kept:
        session.out.say(f"  history kept in {path}")
    for path in result.dropped:
        session.out.say(f"  deleted {path}")


def attach(
    session: Session,
    group: Annotated[str, typer.Argument(metavar="GROUP", help="The group ...")] = "",
    view: Annotated[str, typer.Option("--view", metavar="VIEW", help="... or the view.")] = "",
    volume: Annotated[str, typer.Option("--volume", metavar="NAME", help="Only this one.")] = "",
    method: Annotated[Method, typer.Option("--method", help="How.")] = Method.AUTO,
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse writes.")] = False,
) -> None:
    """Give volumes of a group, or of a view, a block device on the agent's host."""
    _one_of(group, view)
    request = agent_pb2.AttachRequest(volume=volume, method=_METHODS[method], read_only=read_only)
    if view:
        request.view = view
    else:
        request.group = group
    with session.connect() as client:
        result = client.call("Attach", request, timeout_s=WORK_S)
    session.out.data(to_plain(result))
    for device in result.devices:
        how = enum_word(agent_pb2.AttachMethod.DESCRIPTOR, device.method)
        how = how.removeprefix("attach-method-")
        session.out.say(f"{device.volume}  [bold]{device.device}[/]  ({how})")


def detach(
    session: Session,
    group: Annotated[str, typer.Argument(metavar="GROUP", help="The group ...")] = "",
    view: Annotated[str, typer.Option("--view", metavar="VIEW", help="... or the view.")] = "",
    volume: Annotated[str, typer.Option("--volume", metavar="NAME", help="Only this one.")] = "",
) -> None:
    """Take the block devices away again; refused while one is mounted or open."""
    _one_of(group, view)
    request = agent_pb2.DetachRequest(volume=volume)
    if view:
        request.view = view
    else:
        request.group = group
    with session.connect() as client:
        result = client.call("Detach", request, timeout_s=WORK_S)
    session.out.data(to_plain(result))
    for device in result.devices:
        session.out.say(f"{device.volume}  {device.device} is gone")


def _one_of(group: str, view: str) -> None:
    if bool(group) == bool(view):
        raise UsageError("name a group, or a view with --view", hint="ebb attach GROUP")
