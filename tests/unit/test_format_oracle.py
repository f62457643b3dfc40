"""Native frames read by a second program that knows only the format pages.

Guards against a format that is what the code does and not what the pages say: then nobody could
read a log without our binary.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.oracle.reader import EVENTS, HEADER_LEN, DamagedError, Frame, Segment, sm3_digest

VECTORS = Path(__file__).parents[1] / "vectors"
SEGMENTS = ["segment-v1-sm4", "segment-v1-aes"]


def load(name: str) -> tuple[bytes, dict[str, Any]]:
    expected = json.loads((VECTORS / f"{name}.json").read_text())
    return (VECTORS / f"{name}.seg").read_bytes(), expected


@pytest.mark.parametrize("name", SEGMENTS)
def test_the_oracle_reads_what_the_native_encoder_wrote(name: str) -> None:
    data, expected = load(name)
    segment = Segment(data, bytes.fromhex(expected["group_key"]))
    read = [
        {
            "frame_no": number,
            "events": bool(frame.flags & EVENTS),
            "digest": frame.digest.hex(),
            "payload_sha256": hashlib.sha256(segment.payload(number)).hexdigest(),
            "records": frame.records,
        }
        for number, frame in segment.frames.items()
    ]
    assert read == expected["frames"]
    encodings = {cell.encoding for frame in segment.frames.values() for cell in frame.cells}
    assert encodings == {0, 1, 2}, "the file shows every encoding"


@pytest.mark.parametrize("name", SEGMENTS)
def test_the_oracle_finds_any_damage(name: str) -> None:
    data, expected = load(name)
    key = bytes.fromhex(expected["group_key"])
    dice = random.Random(2)
    # Every byte of the headers and the first table, some of the rest.
    places = [*range(HEADER_LEN * 2 + 100), *dice.sample(range(len(data)), 100)]
    for at in places:
        damaged = bytearray(data)
        damaged[at] ^= 1 << dice.randrange(8)
        with pytest.raises(DamagedError):
            Segment(bytes(damaged), key)
    ends = [HEADER_LEN]
    while ends[-1] < len(data):
        ends.append(ends[-1] + len(Frame.parse(data[ends[-1] :]).data))
    for end in dice.sample(range(len(data)), 30):
        if end not in ends:
            with pytest.raises(DamagedError):
                Segment(data[:end], key)


def test_another_key_opens_nothing() -> None:
    for name in SEGMENTS:
        data, _ = load(name)
        with pytest.raises(DamagedError, match="tag of frame 0"):
            Segment(data, bytes(32))


def test_the_oracle_agrees_with_the_published_hash() -> None:
    for case in json.loads((VECTORS / "sm3.json").read_text())["cases"]:
        assert sm3_digest(bytes.fromhex(case["message"])).hex() == case["digest"]
