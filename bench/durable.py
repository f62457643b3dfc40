"""When which record became durable at the target, without asking its agent: from the log's files.

A log notes in `synced` what is durable, right after each sync (`docs/format/log-directory.md`).
Reading those 64 bytes takes microseconds and no time of the agent, whose lag is being measured;
which records they speak of is looked up afterwards in the frames' headers.
"""

from __future__ import annotations

import bisect
import os
import struct
import threading
import time
from typing import TYPE_CHECKING

import xxhash

from bench.errors import UnavailableError

if TYPE_CHECKING:
    from pathlib import Path

#: Seconds between two looks: counts as lag, half of it on average.
LOOK_S = 0.0005
_NOTE_LEN = 64
_HEADER_LEN = 256

#: A segment by incarnation ordinal and first frame, and how many of its bytes are durable.
Note = tuple[int, int, int]


class DurableWatch:
    """Looks at the note of a journal from a thread of its own, while the context is entered."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._seen: list[tuple[int, Note]] = []
        self._times_ns: list[int] = []
        self._seqs: list[int] = []

    def __enter__(self) -> DurableWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        ends = _Ends(self._journal)
        for at_ns, note in self._seen:
            self._times_ns.append(at_ns)
            self._seqs.append(ends.seq(note))

    def durable_at_ns(self, seq: int) -> int | None:
        """When `seq` was first seen durable, on the monotonic clock; after the context."""
        at = bisect.bisect_left(self._seqs, seq)
        return self._times_ns[at] if at < len(self._seqs) else None

    def _watch(self) -> None:
        note = os.open(self._journal / "synced", os.O_RDONLY)
        try:
            while not self._over.wait(LOOK_S):
                found = _parse(os.pread(note, _NOTE_LEN, 0))
                # After the look: what it says was true before, so lag is never flattered.
                now = time.monotonic_ns()
                if found is not None and (not self._seen or self._seen[-1][1] != found):
                    self._seen.append((now, found))
        finally:
            os.close(note)


def _parse(note: bytes) -> Note | None:
    """None for a note that is just being written."""
    if len(note) < _NOTE_LEN:
        return None
    (checksum,) = struct.unpack_from("<Q", note, 56)
    if xxhash.xxh3_64_intdigest(note[:56]) != checksum:
        return None
    ordinal, first_frame, length = struct.unpack_from("<IIQ", note, 32)
    return ordinal, first_frame, length


class _Ends:
    """Last seq of a segment's first so many bytes; each segment is walked once."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        #: Ends of the frames of a segment, and their last seqs.
        self._walked: dict[tuple[int, int], tuple[list[int], list[int]]] = {}

    def seq(self, note: Note) -> int:
        ordinal, first_frame, length = note
        segment = (ordinal, first_frame)
        if segment not in self._walked:
            self._walked[segment] = self._walk(*segment)
        ends, seqs = self._walked[segment]
        at = bisect.bisect_right(ends, length)
        return seqs[at - 1] if at else 0

    def _walk(self, ordinal: int, first_frame: int) -> tuple[list[int], list[int]]:
        found = list(self._journal.glob(f"{ordinal:08x}-{first_frame:08x}*"))
        files = [path for path in found if path.suffix in {".open", ".seg"}]
        if not files:
            raise UnavailableError("a segment is gone before it was looked at")
        ends: list[int] = []
        seqs: list[int] = []
        with files[0].open("rb") as file:
            at = _HEADER_LEN
            while len(header := os.pread(file.fileno(), _HEADER_LEN, at)) == _HEADER_LEN:
                if header[:8] != b"EBBFRAME":
                    break
                (first_seq,) = struct.unpack_from("<Q", header, 72)
                (records,) = struct.unpack_from("<I", header, 96)
                at += _HEADER_LEN + sum(struct.unpack_from("<III", header, 104))
                ends.append(at)
                seqs.append(first_seq + records - 1)
        return ends, seqs
