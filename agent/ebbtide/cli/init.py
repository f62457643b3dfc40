"""`ebb init`: lay out an agent's directory, identity and commented agent.toml."""

import os
import re
import socket
import tomllib
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ebbtide.cli.session import Session, verb
from ebbtide.config import DEFAULT_PATHS, DEFAULT_PORT, Config, load_config, parse_config
from ebbtide.errors import ConfigError, PrivilegeError, RefusedError
from ebbtide.security.identity import create_identity, write_new
from ebbtide.security.keys import MasterKey

TEMPLATE = """\
# The agent's configuration. Unknown keys are refused. Relative paths start at this file.
# Each key is described in docs/operating/agent-toml.md.

[agent]
name = "{name}"               # unique among your agents: a-z, 0-9 and '-'
listen = "{listen}"   # TLS for other agents; "" if nobody connects to this one
state_dir = "state"           # groups, their wrapped keys, views; never on a protected volume
socket = "agent.sock"         # for 'ebb' on this host

[identity]                    # made by 'ebb init'; keep a copy of this directory off this host
certificate = "identity/agent.crt"
key = "identity/agent.key"
master_key = "identity/master.key"

[log]
level = "info"                # debug, info, warning, error
format = "text"               # text or json, on standard error

[source]                      # volumes protected on this host
spool_dir = "spool"           # what a target does not have yet; never on a protected volume
spool_bytes_max = "{spool}"     # at this size history gets a gap; production goes on
cache_bytes = "256MiB"        # memory for recent contents, per group
frame_delay_ms = 10           # a frame waits this long for more writes

[target]                      # history kept for other hosts
journal_dir = "journal"
journal_free_min = "1GiB"     # below this much free space nothing more is acknowledged
overlay_dir = "overlay"       # what is written to writable views
overlay_bytes_max = "16GiB"   # of one view
view_cache_bytes = "64MiB"    # memory for decoded history, per view

[attach]                      # block devices of 'ebb attach' and 'ebb view mount'
method = "auto"               # nbd where the kernel has it, else fuse-loop
nbd_connections = 4
nbd_timeout_s = 30            # unanswered for so long: the kernel sends it again

[ship]
window_bytes = "64MiB"        # sent and not yet acknowledged
retry_min_s = 0.2             # a broken link is tried again after this, doubling up to ...
retry_max_s = 10.0
dead_after_s = 10.0           # a link without a sign of life for this long is down

# One section for each agent that this one talks to. The certificate is the other host's
# identity/agent.crt, copied here; nobody else is let in.
#
# [peer.refuge]
# address = "refuge.example.org:{port}"    # leave it out if only the other side connects
# certificate = "peers/refuge.crt"
"""


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    verb(app)(init)


def init(
    session: Session,
    directory: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="Where everything goes.")
    ] = DEFAULT_PATHS[-1].parent,
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="Of the agent; the host's by default.")
    ] = "",
    listen: Annotated[
        str, typer.Option("--listen", metavar="ADDRESS:PORT", help="For other agents.")
    ] = f"0.0.0.0:{DEFAULT_PORT}",
    spool_max: Annotated[
        str, typer.Option("--spool-bytes-max", metavar="SIZE", help="Limit of the spool.")
    ] = "20GiB",
) -> None:
    """Make directories, an identity, a master key and agent.toml. Replaces nothing."""
    name = name or default_name(socket.gethostname())
    root = directory.expanduser().absolute()
    path = root / "agent.toml"
    if path.exists():
        raise RefusedError(
            f"{path} exists already",
            code="exists",
            hint="edit it, or name another directory with --dir",
        )
    text = TEMPLATE.format(name=name, listen=listen, spool=spool_max, port=DEFAULT_PORT)
    config = check_template(text, root)
    try:
        for folder in (
            root,
            config.identity.key.parent,
            root / "peers",
            config.agent.state_dir,
            config.source.spool_dir,
            config.target.journal_dir,
            config.target.overlay_dir,
        ):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except PermissionError as error:
        raise PrivilegeError(
            f"{error.filename} cannot be created", hint="run as root, or name --dir"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: {error.strerror}", hint="name another --dir"
        ) from None
    if not os.access(root, os.W_OK):
        raise PrivilegeError(f"{root} is not writable", hint="run as root, or name --dir")
    identity = create_identity(config.identity.certificate, config.identity.key, name)
    MasterKey.create(config.identity.master_key)
    write_new(path, text.encode(), mode=0o600)
    load_config(path)
    session.out.data(
        {
            "config": str(path),
            "name": name,
            "certificate": str(config.identity.certificate),
            "fingerprint": identity.certificate.fingerprint,
            "listen": listen,
        }
    )
    session.out.say(f"[bold green]made[/] {escape(str(path))} for agent '{name}'")
    session.out.say(f"  certificate {escape(str(config.identity.certificate))}")
    session.out.say(f"  fingerprint {identity.certificate.fingerprint}")
    session.out.say(f"  copy the certificate to the peers, and theirs into {root}/peers/")
    session.out.say(f"next: ebb doctor --config {escape(str(path))}")
    session.out.say(f"      ebb agent --config {escape(str(path))}")


def check_template(text: str, base: Path) -> Config:
    """Parse what is about to be written, so that no bad option leaves a half-made directory."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the options make no valid agent.toml: {error}") from None
    return parse_config(data, base=base)


def default_name(host: str) -> str:
    """A valid agent name from a host name."""
    short = re.sub(r"[^a-z0-9-]+", "-", host.split(".")[0].lower()).strip("-")[:63].strip("-")
    return short or "agent"
