"""The demo's own logic: the ledger, the database on a socket, the search, the sweep.

That the demo as a whole works is an integration test; here each part must be able to fail.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from ebbtide.cli.demo.clinics import FILE_EVERY, SocketClinic
from ebbtide.cli.demo.hosts import TOKEN_NAME, loops_below, marked, mounts_below, sweep
from ebbtide.cli.demo.records import TABLES, Contents, Ward, digest_row, read_rows
from ebbtide.cli.demo.search import first_bad, recorded_writes
from ebbtide.errors import InternalError
from ebbtide.rpc.agent_pb2 import HistoryRecord, PointsRequest, PointsResult, View
from tests.unit.fake_nbd import FakeNbd, serve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeNbd]:
    yield from serve(tmp_path / "nbd.sock", 16 << 20)


def view_of(server: FakeNbd, point: int | None) -> View:
    server.point = point
    view = View(id="v")
    view.volumes.add(name="data", nbd_uri=server.uri)
    return view


def test_ledger_equals_the_database_and_notices_each_change() -> None:
    ward = Ward(seed=1)
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        ward.set_up(database)
        for _ in range(30):
            ward.transaction(database)
        assert read_rows(database) == ward.ledger
        database.execute("UPDATE orders SET dose_mg = dose_mg + 1 WHERE id = 3")
        assert ward.ledger.missing_from(read_rows(database)) == (1, 0)
        database.execute("DROP TABLE surgeries")
        found = read_rows(database)
        assert found != ward.ledger
        assert "surgeries" in found.integrity


def test_digests_tell_types_and_borders_apart() -> None:
    rows: list[tuple[object, ...]] = [(1, "a"), ("1", "a"), (1, "a", ""), (1, "", "a"), (1, "b")]
    assert len({digest_row(row) for row in rows}) == len(rows)


def test_every_prefix_of_a_socket_clinic_is_a_committed_state(server: FakeNbd) -> None:
    clinic = SocketClinic(cast("Any", SimpleNamespace()), "his")
    clinic.set_up(server.uri)
    states = [(len(server.writes), clinic.ward.ledger.copy())]
    for _ in range(FILE_EVERY + 2):
        clinic.work()
        states.append((len(server.writes), clinic.ward.ledger.copy()))
    assert len(clinic.ward.ledger.files) == 1
    assert server.flushes == len(states)
    clinic.accident()
    clinic.close()
    for point, ledger in states[:2] + states[-4:]:
        assert clinic.read(view_of(server, point)) == ledger
    assert clinic.read(view_of(server, 0)) == Contents(integrity="no database")
    after = clinic.read(view_of(server, None))
    rows, files = states[-1][1].missing_from(after)
    assert (rows, files) == (len(states[-1][1].rows), 1)

    records = [HistoryRecord(seq=n) for n in range(states[-1][0], len(server.writes) + 1)]

    def is_whole(record: HistoryRecord) -> bool:
        return clinic.read(view_of(server, record.seq)) == states[-1][1]

    assert first_bad(records, is_whole).seq == states[-1][0] + 1


@pytest.mark.parametrize("size", [2, 3, 17, 1000])
def test_search_finds_every_place(size: int) -> None:
    records = [HistoryRecord(seq=10 + n, time_us=n) for n in range(size)]
    for bad in {1, size // 2 or 1, size - 1}:
        culprit = first_bad(records, lambda record, bad=bad: record.seq < 10 + bad)
        assert culprit.seq == 10 + bad
        assert culprit.tried <= 2 + size.bit_length()


@pytest.mark.parametrize("whole", [True, False])
def test_search_refuses_when_there_is_nothing_between(whole: bool) -> None:
    records = [HistoryRecord(seq=n) for n in range(5)]
    with pytest.raises(InternalError, match="not within"):
        first_bad(records, lambda _: whole)
    with pytest.raises(InternalError):
        first_bad(records[:1], lambda _: True)


def test_long_lists_are_read_page_by_page() -> None:
    kinds = ("write", "barrier", "zero", "bookmark")
    history = [HistoryRecord(seq=n, time_us=n, kind=kinds[n % 4]) for n in range(1, 50)]

    class Pages:
        def call(self, method: str, request: PointsRequest, *, timeout_s: float) -> PointsResult:
            assert (method, request.writes) == ("Points", True)
            assert timeout_s > 0
            found = [r for r in history if request.from_us <= r.time_us <= request.to_us]
            return PointsResult(records=found[:7], truncated=len(found) > 7)

    found = recorded_writes(cast("Any", Pages()), "his", 3, 40)
    assert [r.seq for r in found] == [n for n in range(3, 41) if n % 4 in (0, 2)]


def test_sweep_ends_marked_processes_and_only_those(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"]
    token = "token-of-this-test"
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, TOKEN_NAME: value})
        for value in (token, "another")
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        assert marked(token) == [processes[0].pid]
        assert sweep(tmp_path, token) == [f"process {processes[0].pid}"]
        assert processes[0].wait(5) == -15
        assert processes[1].poll() is None
        assert sweep(tmp_path, token) == []
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.mark.needs("root", "loop", "mkfs.ext4", "losetup")
def test_sweep_unmounts_and_frees_loop_devices(tmp_path: Path) -> None:
    image, where = tmp_path / "x.img", tmp_path / "mnt"
    where.mkdir()
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, where], check=True)
    assert mounts_below(tmp_path) == [str(where)]
    (device,) = loops_below(tmp_path)
    found = sweep(tmp_path, "no-such-token")
    assert f"mount {where}" in found
    assert mounts_below(tmp_path) == []
    assert loops_below(tmp_path) == []
    assert device.startswith("/dev/loop")


def test_tables_of_the_accident() -> None:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        ward = Ward(seed=2)
        ward.set_up(database)
        from ebbtide.cli.demo.records import ACCIDENT

        database.executescript(ACCIDENT)
        left = database.execute("SELECT name FROM sqlite_master WHERE type='table'").fetchall()
    assert left == []
    assert len(TABLES) == 3
