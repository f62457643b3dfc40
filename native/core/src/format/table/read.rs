//! Reader of the record table: everything it decodes is checked before it is used.

use super::{
    BARRIER, BOOKMARK, CLOCK_STEP, CODE_BITS, CODES_PER_BYTE, DISCARD, GAP, KIND_MASK, MODE_MAP,
    MODE_MASK, MODE_SHIFT, Place, RESYNC, SAME_VOLUME, SPAN_BEGIN, SPAN_END, VOLUME,
    VOLUME_BLOCKS_MAX, WHAT, WRITE, ZERO, at_most, check_body, check_extent, field_error,
    payload_of,
};
use crate::constants::{RECORD_BLOCKS_MAX, VOLUME_BYTES_MAX, VOLUMES_MAX};
use crate::format::FormatError;
use crate::format::frame::{FrameFlags, FrameHeader};
use crate::format::record::{Cause, Payload, Record, RecordBody};
use crate::format::varint::Reader;
use crate::types::{BlockIndex, Extent, Seq, TimeUs, VolumeIndex};

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
