//! Frame: a sealed batch of records; the unit of wire, storage, acknowledgement and evidence.
//!
//! ```text
//! header (FRAME_HEADER_LEN) | record table (table_len) | cell directory (directory_len) | cells
//! ```
//!
//! The header's bytes `[0, AAD_LEN)` are the additional data of every sealed cell and of the
//! header tag. They hold `table_digest`, so that each cell is bound to the records and to the
//! directory without hashing them again when one cell is read. `prev` and `body_digest` lie behind
//! them: frames can be sealed in parallel, only the digest of a 256-byte header is serial.

use super::FormatError;
pub use super::digest::Digest;
use super::digest::sha256;
use super::layout::{self, Field, Format};
use crate::constants::{
    BLOCK_SIZE, CELL_BLOCKS, FRAME_BLOCKS_MAX, FRAME_BYTES_MAX, FRAME_RECORDS_MAX,
    INCARNATION_FRAMES_MAX,
};
use crate::types::{FrameNo, Generation, GroupId, IncarnationId, Seq, TimeUs};

pub const FRAME_MAGIC: [u8; 8] = *b"EBBFRAME";
pub const FRAME_VERSION: u16 = 1;
pub const FRAME_HEADER_LEN: usize = 256;
/// Bytes of the header that are additional data of the seals: all up to `header_tag`.
pub const AAD_LEN: usize = 152;
/// Bytes of the header that the frame digest covers: all but the checksum.
pub const DIGEST_COVERS: usize = 248;
/// Bytes that sealing adds to a cell: content digest (8) and tag (16).
pub const CELL_OVERHEAD: usize = 24;
/// Shortest table entry: head and time.
pub const ENTRY_LEN_MIN: usize = 2;
/// Directory entry without references.
pub const DIRECTORY_ENTRY_LEN: usize = 5;

const GROUP: Field = Field::new("group", 16, 16);
const GENERATION_COUNTER: Field = Field::new("generation_counter", 32, 8);
const GENERATION_SITE: Field = Field::new("generation_site", 40, 8);
const INCARNATION: Field = Field::new("incarnation", 48, 16);
const FRAME_NO: Field = Field::new("frame_no", 64, 4);
const SUITE: Field = Field::new("suite", 68, 2);
const RESERVED_70: Field = Field::new("reserved_70", 70, 2);
const FIRST_SEQ: Field = Field::new("first_seq", 72, 8);
const FIRST_TIME: Field = Field::new("first_time_us", 80, 8);
const LAST_TIME: Field = Field::new("last_time_us", 88, 8);
const RECORD_COUNT: Field = Field::new("record_count", 96, 4);
const PAYLOAD_BLOCKS: Field = Field::new("payload_blocks", 100, 4);
const TABLE_LEN: Field = Field::new("table_len", 104, 4);
const DIRECTORY_LEN: Field = Field::new("directory_len", 108, 4);
const CELLS_LEN: Field = Field::new("cells_len", 112, 4);
const REF_FLOOR: Field = Field::new("ref_floor", 116, 4);
const TABLE_DIGEST: Field = Field::new("table_digest", 120, 32);
const HEADER_TAG: Field = Field::new("header_tag", 152, 16);
const BODY_DIGEST: Field = Field::new("body_digest", 168, 32);
const PREV: Field = Field::new("prev", 200, 32);
const NONCE_RANDOM: Field = Field::new("nonce_random", 232, 4);
const RESERVED_236: Field = Field::new("reserved_236", 236, 12);
const OWN: &[Field] = &[
    GROUP,
    GENERATION_COUNTER,
    GENERATION_SITE,
    INCARNATION,
    FRAME_NO,
    SUITE,
    RESERVED_70,
    FIRST_SEQ,
    FIRST_TIME,
    LAST_TIME,
    RECORD_COUNT,
    PAYLOAD_BLOCKS,
    TABLE_LEN,
    DIRECTORY_LEN,
    CELLS_LEN,
    REF_FLOOR,
    TABLE_DIGEST,
    HEADER_TAG,
    BODY_DIGEST,
    PREV,
    NONCE_RANDOM,
    RESERVED_236,
];

/// The header, field by field; `docs/format/frame.md` holds the same table.
pub const LAYOUT: &[Field] = &layout::header::<{ layout::fields(OWN) }>(OWN, FRAME_HEADER_LEN);

