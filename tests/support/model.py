"""The plain model of a group: a list of writes. State after n of them is found by doing them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Write:
    """One request: `data` is None for zeroes and discards."""

    kind: str
    volume: str
    offset: int
    length: int
    data: bytes | None

    def blocks(self) -> tuple[int, int]:
        """First block touched and the one behind the last."""
        return self.offset // BLOCK, -(-(self.offset + self.length) // BLOCK)


@dataclass
class Model:
    """Volumes of zeroes, and what was written to them, in order."""

    sizes: dict[str, int]
    writes: list[Write] = field(default_factory=list)

    def state(self, count: int) -> dict[str, bytes]:
        """Content of every volume after the first `count` writes."""
        volumes = {name: bytearray(size) for name, size in self.sizes.items()}
        for write in self.writes[:count]:
            volumes[write.volume][write.offset : write.offset + write.length] = (
                write.data if write.data is not None else bytes(write.length)
            )
        return {name: bytes(content) for name, content in volumes.items()}


def random_write(
    rng: random.Random,
    sizes: dict[str, int],
    *,
    longest: int = 128 << 10,
    aligned_zero: bool = True,
) -> Write:
    """A write, zero or discard anywhere; sub-block writes are common, as database logs make them.

    `aligned_zero`: zeroes and discards cover whole blocks, so that each is one record.
    """
    volume = rng.choice(sorted(sizes))
    size = sizes[volume]
    kind = rng.choices(["write", "zero", "trim"], [8, 1, 1])[0]
    step = rng.choice([1, 512, BLOCK, BLOCK]) if kind == "write" or not aligned_zero else BLOCK
    length = max(step, rng.choice([1, 4, 16, longest // BLOCK]) * BLOCK // rng.choice([1, 1, 3]))
    length = min(length // step * step, size)
    offset = rng.randrange(0, (size - length) // step + 1) * step
    if kind != "write":
        return Write(kind, volume, offset, length, None)
    pattern = rng.choice(["random", "text", "same"])
    if pattern == "random":
        data = rng.randbytes(length)
    elif pattern == "text":
        data = (f"row {rng.randrange(1 << 30)} ".encode() * (length // 4 + 1))[:length]
    else:
        data = bytes([rng.choice([0, 0x55])]) * length
    return Write(kind, volume, offset, length, data)
