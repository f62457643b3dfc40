"""Order: however requests race, history and the source agree about who came last.

Guards the ordering point (design section 5): 8 connections keep 32 requests each in flight on the
same 64 blocks, sub-block and overlapping writes, discards and zeroes mixed in. After every round
the newest view at the target equals the source, byte for byte.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.support.model import BLOCK, random_write
from tests.support.nbd import Client
from tests.support.stack import Stack

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.needs("root"),
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("leak_check"),
]
BLOCKS = 64
CONNECTIONS = 8
DEPTH = 32
REQUESTS = 400
SIZES = {"hot": BLOCKS * BLOCK}


def hammer(uri: str, requests: int, rng: random.Random) -> None:
    """Keep DEPTH requests in flight until `requests` are done; every one must succeed."""
    failed: list[int] = []
    with Client(uri) as client:

        def done(error: int) -> int:
            if error:
                failed.append(error)
            return 1

        for _ in range(requests):
            while client.in_flight() >= DEPTH:
                client.poll()
            if rng.random() < 0.01:
                client.submit("flush", b"", 0, 0, done)
            write = random_write(rng, SIZES, longest=32 << 10, aligned_zero=False)
            client.submit(write.kind, write.data or b"", write.length, write.offset, done)
        while client.in_flight():
            client.poll()
        client.flush()
    assert not failed


def test_newest_view_equals_source_after_every_round(
    tmp_path: Path, rng: random.Random, rounds: Callable[[int], int]
) -> None:
    seeds = [type(rng)(rng.random()) for _ in range(CONNECTIONS)]
    with Stack.run(tmp_path) as stack, ThreadPoolExecutor(CONNECTIONS) as pool:
        stack.protect("race", SIZES)
        uri = stack.uri("race", "hot")
        for number in range(rounds(100)):
            list(pool.map(lambda seed: hammer(uri, REQUESTS, seed), seeds))
            stack.wait_durable("race")
            with Client(uri) as client:
                source = client.read_all()
            with stack.view("race") as view, Client(view.volumes[0].nbd_uri) as client:
                newest = client.read_all()
            differing = [
                block
                for block in range(BLOCKS)
                if source[block * BLOCK :][:BLOCK] != newest[block * BLOCK :][:BLOCK]
            ]
            assert not differing, f"round {number}: blocks {differing} differ"
