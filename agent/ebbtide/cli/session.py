"""What every verb gets: the three options that all share, and from them config, agent, output."""

import functools
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ebbtide.cli.client import Client
from ebbtide.cli.output import Output, silence
from ebbtide.config import DEFAULT_PATHS, Config, load_config, split_address
from ebbtide.errors import EbbError, ExitCode, UsageError
from ebbtide.security.peers import load_peers

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="agent.toml (or EBB_CONFIG)."),
]
AgentOption = Annotated[
    str,
    typer.Option(
        "--agent",
        "-a",
        metavar="HOST:PORT|PEER",
        help="A remote agent that agent.toml pins; else the local one.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

_SHARED: tuple[tuple[str, Any, object], ...] = (
    ("config_path", ConfigOption, None),
    ("agent_name", AgentOption, ""),
    ("json", JsonOption, False),
)


@dataclass(frozen=True, slots=True)
class Before:
    """The shared options as given before the verb: `ebb --config FILE status`."""

    config_path: Path | None = None
    agent_name: str = ""
    json: bool = False


class Ended(Exception):  # noqa: N818 - an outcome, not an error
    """The verb ended with this exit code, and everything has been said."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(slots=True)
class Session:
    """One call of `ebb`."""

    config_path: Path | None
    agent_name: str
    out: Output

    def find_config(self) -> Path:
        """Path of agent.toml: --config, EBB_CONFIG, else the first default that exists."""
        if self.config_path is not None:
            return self.config_path
        if named := os.environ.get("EBB_CONFIG"):
            return Path(named)
        for path in DEFAULT_PATHS:
            if path.exists():
                return path
        return DEFAULT_PATHS[-1]

    def load_config(self) -> Config:
        """The configuration. Raises `ConfigError`."""
        return load_config(self.find_config())

    @property
    def remote(self) -> bool:
        """The agent is on another host: paths are paths there."""
        return bool(self.agent_name)

    def connect(self) -> Client:
        """The agent that the options name. Raises `EbbError`."""
        config = self.load_config()
        if not self.agent_name:
            return Client.over_socket(config.socket)
        identity, peers = load_peers(config)
        if ":" not in self.agent_name:
            peer = peers.by_name(self.agent_name)
            if not peer.address:
                raise UsageError(
                    f"[peer.{peer.name}] has no address", hint='add address = "HOST:PORT"'
                )
            return Client.over_tls(identity, peer, peer.address)
        try:
            split_address(self.agent_name)
        except ValueError as error:
            raise UsageError(
                f"--agent: {error}", hint="write HOST:PORT, or a peer's name"
            ) from None
        return Client.over_tls(identity, peers.by_address(self.agent_name), self.agent_name)

    def path(self, text: str) -> str:
        """A path as the agent must see it: absolute, unless it is on another host."""
        if self.remote:
            if not text.startswith("/"):
                raise UsageError(
                    f"'{text}' is not absolute", hint="a path on another host starts with /"
                )
            return text
        return str(Path(text).expanduser().absolute())


def verb(
    app: typer.Typer, name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a verb: its first parameter becomes the `Session`, the shared options are
    added, and whatever ends it becomes one of the documented outcomes."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        parameters = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        keyword = inspect.Parameter.KEYWORD_ONLY
        shared = [inspect.Parameter("context", keyword, annotation=typer.Context)]
        shared += [
            inspect.Parameter(key, keyword, default=default, annotation=annotation)
            for key, annotation, default in _SHARED
        ]

        @functools.wraps(function)
        def command(
            *,
            context: typer.Context,
            config_path: Path | None,
            agent_name: str,
            json: bool,
            **arguments: Any,
        ) -> None:
            before = context.find_root().obj or Before()
            session = Session(
                config_path or before.config_path,
                agent_name or before.agent_name,
                Output(json=json or before.json),
            )
            try:
                function(session, **arguments)
                sys.stdout.flush()
            except EbbError as error:
                session.out.error(error)
                raise Ended(error.exit_code) from None
            except BrokenPipeError:
                silence(sys.stdout)
                raise Ended(ExitCode.CLOSED_PIPE) from None
            except KeyboardInterrupt:
                raise Ended(ExitCode.INTERRUPTED) from None

        signature = inspect.Signature(
            [parameter.replace(kind=keyword) for parameter in parameters] + shared
        )
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {
            key: parameter.annotation for key, parameter in signature.parameters.items()
        }
        app.command(name)(command)
        return function

    return decorate
