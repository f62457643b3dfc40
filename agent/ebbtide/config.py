"""`agent.toml`: parsed once, every key known, every limit checked before anything starts.

Relative paths are relative to the file. `docs/operating/agent-toml.md` describes each key; a test
compares that page with these models.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from ebbtide.errors import ConfigError
from ebbtide.units import parse_size

#: Where the command line looks when neither --config nor EBB_CONFIG is given, in this order.
DEFAULT_PATHS = (Path("/etc/ebbtide/agent.toml"), Path("/var/lib/ebbtide/agent.toml"))
#: TCP port of the agent unless agent.toml says otherwise.
DEFAULT_PORT = 7380

_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*")


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def split_address(text: str) -> tuple[str, int]:
    """Host and port of `host:port`, `1.2.3.4:port` or `[::1]:port`. Raises `ValueError`."""
    host, separator, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not separator or not port.isdigit() or int(port) > 65_535 or not host:
        raise ValueError(f"'{text}' is not HOST:PORT")
    if bracketed:
        ipaddress.IPv6Address(host[1:-1])
    elif not _HOST_NAME.fullmatch(host):
        raise ValueError(f"'{host}' is no host name or address (IPv6 goes into brackets)")
    return (host[1:-1] if bracketed else host), int(port)


def _address(value: object) -> object:
    if isinstance(value, str) and value:
        split_address(value)
    return value


S = TypeVar("S", bound=BaseModel)

Size = Annotated[int, BeforeValidator(_size)]
Address = Annotated[str, BeforeValidator(_address)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class AgentSection(_Section):
    """[agent]: the process itself."""

    name: Name
    state_dir: Path = Path("state")
    #: Empty: do not listen on TCP (a source without a target, or a CLI-only host).
    listen: Address = ""
    socket: Path = Path("agent.sock")


class IdentitySection(_Section):
    """[identity]: files made by `ebb init`."""

    certificate: Path = Path("identity/agent.crt")
    key: Path = Path("identity/agent.key")
    master_key: Path = Path("identity/master.key")


class LogSection(_Section):
    """[log]: what the agent writes on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "text"


class SourceSection(_Section):
    """[source]: volumes protected on this host."""

    spool_dir: Path = Path("spool")
    spool_bytes_max: Annotated[Size, Field(ge=256 << 20)] = 20 << 30
    cache_bytes: Annotated[Size, Field(ge=16 << 20, le=64 << 30)] = 256 << 20
    frame_delay_ms: Annotated[int, Field(ge=0, le=1000)] = 10


class TargetSection(_Section):
    """[target]: history that this host keeps for others."""

    journal_dir: Path = Path("journal")
    #: Stop acknowledging below this much free space on the journal's disk.
    journal_free_min: Annotated[Size, Field(ge=0)] = 1 << 30
    overlay_dir: Path = Path("overlay")
    overlay_bytes_max: Annotated[Size, Field(ge=1 << 20)] = 16 << 30
    view_cache_bytes: Annotated[Size, Field(ge=1 << 20, le=64 << 30)] = 64 << 20


class AttachSection(_Section):
    """[attach]: block devices that the agent makes."""

    #: How, if `ebb attach` does not say. Auto: by the kernel's NBD client where there is one.
    method: Literal["auto", "fuse-loop", "nbd"] = "auto"
    nbd_connections: Annotated[int, Field(ge=1, le=16)] = 4
    #: Age at which the kernel sends an unanswered request again, over another connection.
    nbd_timeout_s: Annotated[int, Field(ge=5, le=3600)] = 30


class ShipSection(_Section):
    """[ship]: the stream from source to target."""

    window_bytes: Annotated[Size, Field(ge=4 << 20, le=1 << 30)] = 64 << 20
    retry_min_s: Annotated[float, Field(gt=0, le=60)] = 0.2
    retry_max_s: Annotated[float, Field(gt=0, le=600)] = 10.0
    #: A link without an answer for this long counts as down.
    dead_after_s: Annotated[float, Field(ge=1, le=600)] = 10.0

    @model_validator(mode="after")
    def _ordered(self) -> ShipSection:
        if self.retry_min_s > self.retry_max_s:
            raise ValueError("retry_min_s is larger than retry_max_s")
        return self


