"""A misspelt key never passes in silence, and every finding says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebbtide.config import Config, load_config, parse_config, split_address
from ebbtide.errors import ConfigError, ExitCode

BASE = Path("/srv/ebb")


def parse(**data: object) -> Config:
    return parse_config({"agent": {"name": "his-a"}, **data}, base=BASE)


def test_smallest_file_and_absolute_paths() -> None:
    config = parse()
    assert config.agent.state_dir == BASE / "state"
    assert config.socket == BASE / "agent.sock"
    assert config.identity.key == BASE / "identity/agent.key"
    assert config.source.spool_bytes_max == 20 << 30


def test_sizes_and_absolute_path_stay() -> None:
    config = parse(source={"spool_dir": "/mnt/spool", "spool_bytes_max": "1.5GiB"})
    assert config.source.spool_dir == Path("/mnt/spool")
    assert config.source.spool_bytes_max == 3 << 29


@pytest.mark.parametrize(
    ("data", "said", "hint"),
    [
        ({"source": {"spool_byte_max": 1}}, "'spool_byte_max' in [source]", "'spool_bytes_max'"),
        ({"source": {"journal_dir": "x"}}, "unknown key 'journal_dir'", "belongs in [target]"),
        ({"sorce": {}}, "unknown key 'sorce'", "did you mean 'source'?"),
        ({"agent": {"name": "a", "zzz": 1}}, "'zzz' in [agent]", "known here: name"),
        ({"peer": {"b": {"certificate": "x", "adress": "h:1"}}}, "adress", "'address'"),
        ({"peer": {"b": {"address": "h:1"}}}, "[peer.b] certificate is missing", "agent-toml.md"),
    ],
)
def test_unknown_keys_are_refused_with_a_suggestion(
    data: dict[str, object], said: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(**data)
    assert said in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.exit_code is ExitCode.CONFIG


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"agent": {}}, "[agent] name is missing"),
        ({"agent": {"name": "Bad Name"}}, "name"),
        ({"agent": {"name": "a", "listen": "nowhere"}}, "not HOST:PORT"),
        ({"source": {"spool_bytes_max": "1MiB"}}, "greater than or equal to 268435456, not"),
        ({"source": {"spool_bytes_max": "lots"}}, "'lots' is not a size"),
        ({"ship": {"retry_min_s": 20.0}}, "retry_min_s is larger"),
        ({"log": {"level": "loud"}}, "'loud'"),
        ({"peer": {"his-a": {"certificate": "x"}}}, "name of this agent"),
        ({"peer": {"b": {"certificate": "x", "address": "h:0"}}}, "port 0"),
    ],
)
def test_bad_values_are_named(data: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(**data)
    assert said in caught.value.message


def test_every_finding_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(source={"spol": 1}, target={"overlay_bytes_max": "1"})
    assert "spol" in caught.value.message
    assert "overlay_bytes_max" in caught.value.message


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(path)
    path.write_text("[agent\n")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(path)
    path.write_text('[agent]\nname = "a"\n')
    assert load_config(path).agent.state_dir == tmp_path / "state"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("h:1", ("h", 1)), ("10.0.0.2:7380", ("10.0.0.2", 7380)), ("[::1]:9", ("::1", 9))],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert split_address(text) == expected


@pytest.mark.parametrize("text", ["h", ":1", "h:x", "h:70000", "::1:9", "[h]:1", "-h:1", "a b:1"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        split_address(text)
