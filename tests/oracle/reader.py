"""Read segments from the format pages alone, with no native code: slow, simple, independent.

Written after `docs/format/frame.md`, `record-table.md` and `segment.md`; shares nothing with
`native/core` but those pages. Every check of the pages is made; the first that fails raises
`DamagedError`. It is an oracle for tests, and what a rescue of a log without our binary would start
as.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lz4.block
import xxhash
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from gmssl import sm3

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK_SIZE = 4096
CELL_BLOCKS = 16
HEADER_LEN = 256
AAD_LEN = 152
TAG_LEN = 16
FRAME_BLOCKS_MAX = 511
FRAME_RECORDS_MAX = 65536
FRAME_BYTES_MAX = 4 << 20
RECORD_BLOCKS_MAX = 256
VOLUME_BLOCKS_MAX = (1 << 50) // BLOCK_SIZE
REFERENCE_CELLS_MAX = 32
HEADER_CELL = 0xFFFFFFFF
SM4_GCM, AES_256_GCM = 1, 2
RAW, LZ4, LZ4_REFS = 0, 1, 2
EVENTS = 1
KINDS = {
    1: "WRITE",
    2: "RESYNC",
    3: "ZERO",
    4: "DISCARD",
    5: "BOOKMARK",
    6: "BARRIER",
    7: "SPAN_BEGIN",
    8: "SPAN_END",
    9: "GAP",
    10: "CLOCK_STEP",
    11: "VOLUME",
}
# Payload of a block: data, zeroes, the same as before.
LETTERS = "D0="


class DamagedError(Exception):
    """The bytes are not what the format pages say."""


def require(condition: bool, finding: str) -> None:
    if not condition:
        raise DamagedError(finding)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def sm3_digest(data: bytes) -> bytes:
    return bytes.fromhex(sm3.sm3_hash(list(data)))


def hmac_of(suite: int, key: bytes, message: bytes) -> bytes:
    if suite == AES_256_GCM:
        return hmac.digest(key, message, "sha256")
    block = (sm3_digest(key) if len(key) > 64 else key).ljust(64, b"\0")
    inner = sm3_digest(bytes(byte ^ 0x36 for byte in block) + message)
    return sm3_digest(bytes(byte ^ 0x5C for byte in block) + inner)


def hkdf_expand(suite: int, key: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, section 2.3."""
    out, last = b"", b""
    while len(out) < length:
        last = hmac_of(suite, key, last + info + bytes([len(out) // 32 + 1]))
        out += last
    return out[:length]


class Bytes:
    """A cursor over foreign bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, length: int) -> bytes:
        require(self.at + length <= len(self.data), "truncated")
        self.at += length
        return self.data[self.at - length : self.at]

    def u8(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.u8()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                require(byte != 0 or shift == 7, "a varint longer than it needs to be")
                require(value < 1 << 64, "a varint of more than 64 bits")
                return value
            require(shift < 70, "a varint of more than 64 bits")

    def zigzag(self) -> int:
        value = self.varint()
        return -(value + 1 >> 1) if value & 1 else value >> 1

    def text(self) -> str:
        try:
            return self.take(self.u8()).decode()
        except UnicodeDecodeError as error:
            raise DamagedError("a text that is not UTF-8") from error

    def end(self) -> None:
        require(self.at == len(self.data), "bytes left over")


def open_header(data: bytes, magic: bytes, reserved: list[tuple[int, int]]) -> bytes:
    """What every fixed header of 256 bytes has in common."""
    require(len(data) >= HEADER_LEN, "header truncated")
    header = data[:HEADER_LEN]
    require(header[:8] == magic, "other magic")
    version, header_len = struct.unpack_from("<HH", header, 8)
    require(version == 1 and header_len == HEADER_LEN, "other version")
    require(not any(any(header[at : at + size]) for at, size in reserved), "reserved not zero")
    (checksum,) = struct.unpack_from("<Q", header, 248)
    require(checksum == xxhash.xxh3_64_intdigest(header[:248]), "checksum of the header")
    return header


@dataclass(frozen=True, slots=True, kw_only=True)
class Incarnation:
    """What a segment header says."""

    group: bytes
    generation: tuple[int, int]
    incarnation: bytes
    salt: bytes
    suite: int
    first_frame: int

    @classmethod
    def parse(cls, data: bytes) -> Incarnation:
        reserved = [(12, 4), (98, 2), (140, 4), (176, 72)]
        header = open_header(data, b"EBBSEGMT", reserved)
        counter, site = struct.unpack_from("<QQ", header, 32)
        suite, _, first_frame = struct.unpack_from("<HHI", header, 96)
        require(suite in (SM4_GCM, AES_256_GCM), "unknown suite")
        return cls(
            group=header[16:32],
            generation=(counter, site),
            incarnation=header[48:64],
            salt=header[64:96],
            suite=suite,
            first_frame=first_frame,
        )

    def key(self, group_key: bytes) -> bytes:
        suite = struct.pack("<H", self.suite)
        info = b"ebbtide incarnation v1\0" + suite + self.group + self.incarnation
        return hkdf_expand(self.suite, hmac_of(self.suite, self.salt, group_key), info, 32)


@dataclass(slots=True, kw_only=True)
class Cell:
    sealed_len: int
    encoding: int
    references: list[tuple[int, int, int]]
    offset: int = 0


@dataclass(slots=True, kw_only=True)
class Frame:
    """One verified frame; cells are opened on demand."""

    data: bytes
    frame_no: int
    suite: int
    group: bytes
    generation: tuple[int, int]
    incarnation: bytes
    flags: int
    first_seq: int
    first_time_us: int
    last_time_us: int
    record_count: int
    payload_blocks: int
    lengths: tuple[int, int, int]
    ref_floor: int
    prev: bytes
    nonce_random: int
    records: list[dict[str, Any]] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)

    @property
    def digest(self) -> bytes:
        return sha256(self.data[:248])

    @classmethod
    def parse(cls, data: bytes) -> Frame:
        """The frame at the front of `data`, its records and its directory."""
        header = open_header(data, b"EBBFRAME", [(70, 2), (236, 12)])
        first_seq, first_time, last_time = struct.unpack_from("<QQQ", header, 72)
        record_count, payload_blocks, *lengths, ref_floor = struct.unpack_from("<6I", header, 96)
        total = HEADER_LEN + sum(lengths)
        require(total <= FRAME_BYTES_MAX, "frame too long")
        require(len(data) >= total, "frame truncated")
        counter, site = struct.unpack_from("<QQ", header, 32)
        frame = cls(
            data=data[:total],
            frame_no=struct.unpack_from("<I", header, 64)[0],
            suite=struct.unpack_from("<H", header, 68)[0],
            group=header[16:32],
            generation=(counter, site),
            incarnation=header[48:64],
            flags=struct.unpack_from("<I", header, 12)[0],
            first_seq=first_seq,
            first_time_us=first_time,
            last_time_us=last_time,
            record_count=record_count,
            payload_blocks=payload_blocks,
            lengths=(lengths[0], lengths[1], lengths[2]),
            ref_floor=ref_floor,
            prev=header[200:232],
            nonce_random=struct.unpack_from("<I", header, 232)[0],
        )
        frame.check()
        return frame

    def check(self) -> None:
        table_len, directory_len, _ = self.lengths
        body = self.data[HEADER_LEN:]
        require(sha256(body) == self.data[168:200], "body_digest")
        require(sha256(body[: table_len + directory_len]) == self.data[120:152], "table_digest")
        require(self.flags & ~7 == 0, "unknown flag")
        require(0 < self.record_count <= FRAME_RECORDS_MAX, "record_count")
        require(self.payload_blocks <= FRAME_BLOCKS_MAX, "payload_blocks")
        require(self.first_seq > 0, "first_seq")
        require(self.ref_floor <= self.frame_no < 1 << 31, "frame_no or ref_floor")
        require(self.frame_no > 0 or self.prev == bytes(32), "prev of the first frame")
        self.records = list(self.read_table(Bytes(body[:table_len])))
        self.read_directory(Bytes(body[table_len : table_len + directory_len]))

    def read_table(self, table: Bytes) -> Iterator[dict[str, Any]]:
        time, volume, end, payload_block, events = self.first_time_us, 0, 0, 0, False
        for index in range(self.record_count):
            head, delta = table.u8(), table.varint()
            require((delta == 0) == (index == 0), "time does not grow")
            time += delta
            kind, mode, same = KINDS.get(head & 15), head >> 4 & 7, head >> 7
            require(kind is not None, "unknown kind")
            record: dict[str, Any] = {"kind": kind, "seq": self.first_seq + index, "time_us": time}
            has_extent, has_payload = head & 15 <= 4, head & 15 <= 2
            require(has_extent or not same, "bit 7 of a kind without extent")
            require(mode <= (3 if has_payload else 0), "payload mode")
            if has_extent:
                if not same:
                    named = table.varint()
                    require(named != volume and named < 1024, "volume")
                    volume = named
                start = end + table.zigzag()
                blocks = table.varint()
                end = start + blocks
                limit = RECORD_BLOCKS_MAX if has_payload else VOLUME_BLOCKS_MAX
                require(start >= 0 and 0 < blocks <= limit, "extent")
                require(end <= VOLUME_BLOCKS_MAX, "extent")
                record |= {"volume": volume, "start": start, "blocks": blocks}
            else:
                events = True
            if has_payload:
                payload = LETTERS[mode] * blocks if mode < 3 else self.read_map(table, blocks)
                record |= {"payload": payload, "payload_block": payload_block}
                payload_block += payload.count("D")
            self.read_fields(record, table)
            yield record
        table.end()
        require(time == self.last_time_us, "last_time_us")
        require(payload_block == self.payload_blocks, "payload_blocks")
        require(events == bool(self.flags & EVENTS), "flag EVENTS")

    @staticmethod
    def read_map(table: Bytes, blocks: int) -> str:
        codes = int.from_bytes(table.take((blocks + 3) // 4), "little")
        require(codes >> 2 * blocks == 0, "bits behind the last block")
        each = [codes >> 2 * at & 3 for at in range(blocks)]
        require(3 not in each and len(set(each)) > 1, "a map of unknown codes, or of one only")
        return "".join(LETTERS[code] for code in each)

    @staticmethod
    def read_fields(record: dict[str, Any], table: Bytes) -> None:
        match record["kind"]:
            case "BOOKMARK":
                record["label"] = table.text()
            case "SPAN_BEGIN":
                record["cause"] = table.u8()
            case "GAP":
                record["cause"] = table.u8()
                for name in ("first_seq", "end_seq", "first_time_us", "bytes"):
                    record[name] = table.varint()
                require(record["first_seq"] <= record["end_seq"], "gap")
            case "CLOCK_STEP":
                record["us"] = table.zigzag()
            case "VOLUME":
                record |= {"volume": table.varint(), "size": table.varint(), "name": table.text()}
        require(1 <= record.get("cause", 1) <= 9, "unknown cause")

    def read_directory(self, directory: Bytes) -> None:
        offset = HEADER_LEN + self.lengths[0] + self.lengths[1]
        left = self.payload_blocks
        while left > 0:
            sealed_len = int.from_bytes(directory.take(3), "little")
            encoding, count = directory.u8(), directory.u8()
            raw_sealed = min(left, CELL_BLOCKS) * BLOCK_SIZE + 24
            fits = sealed_len == raw_sealed if encoding == RAW else 24 < sealed_len < raw_sealed
            require(fits and encoding <= LZ4_REFS, "sealed_len or encoding")
            require((count > 0) == (encoding == LZ4_REFS), "references")
            references = [
                (directory.varint(), directory.varint(), directory.u8()) for _ in range(count)
            ]
            require(sum(blocks for _, _, blocks in references) <= 16, "references")
            for back, first, blocks in references:
                limit = len(self.cells) * CELL_BLOCKS if back == 0 else FRAME_BLOCKS_MAX
                require(blocks > 0 and first + blocks <= limit, "reference forward")
                require(self.frame_no - back >= self.ref_floor, "reference below the floor")
            cell = Cell(sealed_len=sealed_len, encoding=encoding, references=references)
            cell.offset = offset
            offset += sealed_len
            self.cells.append(cell)
            left -= CELL_BLOCKS
        directory.end()
        require(offset == len(self.data), "cells_len")


class Segment:
    """A whole segment, verified without the key; with it, payload can be read."""

    def __init__(self, data: bytes, group_key: bytes) -> None:
        self.incarnation = Incarnation.parse(data)
        self.key = self.incarnation.key(group_key)
        self.frames: dict[int, Frame] = {}
        number, prev = self.incarnation.first_frame, None
        at = HEADER_LEN
        while at < len(data):
            frame = Frame.parse(data[at:])
            for name in ("group", "incarnation", "suite", "generation"):
                require(getattr(frame, name) == getattr(self.incarnation, name), f"other {name}")
            require(frame.frame_no == number, "frame_no does not follow")
            require(prev is None or frame.prev == prev, "prev does not follow")
            self.unseal(frame, HEADER_CELL, b"", frame.data[152:168])
            self.frames[number] = frame
            number, prev = number + 1, frame.digest
            at += len(frame.data)

    def unseal(self, frame: Frame, cell: int, text: bytes, tag: bytes) -> bytes:
        suite = frame.suite
        info = b"ebbtide frame v1\0" + struct.pack("<I", frame.frame_no)
        key = hkdf_expand(suite, self.key, info, 16 if suite == SM4_GCM else 32)
        nonce = struct.pack("<III", frame.frame_no, cell, frame.nonce_random)
        algorithm: Callable[[bytes], Any] = (
            algorithms.SM4 if suite == SM4_GCM else algorithms.AES256
        )
        opener = Cipher(algorithm(key), modes.GCM(nonce, tag)).decryptor()
        opener.authenticate_additional_data(frame.data[:AAD_LEN])
        try:
            return opener.update(text) + opener.finalize()
        except InvalidTag as error:
            raise DamagedError(f"tag of frame {frame.frame_no}, cell {cell}") from error

    def cell(self, number: int, index: int, opened: dict[tuple[int, int], bytes]) -> bytes:
        """Raw blocks of one cell; `opened` bounds and remembers what its references need."""
        if (number, index) in opened:
            return opened[number, index]
        require(number in self.frames, "a reference to a frame that is not here")
        frame = self.frames[number]
        require(index < len(frame.cells), "a reference behind the end of a frame")
        cell = frame.cells[index]
        dictionary = b""
        for back, first, blocks in cell.references:
            for block in range(first, first + blocks):
                raw = self.cell(number - back, block // CELL_BLOCKS, opened)
                at = block % CELL_BLOCKS * BLOCK_SIZE
                require(at < len(raw), "a reference behind the end of a frame")
                dictionary += raw[at : at + BLOCK_SIZE]
        require(len(opened) < REFERENCE_CELLS_MAX, "a cell that needs too many cells")
        sealed = frame.data[cell.offset : cell.offset + cell.sealed_len]
        text = self.unseal(frame, index, sealed[:-TAG_LEN], sealed[-TAG_LEN:])
        raw_len = min(frame.payload_blocks - index * CELL_BLOCKS, CELL_BLOCKS) * BLOCK_SIZE
        raw = text[8:]
        if cell.encoding != RAW:
            try:
                raw = lz4.block.decompress(raw, uncompressed_size=raw_len, dict=dictionary)
            except lz4.block.LZ4BlockError as error:
                raise DamagedError("an LZ4 block") from error
        require(len(raw) == raw_len, "length of a cell")
        require(xxhash.xxh3_64_intdigest(raw).to_bytes(8, "little") == text[:8], "content digest")
        opened[number, index] = raw
        return raw

    def payload(self, number: int) -> bytes:
        """The payload stream of one frame."""
        cells = range(len(self.frames[number].cells))
        return b"".join(self.cell(number, index, {}) for index in cells)