/// Limits that a reader checks; the page holds the same table.
pub const LIMIT_VALUES: &[(&str, u64)] = &[
    ("BLOCK_SIZE", BLOCK_SIZE as u64),
    ("CELL_BLOCKS", CELL_BLOCKS as u64),
    ("FRAME_BLOCKS_MAX", FRAME_BLOCKS_MAX as u64),
    ("FRAME_RECORDS_MAX", FRAME_RECORDS_MAX as u64),
    ("FRAME_BYTES_MAX", FRAME_BYTES_MAX as u64),
    ("INCARNATION_FRAMES_MAX", INCARNATION_FRAMES_MAX as u64),
    ("AAD_LEN", AAD_LEN as u64),
    ("CELL_OVERHEAD", CELL_OVERHEAD as u64),
];

const _: () = assert!(AAD_LEN == HEADER_TAG.offset && AAD_LEN == TABLE_DIGEST.end());
const _: () = assert!(DIGEST_COVERS == layout::checksum(FRAME_HEADER_LEN).offset);

const FORMAT: Format = Format {
    what: "frame header",
    magic: FRAME_MAGIC,
    version: FRAME_VERSION,
    header_len: FRAME_HEADER_LEN,
    reserved: &[RESERVED_70, RESERVED_236],
};

/// Flags of a frame (header bytes 12..16).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FrameFlags(pub u32);

impl FrameFlags {
    /// The table holds a record that is not plain data (bookmark, span, gap, volume, clock step,
    /// barrier).
    pub const EVENTS: u32 = 1;
    /// An inconsistent span is open at the frame's first record.
    pub const IN_SPAN: u32 = 1 << 1;
    /// Written by compaction.
    pub const COMPACTED: u32 = 1 << 2;
    pub const KNOWN: u32 = Self::EVENTS | Self::IN_SPAN | Self::COMPACTED;

    pub fn has(self, flag: u32) -> bool {
        self.0 & flag != 0
    }
}

/// Bits of the flags; the page holds the same table.
pub const FLAG_VALUES: &[(&str, u64)] = &[
    ("EVENTS", FrameFlags::EVENTS as u64),
    ("IN_SPAN", FrameFlags::IN_SPAN as u64),
    ("COMPACTED", FrameFlags::COMPACTED as u64),
];

/// The fixed header of a frame. All integers little-endian.
///
/// ```text
///   0 magic[8] "EBBFRAME"     8 version u16     10 header_len u16    12 flags u32
///  16 group[16]
///  32 generation.counter u64  40 generation.site u64
///  48 incarnation[16]
///  64 frame_no u32            68 suite u16      70 reserved u16
///  72 first_seq u64           80 first_time_us u64     88 last_time_us u64
///  96 record_count u32       100 payload_blocks u32
/// 104 table_len u32          108 directory_len u32
/// 112 cells_len u32          116 ref_floor u32  (frame number)
/// 120 table_digest[32]       SHA-256 over record table and cell directory ... ends at 152
/// 152 header_tag[16]         GCM tag over [0, 152), no plaintext
/// 168 body_digest[32]        SHA-256 over everything behind the header
/// 200 prev[32]               frame digest of the frame before, zero for frame 0
/// 232 nonce_random u32       part of every nonce of the frame
/// 236 reserved[12]
/// 248 checksum u64           XXH3-64 of [0, 248)
/// ```
///
/// The frame digest is SHA-256 over header bytes `[0, 248)`: it covers `prev` and `body_digest`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameHeader {
    pub flags: FrameFlags,
    pub group: GroupId,
    pub generation: Generation,
    pub incarnation: IncarnationId,
    pub frame_no: FrameNo,
    pub suite: u16,
    pub first_seq: Seq,
    pub first_time: TimeUs,
    pub last_time: TimeUs,
    pub record_count: u32,
    /// Raw blocks with payload; there are `payload_blocks.div_ceil(CELL_BLOCKS)` cells.
    pub payload_blocks: u32,
    pub table_len: u32,
    pub directory_len: u32,
    pub cells_len: u32,
    /// Lowest frame that any reference of this frame reaches, transitively; its own number if none.
    pub ref_floor: FrameNo,
    pub table_digest: Digest,
    pub header_tag: [u8; 16],
    pub body_digest: Digest,
    pub prev: Digest,
    pub nonce_random: u32,
}

