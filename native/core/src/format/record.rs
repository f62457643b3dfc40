//! Record table and cell directory: clear, authenticated through `table_digest`.
//!
//! The frame's payload is one stream of 4 KiB blocks, in record order; cell k holds blocks
//! `[16 k, 16 k + 16)` of it, the last one may be shorter. A record says which of its blocks have
//! payload, so a payload position is a running sum.
//!
//! ```text
//! table     := entry * record_count            (seq of entry i is first_seq + i)
//! entry     := head u8 | time_delta varint     (from the entry before; the first from first_time)
//!              | fields by kind
//! head      := kind (low 4 bits) | payload mode (bits 4..6) | same volume as before (bit 7)
//! WRITE, RESYNC := [volume varint unless bit 7] start zigzag (from the end of the extent before on
//!              this frame, 0 at first) | blocks varint | payload mode MAP: 2 bits a block
//! ZERO, DISCARD := [volume] start zigzag | blocks varint
//! BOOKMARK  := label length u8 | UTF-8      BARRIER, SPAN_END := nothing
//! SPAN_BEGIN:= cause u8
//! GAP       := cause u8 | first_seq u64 varint | end_seq varint | first_time varint | bytes varint
//! CLOCK_STEP:= zigzag microseconds
//! VOLUME    := volume varint | size in bytes varint | name length u8 | UTF-8   (also a resize)
//! directory := one per cell: sealed_len u24 | encoding u8 | reference count u8 | references
//! reference := frames back varint (0 = this frame) | first payload block varint | blocks u8
//! ```

use super::FormatError;
use super::frame::FrameHeader;
use crate::types::{BlockIndex, Extent, Seq, TimeUs, VolumeIndex};

/// Where the bytes of one block of a WRITE or RESYNC are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockPayload {
    /// The next block of the frame's payload stream.
    Stored,
    /// All zeroes; nothing stored.
    Zero,
    /// Byte for byte what the newest earlier record of this block holds; nothing stored.
    Same,
}

/// Why a span or gap is there. Values are on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Cause {
    FirstCopy = 1,
    UncleanStop = 2,
    SpoolFull = 3,
    SpoolFailed = 4,
    EncoderStuck = 5,
    BackingChanged = 6,
    BackingError = 7,
    NoKey = 8,
    Requested = 9,
}

/// One record, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub seq: Seq,
    pub time: TimeUs,
    pub body: RecordBody,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordBody {
    /// A write of the application. `payload` has one entry a block.
    Write {
        extent: Extent,
        payload: Payload,
    },
    /// A copy of what the backing held, made by first copy or recovery.
    Resync {
        extent: Extent,
        payload: Payload,
    },
    Zero {
        extent: Extent,
    },
    Discard {
        extent: Extent,
    },
    Bookmark {
        label: String,
    },
    /// A FLUSH was answered for everything before.
    Barrier,
    SpanBegin {
        cause: Cause,
    },
    SpanEnd,
    /// History between two points was not recorded.
    Gap {
        cause: Cause,
        first_seq: Seq,
        end_seq: Seq,
        first_time: TimeUs,
        bytes: u64,
    },
    ClockStep {
        us: i64,
    },
    /// A volume of the group and its size; repeated at the head of every incarnation.
    Volume {
        volume: VolumeIndex,
        size: u64,
        name: String,
    },
}

/// Payload of a record's blocks, with the common cases free of allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    All(BlockPayload),
    Map(Vec<BlockPayload>),
}

/// How a cell's raw bytes became its sealed plaintext. Values are on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum CellEncoding {
    Raw = 0,
    Lz4 = 1,
    /// LZ4 block with the referenced blocks, concatenated in order, as dictionary.
    Lz4Refs = 2,
}

/// Blocks of an earlier (or this) frame that a cell is compressed against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reference {
    pub frames_back: u32,
    pub first_block: u32,
    pub blocks: u8,
}

/// One entry of the cell directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CellEntry {
    /// Bytes of the sealed cell, tag included.
    pub sealed_len: u32,
    pub encoding: CellEncoding,
    pub references: Vec<Reference>,
}

/// Encodes records into a table, one after another.
#[derive(Debug, Default)]
pub struct TableWriter {
    _private: (),
}

impl TableWriter {
    /// Appends one record; `record.seq` must be the next, `record.time` later than the last.
    pub fn push(&mut self, record: &Record) {
        let _ = record;
        todo!()
    }
}

/// A record and the position of its first stored block in the frame's payload stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedRecord {
    pub record: Record,
    pub payload_block: u32,
}

/// Decodes the table of a frame. Ends after the first error. Checks that the sums agree with the
/// header (`record_count`, `payload_blocks`, `last_time`) and that no byte is left over.
pub fn read_table(
    header: &FrameHeader,
    table: &[u8],
) -> impl Iterator<Item = Result<PlacedRecord, FormatError>> {
    let _ = (header, table);
    std::iter::empty()
}

/// Decodes the cell directory of a frame and checks it against the header.
pub fn read_directory(header: &FrameHeader, bytes: &[u8]) -> Result<Vec<CellEntry>, FormatError> {
    let _ = (header, bytes);
    todo!()
}

/// First block index at `bytes` of volume offset, a helper used all over.
pub fn block_of(offset: u64) -> BlockIndex {
    BlockIndex(offset / crate::constants::BLOCK_SIZE as u64)
}
