//! Record table: what writer and reader of its entries share, and the writer.

mod read;

pub use read::{PlacedRecord, TableReader, read_table};

use super::FormatError;
use super::directory::REFERENCE_BLOCKS_MAX;
use super::record::{BlockPayload, Payload, Record, RecordBody};
use super::varint::{put_varint, put_zigzag};
use crate::constants::{
    BLOCK_SIZE, FRAME_BLOCKS_MAX, FRAME_RECORDS_MAX, LABEL_BYTES_MAX, RECORD_BLOCKS_MAX,
    REFERENCE_CELLS_MAX, VOLUME_BYTES_MAX, VOLUMES_MAX,
};
use crate::types::{Extent, Seq, TimeUs, VolumeIndex};

const WHAT: &str = "record table";

const WRITE: u8 = 1;
const RESYNC: u8 = 2;
const ZERO: u8 = 3;
const DISCARD: u8 = 4;
const BOOKMARK: u8 = 5;
const BARRIER: u8 = 6;
const SPAN_BEGIN: u8 = 7;
const SPAN_END: u8 = 8;
const GAP: u8 = 9;
const CLOCK_STEP: u8 = 10;
const VOLUME: u8 = 11;

/// Kinds of records; `docs/format/record-table.md` holds the same table.
pub const KIND_VALUES: &[(&str, u64)] = &[
    ("WRITE", WRITE as u64),
    ("RESYNC", RESYNC as u64),
    ("ZERO", ZERO as u64),
    ("DISCARD", DISCARD as u64),
    ("BOOKMARK", BOOKMARK as u64),
    ("BARRIER", BARRIER as u64),
    ("SPAN_BEGIN", SPAN_BEGIN as u64),
    ("SPAN_END", SPAN_END as u64),
    ("GAP", GAP as u64),
    ("CLOCK_STEP", CLOCK_STEP as u64),
    ("VOLUME", VOLUME as u64),
];
/// Payload modes, and codes of a map but for the last; the page holds the same table.
pub const PAYLOAD_MODE_VALUES: &[(&str, u64)] = &[
    ("STORED", code(BlockPayload::Stored) as u64),
    ("ZERO", code(BlockPayload::Zero) as u64),
    ("SAME", code(BlockPayload::Same) as u64),
    ("MAP", MODE_MAP as u64),
];
/// Limits that a reader checks; the page holds the same table.
pub const LIMIT_VALUES: &[(&str, u64)] = &[
    ("RECORD_BLOCKS_MAX", RECORD_BLOCKS_MAX as u64),
    ("VOLUMES_MAX", VOLUMES_MAX as u64),
    ("VOLUME_BYTES_MAX", VOLUME_BYTES_MAX),
    ("LABEL_BYTES_MAX", LABEL_BYTES_MAX as u64),
    ("REFERENCE_BLOCKS_MAX", REFERENCE_BLOCKS_MAX as u64),
    ("REFERENCE_CELLS_MAX", REFERENCE_CELLS_MAX as u64),
];

const KIND_MASK: u8 = 0x0f;
const MODE_SHIFT: u8 = 4;
const MODE_MASK: u8 = 0x07;
const SAME_VOLUME: u8 = 0x80;

/// Payload modes 0 to 2 are the block codes of a map, for all blocks at once.
const MODE_MAP: u8 = 3;
const CODE_BITS: usize = 2;
const CODES_PER_BYTE: usize = 8 / CODE_BITS;

const VOLUME_BLOCKS_MAX: u64 = VOLUME_BYTES_MAX / BLOCK_SIZE as u64;

const fn code(payload: BlockPayload) -> u8 {
    match payload {
        BlockPayload::Stored => 0,
        BlockPayload::Zero => 1,
        BlockPayload::Same => 2,
    }
}

fn payload_of(code: u8) -> Option<BlockPayload> {
    match code {
        0 => Some(BlockPayload::Stored),
        1 => Some(BlockPayload::Zero),
        2 => Some(BlockPayload::Same),
        _ => None,
    }
}

fn field_error(field: &'static str, reason: &'static str) -> FormatError {
    FormatError::Field {
        what: WHAT,
        field,
        reason,
    }
}

