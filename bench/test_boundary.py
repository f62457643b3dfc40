"""Cases of the suite `boundary`, on the committed segment of three frames (26 KiB)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebbtide._native import History, Journal, LogReader
from ebbtide.rpc.framing import FRAMES, SEGMENT_HEADER_LEN, TAG_LEN

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_benchmark.fixture import BenchmarkFixture

SEGMENT = (Path(__file__).parents[1] / "tests/vectors/segment-v1-aes.seg").read_bytes()
HEADER, MESSAGE = SEGMENT[:SEGMENT_HEADER_LEN], FRAMES + SEGMENT[SEGMENT_HEADER_LEN:]
GROUP = HEADER[16:32]
ROUNDS = 50


def journals(tmp_path: Path) -> Callable[[], Journal]:
    """Makes empty journals that the segment's incarnation was announced to."""
    made = iter(range(10**9))

    def make() -> Journal:
        directory = tmp_path / str(next(made))
        directory.mkdir()
        journal = Journal(str(directory), GROUP)
        journal.begin(HEADER)
        return journal

    return make


def test_append(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Checks and writes three frames."""
    make = journals(tmp_path)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (make(), MESSAGE, TAG_LEN), {}

    end = benchmark.pedantic(Journal.append, setup=setup, rounds=ROUNDS)
    assert end.next_frame == 3


def test_sync(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Makes them durable: fdatasync and what surrounds it."""
    make = journals(tmp_path)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        journal = make()
        journal.append(MESSAGE, TAG_LEN)
        return (journal.sync_handle(),), {}

    benchmark.pedantic(lambda handle: handle.sync(), setup=setup, rounds=ROUNDS)


def test_next_batch(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Reads them back as one message for the wire."""
    journal = journals(tmp_path)()
    end = journal.append(MESSAGE, TAG_LEN)
    reader = LogReader(str(tmp_path / "0"), GROUP)

    def read() -> bytes:
        reader.seek()
        batch = reader.next_batch(end, 1 << 20)
        assert batch is not None
        return batch.message

    assert benchmark(read) == MESSAGE


def test_open_history(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Opens a history and indexes its open segment."""
    journal = journals(tmp_path)()
    end = journal.append(MESSAGE, TAG_LEN)
    history = benchmark(History, str(tmp_path / "0"), GROUP, end)
    assert history.timeline().records > 0
