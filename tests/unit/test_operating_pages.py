"""The pages for operators say what the code does: verbs, options, words, keys, defaults."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import BaseModel

from ebbtide.cli import condition, init
from ebbtide.cli.app import app
from ebbtide.config import Config, PeerSection, keys_of, parse_config
from ebbtide.rpc import agent_pb2, control_pb2
from ebbtide.units import parse_size

OPERATING = Path(__file__).parents[2] / "docs/operating"
CLI = (OPERATING / "cli.md").read_text()
KEYS = (OPERATING / "agent-toml.md").read_text()


def commands() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            found |= {f"{name} {sub}": c for sub, c in command.commands.items()}
        else:
            found[name] = command
    return found


def documented(name: str) -> str:
    """The text of the section that documents a verb."""
    for section in CLI.split("\n### ")[1:]:
        heading, _, text = section.partition("\n")
        if re.search(rf"`ebb {name}\b", heading):
            return f"{heading}\n{text.split(chr(10) + '## ')[0]}"
    raise AssertionError(f"'ebb {name}' has no section")


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_verb_and_option_is_documented(name: str) -> None:
    shared = {"--config", "--agent", "--json", "--help", "--at", "--seq", "--bookmark", "--exact"}
    options = {
        max(parameter.opts, key=len)
        for parameter in commands()[name].params
        if parameter.opts[0].startswith("-")
    }
    assert shared - {"--at", "--seq", "--bookmark", "--exact", "--help"} <= options
    text = documented(name)
    assert not {option for option in options - shared if option not in text}


def test_no_verb_is_documented_that_does_not_exist() -> None:
    named = set(re.findall(r"`ebb ((?:view )?[a-z]+)", CLI))
    assert named - {"view"} <= set(commands())


def test_every_word_of_status_is_documented() -> None:
    source = Path(condition.__file__).read_text()
    words = set(re.findall(r"_(?:ok|warn|fail)\(\s*\"([a-z-]+)\"", source))
    assert len(words) > 12
    table = CLI.split("| word | meaning |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([a-z-]+)`", table)) == words


def test_messages_of_the_json_table_exist() -> None:
    table = CLI.split("| verb | object |")[1]
    rows = dict(re.findall(r"^\| `([a-z ]+)` \| (.+) \|$", table, re.MULTILINE))
    assert set(rows) == set(commands()) - {"agent"}
    for text in rows.values():
        for message in re.findall(r"`([A-Z]\w+)`", text):
            assert hasattr(agent_pb2, message) or hasattr(control_pb2, message), message


def shown(default: object) -> str:
    return "empty" if default == "" else str(default)


@pytest.mark.parametrize("section", [name for name in Config.model_fields if name != "peer"])
def test_every_key_and_default_is_documented(section: str) -> None:
    text = KEYS.split(f"## [{section}]\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, re.MULTILINE))
    assert list(rows) == keys_of([section])
    model: Any = Config.model_fields[section].annotation
    assert issubclass(model, BaseModel)
    for key, field in model.model_fields.items():
        said = rows[key].strip("`")
        if field.is_required():
            assert said == "none, must be given"
        elif isinstance(field.default, int) and key.endswith(("bytes_max", "bytes", "free_min")):
            assert parse_size(said) == field.default, key
        else:
            assert said == shown(field.default), key


def test_keys_of_a_peer_are_documented() -> None:
    text = KEYS.split("## [peer.NAME]\n")[1]
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(PeerSection.model_fields)


def test_init_writes_every_key_with_its_default() -> None:
    text = init.TEMPLATE.format(name="a", listen="0.0.0.0:1", spool="20GiB", port=1)
    data = tomllib.loads(text)
    for section in Config.model_fields:
        if section != "peer":
            assert set(data[section]) == set(keys_of([section]))
    written = parse_config(data, base=Path("/x"))
    smallest = {"agent": {"name": "a", "listen": "0.0.0.0:1"}}
    assert written == parse_config(smallest, base=Path("/x"))