class PeerSection(_Section):
    """[peer.NAME]: one other agent, named by address and pinned certificate."""

    address: Address = ""
    certificate: Path


class Config(_Section):
    """All of `agent.toml`, with absolute paths."""

    agent: AgentSection
    identity: IdentitySection = IdentitySection()
    log: LogSection = LogSection()
    source: SourceSection = SourceSection()
    target: TargetSection = TargetSection()
    attach: AttachSection = AttachSection()
    ship: ShipSection = ShipSection()
    peer: dict[Name, PeerSection] = Field(default_factory=dict)

    @property
    def socket(self) -> Path:
        """The agent's unix socket."""
        return self.agent.socket


def load_config(path: Path) -> Config:
    """Read and check `agent.toml`. Raises `ConfigError` naming every finding."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist", hint="run 'ebb init', or name the file with --config"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", hint="run as the agent's user or as root"
        ) from None
    try:
        data = tomllib.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path} is not TOML: {error}", hint="see docs/operating/agent-toml.md"
        ) from None
    return parse_config(data, base=path.parent.absolute(), name=str(path))


def parse_config(data: dict[str, Any], *, base: Path, name: str = "agent.toml") -> Config:
    """Check a parsed file; relative paths become relative to `base`. Raises `ConfigError`."""
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise _config_error(error, name) from None
    for peer, section in config.peer.items():
        if peer == config.agent.name:
            raise ConfigError(
                f"{name}: [peer.{peer}] has the name of this agent",
                hint="names are unique among agents; give one of the two another name",
            )
        if section.address.endswith(":0"):
            raise ConfigError(f"{name}: [peer.{peer}] address: port 0 is no destination")
    return _absolute(config, base)


def _absolute(config: Config, base: Path) -> Config:
    def section(model: S) -> S:
        return model.model_copy(
            update={
                key: base / value.expanduser() for key, value in model if isinstance(value, Path)
            }
        )

    return config.model_copy(
        update={
            "agent": section(config.agent),
            "identity": section(config.identity),
            "source": section(config.source),
            "target": section(config.target),
            "peer": {peer: section(value) for peer, value in config.peer.items()},
        }
    )


def _config_error(error: ValidationError, name: str) -> ConfigError:
    findings, hint = [], ""
    for finding in error.errors():
        place = [str(part) for part in finding["loc"] if part != "[key]"]
        key = place[-1] if place else ""
        section = ".".join(place[:-1])
        where = f"[{section}] {key}" if section else f"[{key}]"
        match finding["type"]:
            case "extra_forbidden":
                findings.append(f"unknown key '{key}'" + (f" in [{section}]" if section else ""))
                hint = hint or _did_you_mean(key, place[:-1])
            case "missing":
                findings.append(f"{where} is missing")
            case _:
                findings.append(f"{where}: {_plain(finding)}")
    return ConfigError(
        f"{name}: " + "; ".join(findings), hint=hint or "see docs/operating/agent-toml.md"
    )


def _plain(finding: Any) -> str:
    message = str(finding["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should be", "should be")
    shown = finding.get("input")
    if finding["type"] != "value_error" and isinstance(shown, str | int | float):
        message += f", not {shown!r}"
    return message


def _did_you_mean(key: str, section: list[str]) -> str:
    """Suggest the nearest key of the same section, else a section that has the key."""
    known = keys_of(section)
    owners = [other for other in Config.model_fields if other != "peer" and key in keys_of([other])]
    if owners:
        return f"'{key}' belongs in [{owners[0]}]"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known here: {', '.join(known)}"


def keys_of(section: list[str]) -> list[str]:
    """Names of the keys of a section; of the sections for an empty list."""
    if not section:
        return list(Config.model_fields)
    if section[0] == "peer":
        return list(PeerSection.model_fields)
    annotation = Config.model_fields[section[0]].annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return list(annotation.model_fields)
    return []