impl FrameHeader {
    /// Encodes the header with its checksum.
    pub fn encode(&self) -> [u8; FRAME_HEADER_LEN] {
        let mut header = [0u8; FRAME_HEADER_LEN];
        FORMAT.begin(&mut header, self.flags.0);
        GROUP.put(&mut header, &self.group.0);
        GENERATION_COUNTER.put(&mut header, &self.generation.counter.to_le_bytes());
        GENERATION_SITE.put(&mut header, &self.generation.site.to_le_bytes());
        INCARNATION.put(&mut header, &self.incarnation.0);
        FRAME_NO.put(&mut header, &self.frame_no.0.to_le_bytes());
        SUITE.put(&mut header, &self.suite.to_le_bytes());
        FIRST_SEQ.put(&mut header, &self.first_seq.0.to_le_bytes());
        FIRST_TIME.put(&mut header, &self.first_time.0.to_le_bytes());
        LAST_TIME.put(&mut header, &self.last_time.0.to_le_bytes());
        RECORD_COUNT.put(&mut header, &self.record_count.to_le_bytes());
        PAYLOAD_BLOCKS.put(&mut header, &self.payload_blocks.to_le_bytes());
        TABLE_LEN.put(&mut header, &self.table_len.to_le_bytes());
        DIRECTORY_LEN.put(&mut header, &self.directory_len.to_le_bytes());
        CELLS_LEN.put(&mut header, &self.cells_len.to_le_bytes());
        REF_FLOOR.put(&mut header, &self.ref_floor.0.to_le_bytes());
        TABLE_DIGEST.put(&mut header, &self.table_digest);
        HEADER_TAG.put(&mut header, &self.header_tag);
        BODY_DIGEST.put(&mut header, &self.body_digest);
        PREV.put(&mut header, &self.prev);
        NONCE_RANDOM.put(&mut header, &self.nonce_random.to_le_bytes());
        FORMAT.finish(&mut header);
        header
    }

