//! Record table: writer and reader of the entries that `record` lays out.

use super::FormatError;
use super::frame::{FrameFlags, FrameHeader};
use super::record::{BlockPayload, Cause, Payload, Record, RecordBody};
use super::varint::{Reader, put_varint, put_zigzag};
use crate::constants::{
    BLOCK_SIZE, FRAME_BLOCKS_MAX, FRAME_RECORDS_MAX, LABEL_BYTES_MAX, RECORD_BLOCKS_MAX,
    VOLUME_BYTES_MAX, VOLUMES_MAX,
};
use crate::types::{BlockIndex, Extent, Seq, TimeUs, VolumeIndex};

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

const KIND_MASK: u8 = 0x0f;
const MODE_SHIFT: u8 = 4;
const MODE_MASK: u8 = 0x07;
const SAME_VOLUME: u8 = 0x80;

/// Payload modes 0 to 2 are the block codes of a map, for all blocks at once.
const MODE_MAP: u8 = 3;
const CODE_BITS: usize = 2;
const CODES_PER_BYTE: usize = 8 / CODE_BITS;

const VOLUME_BLOCKS_MAX: u64 = VOLUME_BYTES_MAX / BLOCK_SIZE as u64;

fn code(payload: BlockPayload) -> u8 {
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

/// A record and the position of its first stored block in the frame's payload stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedRecord {
    pub record: Record,
    pub payload_block: u32,
}

/// The records of a frame, one after another; what [`read_table`] returns.
#[derive(Debug, Clone)]
pub struct TableReader<'a> {
    header: &'a FrameHeader,
    reader: Reader<'a>,
    records: u32,
    last_time: TimeUs,
    payload_blocks: u32,
    events: bool,
    place: Place,
    /// Nothing more comes: the table was read, or an error was reported.
    done: bool,
}

/// Decodes the table of a frame. Ends after the first error. Checks that the sums agree with the
/// header (`record_count`, `payload_blocks`, `last_time`, flag `EVENTS`) and that no byte is left
/// over; the finding about a sum comes in place of the last record.
pub fn read_table<'a>(header: &'a FrameHeader, table: &'a [u8]) -> TableReader<'a> {
    TableReader {
        header,
        reader: Reader::new(WHAT, table),
        records: 0,
        last_time: header.first_time,
        payload_blocks: 0,
        events: false,
        place: Place::default(),
        done: false,
    }
}

impl Iterator for TableReader<'_> {
    type Item = Result<PlacedRecord, FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let item = self.entry();
        self.done = item.is_err() || self.records >= self.header.record_count;
        Some(item)
    }
}

