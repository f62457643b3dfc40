"""Guards what the agent remembers: a crash leaves the old or the new state, damage is named."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ebbtide.control import state
from ebbtide.control.meter import Quantiles, Rates
from ebbtide.control.names import check_name
from ebbtide.control.state import AgentState, StateStore, TargetRecord
from ebbtide.errors import DamagedError, NoSpaceError, NotFoundError, RefusedError, UsageError
from ebbtide.rpc import agent_pb2 as api
from ebbtide.rpc import framing
from ebbtide.source.volumes import prepare
from ebbtide.target.receiver import check_generation

if TYPE_CHECKING:
    from pathlib import Path


def target_record(counter: int = 3, site: int = 7) -> TargetRecord:
    return TargetRecord(
        group="ab" * 16,
        name="g",
        suite=1,
        wrapped_key="00",
        source_peer="source",
        journal_dir="/nowhere",
        promised_counter=counter,
        promised_site=site,
    )


async def test_state_survives_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "agent.json"
    store = StateStore(path)
    store.value.targets["x"] = target_record()
    await store.save()
    assert path.stat().st_mode & 0o777 == 0o600
    assert StateStore(path).value == store.value
    assert os.listdir(tmp_path) == ["agent.json"]


async def test_a_failed_save_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "agent.json"
    store = StateStore(path)
    await store.save()
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state.os, "fsync", full)
    store.value.targets["x"] = target_record()
    with pytest.raises(NoSpaceError):
        await store.save()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["agent.json"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": 2}', b'{"surprise": 1}'])
def test_a_damaged_state_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "agent.json"
    path.write_bytes(content)
    with pytest.raises(DamagedError):
        StateStore(path)
    assert AgentState().version == 1


def test_rates_follow_counters_and_their_restarts() -> None:
    rates = Rates()
    rates.sample(0, 10)
    assert rates.rate() == 0.0
    rates.sample(1000, 20)
    assert rates.rate(0) > rates.rate(1) > 0
    rates.sample(5, 30)
    assert rates.rate() == 0.0


def test_quantiles() -> None:
    quantiles = Quantiles()
    assert quantiles.at(0.5) == 0
    for value in range(100):
        quantiles.add(value)
    assert quantiles.at(0.5) == 50
    assert quantiles.at(0.99) == 99


@pytest.mark.parametrize("name", ["", "-a", "a/b", "a b", "x" * 65, ".hidden", "\u00e9"])
def test_unfit_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name, "group")


def volume(name: str, path: Path | str, create: int = 0) -> api.ProtectVolume:
    return api.ProtectVolume(name=name, backing=str(path), create_bytes=create)


def test_images_are_made_and_taken_back(tmp_path: Path) -> None:
    records, made = prepare([volume("a", tmp_path / "a", 1 << 20)], [])
    assert made == [tmp_path / "a"]
    assert (tmp_path / "a").stat().st_size == 1 << 20
    assert [(record.index, record.name) for record in records] == [(0, "a")]
    with pytest.raises(NotFoundError):
        prepare([volume("b", tmp_path / "b", 1 << 20), volume("c", tmp_path / "c")], [])
    assert not (tmp_path / "b").exists()


def test_unfit_volumes_are_refused(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(8192))
    (tmp_path / "link").symlink_to(image)
    with pytest.raises(UsageError, match="1 to 1024"):
        prepare([], [])
    with pytest.raises(UsageError, match="two volumes"):
        prepare([volume("a", image), volume("a", image)], [])
    with pytest.raises(RefusedError, match="already protected"):
        prepare([volume("a", image), volume("b", tmp_path / "link")], [])
    with pytest.raises(UsageError, match="neither"):
        prepare([volume("a", tmp_path)], [])
    with pytest.raises(UsageError, match="absolute"):
        prepare([volume("a", "image")], [])
    with pytest.raises(UsageError, match="size"):
        prepare([volume("a", tmp_path / "odd", 4097)], [])


def test_an_older_generation_is_fenced() -> None:
    record = target_record(3, 7)
    assert not check_generation(record, 3, 7)
    assert check_generation(record, 3, 8)
    assert check_generation(record, 4, 0)
    for counter, site in ((2, 9), (3, 6)):
        with pytest.raises(RefusedError) as fenced:
            check_generation(record, counter, site)
        assert fenced.value.code == "fenced"


def test_short_messages_have_no_tag() -> None:
    assert framing.tag_of(b"FRAMxyz") == framing.FRAMES
    with pytest.raises(DamagedError):
        framing.tag_of(b"FRA")
