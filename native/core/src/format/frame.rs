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
use crate::types::{FrameNo, Generation, GroupId, IncarnationId, Seq, TimeUs};

pub const FRAME_MAGIC: [u8; 8] = *b"EBBFRAME";
pub const FRAME_VERSION: u16 = 1;
pub const FRAME_HEADER_LEN: usize = 256;
/// Bytes of the header that are additional data of the seals: all up to `header_tag`.
pub const AAD_LEN: usize = 152;

/// 32 bytes of SHA-256.
pub type Digest = [u8; 32];

/// Flags of a frame (header bytes 12..16).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FrameFlags(pub u32);

impl FrameFlags {
    /// The table holds a record that is not plain data (bookmark, span, gap, volume, clock, barrier).
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
        todo!()
    }

    /// Parses and verifies one header: magic, version, reserved bytes, checksum, then every limit.
    /// Reads nothing behind the header.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let _ = bytes;
        todo!()
    }

    /// Sequence number behind the last record.
    pub fn end_seq(&self) -> Seq {
        Seq(self.first_seq.0 + u64::from(self.record_count))
    }

    /// Bytes of the whole frame, header included.
    pub fn frame_len(&self) -> usize {
        FRAME_HEADER_LEN + self.body_len()
    }

    /// Bytes behind the header.
    pub fn body_len(&self) -> usize {
        self.table_len as usize + self.directory_len as usize + self.cells_len as usize
    }

    /// Digest that the next frame's `prev` names.
    pub fn digest(&self) -> Digest {
        todo!()
    }
}

/// Checks everything about a whole frame that needs no key: length, `table_digest`, `body_digest`.
pub fn verify_body(header: &FrameHeader, body: &[u8]) -> Result<(), FormatError> {
    let _ = (header, body);
    todo!()
}