impl TableReader<'_> {
    fn entry(&mut self) -> Result<PlacedRecord, FormatError> {
        let first = self.records == 0;
        let head = self.reader.u8()?;
        let delta = self.reader.varint("time")?;
        if (delta == 0) != first {
            return Err(field_error("time", "not later than the record before"));
        }
        let time = self.last_time.0.checked_add(delta);
        let time = time.ok_or_else(|| field_error("time", "overflows"))?;
        at_most("time", time, self.header.last_time.0)?;
        let body = self.body(head)?;
        check_body(&body)?;
        if let Some(extent) = body.extent() {
            self.place = Place {
                volume: extent.volume,
                end: extent.end().0,
            };
        }
        let payload_block = self.payload_blocks;
        let stored = u32::try_from(body.stored_blocks())
            .expect("invariant: check_body limits the blocks of a record");
        let payload_blocks = payload_block + stored;
        let limit = u64::from(self.header.payload_blocks);
        at_most("payload_blocks", u64::from(payload_blocks), limit)?;
        self.events |= body.is_event();
        let seq = Seq(self.header.first_seq.0 + u64::from(self.records));
        self.payload_blocks = payload_blocks;
        self.last_time = TimeUs(time);
        self.records += 1;
        if self.records == self.header.record_count {
            self.check_sums()?;
        }
        Ok(PlacedRecord {
            record: Record {
                seq,
                time: self.last_time,
                body,
            },
            payload_block,
        })
    }

    fn check_sums(&self) -> Result<(), FormatError> {
        let header = self.header;
        let require = |ok: bool, field, reason| {
            if ok {
                Ok(())
            } else {
                Err(field_error(field, reason))
            }
        };
        require(
            self.reader.remaining() == 0,
            "table_len",
            "bytes behind the last record",
        )?;
        require(
            self.last_time == header.last_time,
            "last_time_us",
            "not the last record's",
        )?;
        let blocks_ok = self.payload_blocks == header.payload_blocks;
        require(blocks_ok, "payload_blocks", "not the sum of the records")?;
        let events_ok = self.events == header.flags.has(FrameFlags::EVENTS);
        require(events_ok, "flags", "EVENTS does not agree with the records")
    }

    fn body(&mut self, head: u8) -> Result<RecordBody, FormatError> {
        let kind = head & KIND_MASK;
        let mode = head >> MODE_SHIFT & MODE_MASK;
        let has_extent = matches!(kind, WRITE | RESYNC | ZERO | DISCARD);
        let mode_max = if matches!(kind, WRITE | RESYNC) {
            MODE_MAP
        } else {
            0
        };
        if mode > mode_max || (!has_extent && head & SAME_VOLUME != 0) {
            return Err(field_error("head", "bits that this kind does not have"));
        }
        Ok(match kind {
            WRITE => {
                let extent = self.extent(head, RECORD_BLOCKS_MAX as u64)?;
                RecordBody::Write {
                    extent,
                    payload: self.payload(mode, extent.blocks)?,
                }
            }
            RESYNC => {
                let extent = self.extent(head, RECORD_BLOCKS_MAX as u64)?;
                RecordBody::Resync {
                    extent,
                    payload: self.payload(mode, extent.blocks)?,
                }
            }
            ZERO => RecordBody::Zero {
                extent: self.extent(head, VOLUME_BLOCKS_MAX)?,
            },
            DISCARD => RecordBody::Discard {
                extent: self.extent(head, VOLUME_BLOCKS_MAX)?,
            },
            BOOKMARK => RecordBody::Bookmark {
                label: self.reader.text("label")?.to_owned(),
            },
            BARRIER => RecordBody::Barrier,
            SPAN_BEGIN => RecordBody::SpanBegin {
                cause: self.cause()?,
            },
            SPAN_END => RecordBody::SpanEnd,
            GAP => RecordBody::Gap {
                cause: self.cause()?,
                first_seq: Seq(self.reader.varint("first_seq")?),
                end_seq: Seq(self.reader.varint("end_seq")?),
                first_time: TimeUs(self.reader.varint("first_time")?),
                bytes: self.reader.varint("bytes")?,
            },
            CLOCK_STEP => RecordBody::ClockStep {
                us: self.reader.zigzag("us")?,
            },
            VOLUME => RecordBody::Volume {
                volume: self.volume()?,
                size: self.reader.varint_at_most("size", VOLUME_BYTES_MAX)?,
                name: self.reader.text("name")?.to_owned(),
            },
            _ => return Err(field_error("head", "unknown kind")),
        })
    }

    fn cause(&mut self) -> Result<Cause, FormatError> {
        let value = self.reader.u8()?;
        Cause::from_u8(value).ok_or_else(|| field_error("cause", "unknown"))
    }

    fn volume(&mut self) -> Result<VolumeIndex, FormatError> {
        let value = self
            .reader
            .varint_at_most("volume", VOLUMES_MAX as u64 - 1)?;
        Ok(VolumeIndex(
            u16::try_from(value).expect("invariant: at most VOLUMES_MAX"),
        ))
    }

    fn extent(&mut self, head: u8, blocks_max: u64) -> Result<Extent, FormatError> {
        let volume = if head & SAME_VOLUME != 0 {
            self.place.volume
        } else {
            let volume = self.volume()?;
            if volume == self.place.volume {
                return Err(field_error("volume", "named, though it is the one before"));
            }
            volume
        };
        let delta = self.reader.zigzag("start")?;
        let start = self.place.end.checked_add_signed(delta);
        let start = start.ok_or_else(|| field_error("start", "before the volume"))?;
        let blocks = self.reader.varint("blocks")?;
        let extent = Extent {
            volume,
            start: BlockIndex(start),
            blocks,
        };
        check_extent(extent, blocks_max)?;
        Ok(extent)
    }

    /// `blocks` is checked to be at most `RECORD_BLOCKS_MAX`.
    fn payload(&mut self, mode: u8, blocks: u64) -> Result<Payload, FormatError> {
        if mode != MODE_MAP {
            let payload = payload_of(mode).ok_or_else(|| field_error("head", "unknown mode"))?;
            return Ok(Payload::All(payload));
        }
        let blocks = usize::try_from(blocks).expect("invariant: at most RECORD_BLOCKS_MAX");
        let codes = self.reader.take(blocks.div_ceil(CODES_PER_BYTE))?;
        let code_at =
            |at: usize| codes[at / CODES_PER_BYTE] >> (at % CODES_PER_BYTE * CODE_BITS) & 3;
        if (blocks..codes.len() * CODES_PER_BYTE).any(|at| code_at(at) != 0) {
            return Err(field_error(
                "payload",
                "bits behind the last block are not zero",
            ));
        }
        let map: Option<Vec<_>> = (0..blocks).map(|at| payload_of(code_at(at))).collect();
        let payload = Payload::Map(map.ok_or_else(|| field_error("payload", "unknown code"))?);
        if payload.uniform().is_some() {
            return Err(field_error("payload", "a map where one mode says the same"));
        }
        Ok(payload)
    }
}
