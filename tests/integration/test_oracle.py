"""Oracle: views equal a plain list of writes, byte for byte, at any microsecond.

Guards invariants 1 (write order) and 5 (no garbage point), and S003-EMR-6 (microsecond rollback):
a real NBD client writes known content to two volumes of a group, across restarts of every process;
then views are opened at random points and one microsecond around single writes.
"""

from __future__ import annotations

import os
import signal
from bisect import bisect_right
from typing import TYPE_CHECKING

import pytest

from ebbtide.rpc import agent_pb2
from tests.support.model import Model, random_write
from tests.support.nbd import Client
from tests.support.stack import Stack, eventually, is_alive

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.needs("root"),
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("leak_check"),
]
SIZES = {"data": 4 << 20, "log": (1 << 20) + 512}
WRITES = 400


def restart(stack: Stack, what: str) -> None:
    """End one process in order or by force while no request is in flight."""
    if what == "tap":
        pid = stack.source.source("ward").tap.pid
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not is_alive(pid), what="the old tap is gone")
        eventually(
            lambda: stack.source.source("ward").tap.pid not in {0, pid}, what="a new tap serves"
        )
        eventually(
            lambda: not stack.source.source("ward").tap.in_span, what="the span of recovery ends"
        )
    else:
        host = getattr(stack, what)
        host.kill(signal.SIGTERM)
        host.start()


def play(stack: Stack, model: Model, rng: random.Random) -> None:
    """Write one after another, restarting a process now and then."""
    moments = {WRITES * n // 5: what for n, what in enumerate(["", "tap", "source", "target"])}
    clients: dict[str, Client] = {}
    for n in range(WRITES):
        if what := moments.get(n):
            for client in clients.values():
                client.flush()
                client.close()
            clients.clear()
            restart(stack, what)
        if not clients:
            clients = {name: Client(stack.uri("ward", name)) for name in SIZES}
        write = random_write(rng, SIZES)
        client = clients[write.volume]
        match write.kind:
            case "write":
                assert write.data is not None
                client.pwrite(write.data, write.offset, fua=rng.random() < 0.05)
            case "zero":
                client.zero(write.length, write.offset)
            case _:
                client.trim(write.length, write.offset)
        model.writes.append(write)
        if rng.random() < 0.05:
            client.flush()
    for client in clients.values():
        client.flush()
        client.close()


def times_of_writes(stack: Stack, model: Model, first_seq: int) -> list[int]:
    """`time_us` of each write, from the records, checked against the model's extents.

    Records before `first_seq` are the first copy.
    """
    result = stack.history.stub.Points(
        agent_pb2.PointsRequest(group="ward", writes=True, limit=100_000)
    )
    kinds = {"write": "write", "zero": "zero", "trim": "discard"}
    records = [
        found for found in result.records if found.kind in kinds.values() and found.seq >= first_seq
    ]
    assert len(records) == len(model.writes)
    for record, write in zip(records, model.writes, strict=True):
        first, end = write.blocks()
        assert record.kind == kinds[write.kind]
        assert record.volume == write.volume
        assert record.offset // 4096 == first
        assert -(-(record.offset + record.length) // 4096) == end
    assert [r.time_us for r in records] == sorted({r.time_us for r in records})
    return [record.time_us for record in records]


def compare(stack: Stack, model: Model, at_us: int, count: int, *, exact: bool = True) -> None:
    """A view at `at_us` shows both volumes after just `count` writes.

    Not `exact`: a point inside the span that a killed tap leaves shows the state before the span,
    which is the same, since nothing is written while a span is open here.
    """
    expected = model.state(count)
    with stack.view("ward", at_time_us=at_us, exact=exact) as view:
        for volume in view.volumes:
            with Client(volume.nbd_uri) as client:
                found = client.read_all()
            assert found == expected[volume.name], f"{volume.name} at {at_us} after {count} writes"


@pytest.mark.parametrize("local", [False, True], ids=["at-the-target", "without-a-target"])
def test_views_equal_the_model_at_any_microsecond(
    tmp_path: Path, rng: random.Random, rounds: Callable[[int], int], local: bool
) -> None:
    model = Model(SIZES)
    with Stack.run(tmp_path, local=local) as stack:
        stack.protect("ward", SIZES)
        first_seq = stack.source.source("ward").tap.last_seq + 1
        play(stack, model, rng)
        stack.wait_durable("ward")
        times = times_of_writes(stack, model, first_seq)
        for _ in range(rounds(500)):
            at = rng.randrange(times[0], times[-1] + 1)
            compare(stack, model, at, bisect_right(times, at), exact=False)
        for _ in range(rounds(250)):
            n = rng.randrange(1, WRITES)
            compare(stack, model, times[n], n + 1)
            compare(stack, model, times[n] - 1, n)
