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

pub use super::directory::{REFERENCE_BLOCKS_MAX, read_directory, write_directory};
pub use super::table::{
    KIND_VALUES, LIMIT_VALUES, PAYLOAD_MODE_VALUES, PlacedRecord, TableReader, TableWriter,
    read_table,
};
use super::varint::VARINT_LEN_MAX;
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

/// Numbers of the causes; `docs/format/record-table.md` holds the same table.
pub const CAUSE_VALUES: &[(&str, u64)] = &[
    ("FIRST_COPY", Cause::FirstCopy as u64),
    ("UNCLEAN_STOP", Cause::UncleanStop as u64),
    ("SPOOL_FULL", Cause::SpoolFull as u64),
    ("SPOOL_FAILED", Cause::SpoolFailed as u64),
    ("ENCODER_STUCK", Cause::EncoderStuck as u64),
    ("BACKING_CHANGED", Cause::BackingChanged as u64),
    ("BACKING_ERROR", Cause::BackingError as u64),
    ("NO_KEY", Cause::NoKey as u64),
    ("REQUESTED", Cause::Requested as u64),
];

/// Numbers of the encodings; `docs/format/record-table.md` holds the same table.
pub const ENCODING_VALUES: &[(&str, u64)] = &[
    ("RAW", CellEncoding::Raw as u64),
    ("LZ4", CellEncoding::Lz4 as u64),
    ("LZ4_REFS", CellEncoding::Lz4Refs as u64),
];

impl Cause {
    /// The cause that `value` means on disk.
    pub fn from_u8(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::FirstCopy,
            2 => Self::UncleanStop,
            3 => Self::SpoolFull,
            4 => Self::SpoolFailed,
            5 => Self::EncoderStuck,
            6 => Self::BackingChanged,
            7 => Self::BackingError,
            8 => Self::NoKey,
            9 => Self::Requested,
            _ => return None,
        })
    }
}

impl Payload {
    /// Payload of block `index` of the record. A map must be long enough.
    pub fn get(&self, index: usize) -> BlockPayload {
        match self {
            Self::All(payload) => *payload,
            Self::Map(map) => map[index],
        }
    }

    /// The one kind of payload that all blocks have.
    pub fn uniform(&self) -> Option<BlockPayload> {
        match self {
            Self::All(payload) => Some(*payload),
            Self::Map(map) => {
                let first = *map.first()?;
                map.iter().all(|&payload| payload == first).then_some(first)
            }
        }
    }

    /// How many of the first `blocks` blocks are stored; with all blocks of the record, how many
    /// blocks of the payload stream it has.
    pub fn stored_before(&self, blocks: usize) -> usize {
        match self {
            Self::All(BlockPayload::Stored) => blocks,
            Self::All(_) => 0,
            Self::Map(map) => map[..blocks]
                .iter()
                .filter(|&&payload| payload == BlockPayload::Stored)
                .count(),
        }
    }
}

impl RecordBody {
    /// The blocks that the record changes; none for a record that is not about data.
    pub fn extent(&self) -> Option<Extent> {
        match self {
            Self::Write { extent, .. }
            | Self::Resync { extent, .. }
            | Self::Zero { extent }
            | Self::Discard { extent } => Some(*extent),
            _ => None,
        }
    }

    /// Payload of a WRITE or RESYNC.
    pub fn payload(&self) -> Option<&Payload> {
        match self {
            Self::Write { payload, .. } | Self::Resync { payload, .. } => Some(payload),
            _ => None,
        }
    }

    /// Blocks of the frame's payload stream that belong to the record. At most `usize::MAX` for an
    /// extent that no writer accepts.
    pub fn stored_blocks(&self) -> usize {
        let Some((extent, payload)) = self.extent().zip(self.payload()) else {
            return 0;
        };
        match payload {
            Payload::All(BlockPayload::Stored) => {
                usize::try_from(extent.blocks).unwrap_or(usize::MAX)
            }
            Payload::All(_) => 0,
            Payload::Map(map) => payload.stored_before(map.len()),
        }
    }

    /// Not plain data; its frame has the flag `EVENTS`.
    pub fn is_event(&self) -> bool {
        self.extent().is_none()
    }

    /// Upper bound of the bytes that the record takes in a table, for closing a frame in time.
    pub fn encoded_len_max(&self) -> usize {
        let head = 1 + VARINT_LEN_MAX;
        let extent = 2 + 2 * VARINT_LEN_MAX;
        head + match self {
            Self::Write { payload, .. } | Self::Resync { payload, .. } => {
                extent
                    + match payload {
                        Payload::All(_) => 0,
                        Payload::Map(map) => map.len().div_ceil(4),
                    }
            }
            Self::Zero { .. } | Self::Discard { .. } => extent,
            Self::Barrier | Self::SpanEnd => 0,
            Self::SpanBegin { .. } => 1,
            Self::Bookmark { label } => 1 + label.len(),
            Self::Gap { .. } => 1 + 4 * VARINT_LEN_MAX,
            Self::ClockStep { .. } => VARINT_LEN_MAX,
            Self::Volume { name, .. } => 2 + VARINT_LEN_MAX + 1 + name.len(),
        }
    }
}

impl CellEncoding {
    /// The encoding that `value` means on disk.
    pub fn from_u8(value: u8) -> Option<Self> {
        Some(match value {
            0 => Self::Raw,
            1 => Self::Lz4,
            2 => Self::Lz4Refs,
            _ => return None,
        })
    }
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

/// First block index at `bytes` of volume offset, a helper used all over.
pub fn block_of(offset: u64) -> BlockIndex {
    BlockIndex(offset / crate::constants::BLOCK_SIZE as u64)
}