fn at_most(field: &'static str, value: u64, limit: u64) -> Result<(), FormatError> {
    if value <= limit {
        return Ok(());
    }
    Err(FormatError::Limit {
        what: WHAT,
        field,
        value,
        limit,
    })
}

/// What writer and reader both demand of an extent.
fn check_extent(extent: Extent, blocks_max: u64) -> Result<(), FormatError> {
    at_most("volume", u64::from(extent.volume.0), VOLUMES_MAX as u64 - 1)?;
    if extent.blocks == 0 {
        return Err(field_error("blocks", "zero"));
    }
    at_most("blocks", extent.blocks, blocks_max)?;
    at_most("start", extent.start.0, VOLUME_BLOCKS_MAX - extent.blocks)
}

/// Deltas run over the records of one frame.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    volume: VolumeIndex,
    end: u64,
}

/// Encodes records into a table, one after another.
#[derive(Debug, Default)]
pub struct TableWriter {
    bytes: Vec<u8>,
    records: usize,
    first_seq: Seq,
    first_time: TimeUs,
    last_time: TimeUs,
    payload_blocks: usize,
    events: bool,
    place: Place,
}

impl TableWriter {
    /// Appends one record; `record.seq` must be the next, `record.time` later than the last.
    /// A refused record leaves the table as it was.
    pub fn push(&mut self, record: &Record) -> Result<(), FormatError> {
        at_most(
            "record_count",
            self.records as u64 + 1,
            FRAME_RECORDS_MAX as u64,
        )?;
        let delta = if self.records == 0 {
            0
        } else {
            if record.seq.0 != self.first_seq.0 + self.records as u64 {
                return Err(field_error("seq", "not the next"));
            }
            let delta = record
                .time
                .0
                .checked_sub(self.last_time.0)
                .filter(|&us| us > 0);
            delta.ok_or_else(|| field_error("time", "not later than the record before"))?
        };
        let stored = record.body.stored_blocks();
        let payload_blocks = self.payload_blocks.saturating_add(stored);
        at_most(
            "payload_blocks",
            payload_blocks as u64,
            FRAME_BLOCKS_MAX as u64,
        )?;
        check_body(&record.body)?;

        let head = self.head(&record.body);
        self.bytes.push(head);
        put_varint(&mut self.bytes, delta);
        self.fields(&record.body, head);
        if self.records == 0 {
            self.first_seq = record.seq;
            self.first_time = record.time;
        }
        self.last_time = record.time;
        self.records += 1;
        self.payload_blocks = payload_blocks;
        self.events |= record.body.is_event();
        Ok(())
    }

    /// Forgets all records, keeps the memory.
    pub fn clear(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        *self = Self {
            bytes,
            ..Self::default()
        };
    }