    /// Parses and verifies one header: magic, version, reserved bytes, checksum, then every limit.
    /// Reads nothing behind the header.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes = FORMAT.open(bytes)?;
        let header = Self {
            flags: FrameFlags(layout::FLAGS.u32(bytes)),
            group: GroupId(GROUP.array(bytes)),
            generation: Generation {
                counter: GENERATION_COUNTER.u64(bytes),
                site: GENERATION_SITE.u64(bytes),
            },
            incarnation: IncarnationId(INCARNATION.array(bytes)),
            frame_no: FrameNo(FRAME_NO.u32(bytes)),
            suite: SUITE.u16(bytes),
            first_seq: Seq(FIRST_SEQ.u64(bytes)),
            first_time: TimeUs(FIRST_TIME.u64(bytes)),
            last_time: TimeUs(LAST_TIME.u64(bytes)),
            record_count: RECORD_COUNT.u32(bytes),
            payload_blocks: PAYLOAD_BLOCKS.u32(bytes),
            table_len: TABLE_LEN.u32(bytes),
            directory_len: DIRECTORY_LEN.u32(bytes),
            cells_len: CELLS_LEN.u32(bytes),
            ref_floor: FrameNo(REF_FLOOR.u32(bytes)),
            table_digest: TABLE_DIGEST.array(bytes),
            header_tag: HEADER_TAG.array(bytes),
            body_digest: BODY_DIGEST.array(bytes),
            prev: PREV.array(bytes),
            nonce_random: NONCE_RANDOM.u32(bytes),
        };
        header.check()?;
        Ok(header)
    }

    /// Checks every limit that the header alone shows. An encoder calls it before it writes,
    /// `parse` after it read.
    pub fn check(&self) -> Result<(), FormatError> {
        let limit =
            |field, value: u32, limit: usize| FORMAT.at_most(field, u64::from(value), limit as u64);
        let require = |ok, field, reason| FORMAT.require(ok, field, reason);
        require(
            self.flags.0 & !FrameFlags::KNOWN == 0,
            layout::FLAGS,
            "unknown flag",
        )?;
        limit(
            FRAME_NO,
            self.frame_no.0,
            INCARNATION_FRAMES_MAX as usize - 1,
        )?;
        require(self.suite != 0, SUITE, "zero")?;
        require(self.first_seq.0 != 0, FIRST_SEQ, "zero")?;
        require(self.record_count != 0, RECORD_COUNT, "no record")?;
        limit(RECORD_COUNT, self.record_count, FRAME_RECORDS_MAX)?;
        FORMAT.at_most(
            FIRST_SEQ,
            self.first_seq.0,
            u64::MAX - u64::from(self.record_count),
        )?;
        // Times grow by at least 1 us a record.
        let span = self.last_time.0.checked_sub(self.first_time.0);
        let ordered = span.is_some_and(|us| us >= u64::from(self.record_count - 1));
        require(
            ordered,
            LAST_TIME,
            "before the first record's, or too close to it",
        )?;
        limit(PAYLOAD_BLOCKS, self.payload_blocks, FRAME_BLOCKS_MAX)?;
        // Each alone first, so that their sum cannot overflow.
        limit(TABLE_LEN, self.table_len, FRAME_BYTES_MAX)?;
        limit(DIRECTORY_LEN, self.directory_len, FRAME_BYTES_MAX)?;
        limit(CELLS_LEN, self.cells_len, FRAME_BYTES_MAX)?;
        let body_max = FRAME_BYTES_MAX - FRAME_HEADER_LEN;
        FORMAT.at_most(CELLS_LEN, self.body_len() as u64, body_max as u64)?;
        let table_min = self.record_count as usize * ENTRY_LEN_MIN;
        require(
            self.table_len as usize >= table_min,
            TABLE_LEN,
            "too short for its records",
        )?;
        let cells = self.cell_count();
        let directory_min = cells * DIRECTORY_ENTRY_LEN;
        let directory_ok =
            self.directory_len as usize >= directory_min && (cells != 0 || self.directory_len == 0);
        require(
            directory_ok,
            DIRECTORY_LEN,
            "not a directory of the frame's cells",
        )?;
        let cells_max = self.payload_blocks as usize * BLOCK_SIZE + cells * CELL_OVERHEAD;
        limit(CELLS_LEN, self.cells_len, cells_max)?;
        let cells_min = cells * (CELL_OVERHEAD + 1);
        require(
            self.cells_len as usize >= cells_min,
            CELLS_LEN,
            "too short for the cells",
        )?;
        require(
            self.ref_floor <= self.frame_no,
            REF_FLOOR,
            "above the frame's own number",
        )?;
        let chain_ok = self.frame_no.0 != 0 || self.prev == [0; 32];
        require(chain_ok, PREV, "not zero in the first frame")
    }

    /// Sequence number behind the last record.
    pub fn end_seq(&self) -> Seq {
        Seq(self.first_seq.0 + u64::from(self.record_count))
    }

    /// Cells of the payload.
    pub fn cell_count(&self) -> usize {
        (self.payload_blocks as usize).div_ceil(CELL_BLOCKS)
    }

    /// Raw blocks of one cell: `CELL_BLOCKS`, fewer in the last. Zero behind the last.
    pub fn cell_blocks(&self, cell: usize) -> usize {
        (self.payload_blocks as usize)
            .saturating_sub(cell.saturating_mul(CELL_BLOCKS))
            .min(CELL_BLOCKS)
    }

    /// Bytes of the whole frame, header included.
    pub fn frame_len(&self) -> usize {
        FRAME_HEADER_LEN + self.body_len()
    }

    /// Bytes of header, record table and cell directory: what a reader of cells needs.
    pub fn head_len(&self) -> usize {
        FRAME_HEADER_LEN + self.table_len as usize + self.directory_len as usize
    }

    /// Bytes behind the header.
    pub fn body_len(&self) -> usize {
        self.table_len as usize + self.directory_len as usize + self.cells_len as usize
    }

    /// Digest that the next frame's `prev` names.
    pub fn digest(&self) -> Digest {
        frame_digest(&self.encode())
    }
}

/// Frame digest of an encoded header: SHA-256 of `[0, 248)`.
pub fn frame_digest(header: &[u8; FRAME_HEADER_LEN]) -> Digest {
    sha256(&header[..DIGEST_COVERS])
}

/// Checks everything about a whole frame that needs no key: length, `table_digest`, `body_digest`.
/// `body` is all behind the header and nothing else.
pub fn verify_body(header: &FrameHeader, body: &[u8]) -> Result<(), FormatError> {
    const WHAT: &str = "frame body";
    let need = header.body_len();
    if body.len() < need {
        return Err(FormatError::Truncated {
            what: WHAT,
            need,
            have: body.len(),
        });
    }
    if body.len() > need {
        return Err(FormatError::Limit {
            what: WHAT,
            field: "length",
            value: body.len() as u64,
            limit: need as u64,
        });
    }
    if sha256(body) != header.body_digest {
        return Err(FormatError::Digest { what: WHAT });
    }
    let clear = header.table_len as usize + header.directory_len as usize;
    if sha256(&body[..clear]) != header.table_digest {
        return Err(FormatError::Digest {
            what: "record table and cell directory",
        });
    }
    Ok(())
}