    /// The table so far.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn records(&self) -> usize {
        self.records
    }

    /// Stored blocks of all records.
    pub fn payload_blocks(&self) -> usize {
        self.payload_blocks
    }

    pub fn first_seq(&self) -> Seq {
        self.first_seq
    }

    pub fn first_time(&self) -> TimeUs {
        self.first_time
    }

    pub fn last_time(&self) -> TimeUs {
        self.last_time
    }

    /// Whether a record is not plain data; then the frame has the flag `EVENTS`.
    pub fn has_events(&self) -> bool {
        self.events
    }

    fn head(&self, body: &RecordBody) -> u8 {
        let kind = match body {
            RecordBody::Write { .. } => WRITE,
            RecordBody::Resync { .. } => RESYNC,
            RecordBody::Zero { .. } => ZERO,
            RecordBody::Discard { .. } => DISCARD,
            RecordBody::Bookmark { .. } => BOOKMARK,
            RecordBody::Barrier => BARRIER,
            RecordBody::SpanBegin { .. } => SPAN_BEGIN,
            RecordBody::SpanEnd => SPAN_END,
            RecordBody::Gap { .. } => GAP,
            RecordBody::ClockStep { .. } => CLOCK_STEP,
            RecordBody::Volume { .. } => VOLUME,
        };
        let mode = match body.payload() {
            None => 0,
            // A map of one kind only is not worth its bytes.
            Some(payload) => payload.uniform().map_or(MODE_MAP, code),
        };
        let same = body
            .extent()
            .is_some_and(|extent| extent.volume == self.place.volume);
        kind | mode << MODE_SHIFT | if same { SAME_VOLUME } else { 0 }
    }

    fn fields(&mut self, body: &RecordBody, head: u8) {
        if let Some(extent) = body.extent() {
            if head & SAME_VOLUME == 0 {
                put_varint(&mut self.bytes, u64::from(extent.volume.0));
            }
            let delta = extent.start.0.cast_signed() - self.place.end.cast_signed();
            put_zigzag(&mut self.bytes, delta);
            put_varint(&mut self.bytes, extent.blocks);
            self.place = Place {
                volume: extent.volume,
                end: extent.end().0,
            };
        }
        match body {
            RecordBody::Write { payload, .. } | RecordBody::Resync { payload, .. } => {
                if let (Payload::Map(map), MODE_MAP) = (payload, head >> MODE_SHIFT & MODE_MASK) {
                    for group in map.chunks(CODES_PER_BYTE) {
                        let byte = group.iter().enumerate().fold(0, |byte, (at, &payload)| {
                            byte | code(payload) << (at * CODE_BITS)
                        });
                        self.bytes.push(byte);
                    }
                }
            }
            RecordBody::Zero { .. }
            | RecordBody::Discard { .. }
            | RecordBody::Barrier
            | RecordBody::SpanEnd => {}
            RecordBody::Bookmark { label } => put_text(&mut self.bytes, label),
            RecordBody::SpanBegin { cause } => self.bytes.push(*cause as u8),
            RecordBody::Gap {
                cause,
                first_seq,
                end_seq,
                first_time,
                bytes,
            } => {
                self.bytes.push(*cause as u8);
                put_varint(&mut self.bytes, first_seq.0);
                put_varint(&mut self.bytes, end_seq.0);
                put_varint(&mut self.bytes, first_time.0);
                put_varint(&mut self.bytes, *bytes);
            }
            RecordBody::ClockStep { us } => put_zigzag(&mut self.bytes, *us),
            RecordBody::Volume { volume, size, name } => {
                put_varint(&mut self.bytes, u64::from(volume.0));
                put_varint(&mut self.bytes, *size);
                put_text(&mut self.bytes, name);
            }
        }
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.push(u8::try_from(text.len()).expect("invariant: check_body limits the length"));
    out.extend_from_slice(text.as_bytes());
}

/// What writer and reader both demand of a record's fields.
fn check_body(body: &RecordBody) -> Result<(), FormatError> {
    match body {
        RecordBody::Write { extent, payload } | RecordBody::Resync { extent, payload } => {
            check_extent(*extent, RECORD_BLOCKS_MAX as u64)?;
            match payload {
                Payload::Map(map) if map.len() as u64 != extent.blocks => Err(field_error(
                    "payload",
                    "a map of another length than the extent",
                )),
                _ => Ok(()),
            }
        }
        RecordBody::Zero { extent } | RecordBody::Discard { extent } => {
            check_extent(*extent, VOLUME_BLOCKS_MAX)
        }
        RecordBody::Bookmark { label } => {
            at_most("label", label.len() as u64, LABEL_BYTES_MAX as u64)
        }
        RecordBody::Barrier
        | RecordBody::SpanBegin { .. }
        | RecordBody::SpanEnd
        | RecordBody::ClockStep { .. } => Ok(()),
        RecordBody::Gap {
            first_seq, end_seq, ..
        } => {
            if first_seq > end_seq {
                return Err(field_error("gap", "ends before it begins"));
            }
            Ok(())
        }
        RecordBody::Volume { volume, size, name } => {
            at_most("volume", u64::from(volume.0), VOLUMES_MAX as u64 - 1)?;
            at_most("size", *size, VOLUME_BYTES_MAX)?;
            at_most("name", name.len() as u64, LABEL_BYTES_MAX as u64)
        }
    }
}
