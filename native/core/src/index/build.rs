//! Builds the run of one segment in memory from its record tables.

use std::collections::BTreeMap;

use super::entry::{Content, Entry, pieces};
use super::event::Event;
use super::layout::{Lane, Member, RunHeader, Tail};
use super::run::Run;
use super::walk::{SegmentFile, WalkedFrame, Walker};
use crate::format::FormatError;
use crate::format::frame::FrameHeader;
use crate::format::record::{BlockPayload, Payload, PlacedRecord, RecordBody, read_table};
use crate::log::LogError;
use crate::types::{BlockIndex, Extent, FrameNo, GroupId, Seq, TimeUs, VolumeIndex};

/// What a segment's tables hold.
#[derive(Debug)]
pub struct Indexed {
    pub run: Run,
    /// Records that are not plain data.
    pub events: Vec<Event>,
    /// Bytes of the file that were walked: header and whole frames.
    pub bytes: u64,
}

/// Where a walk ended before its end.
#[derive(Debug)]
pub struct Stopped {
    pub error: LogError,
    /// Frames before the error.
    pub so_far: Option<Indexed>,
}

/// Indexes the frames of a segment file up to byte `end`. None if there is no frame. `whole`
/// verifies the bodies as well.
pub fn index_segment(
    group: GroupId,
    ordinal: u32,
    segment: &SegmentFile,
    end: u64,
    whole: bool,
) -> Result<Option<Indexed>, Box<Stopped>> {
    let mut builder = Builder::default();
    let mut walker = Walker::new(segment, end, whole);
    loop {
        let error = match walker.next_frame() {
            Ok(None) => return Ok(builder.finish(group, ordinal)),
            Ok(Some(frame)) => match builder.frame(group, &frame) {
                Ok(()) => continue,
                Err(source) => segment.damaged(frame.offset, source),
            },
            Err(error) => error,
        };
        return Err(Box::new(Stopped {
            error,
            so_far: builder.finish(group, ordinal),
        }));
    }
}

#[derive(Debug, Default)]
struct Builder {
    lanes: BTreeMap<(VolumeIndex, u8), Vec<Entry>>,
    slots: Vec<u32>,
    events: Vec<Event>,
    span: Option<Span>,
    first_data_seq: Seq,
    records: u64,
    bytes: u64,
}

/// From the first to the last frame.
#[derive(Debug)]
struct Span {
    first_frame: FrameNo,
    next_frame: FrameNo,
    base_seq: Seq,
    end_seq: Seq,
    first_time: TimeUs,
    last_time: TimeUs,
    /// Its digest is wanted once, at the end: a hash a frame would cost more than the rest.
    last: FrameHeader,
}

const WHAT: &str = "frame in its segment";

impl Builder {
    /// Takes one frame, whole or not at all.
    fn frame(&mut self, group: GroupId, frame: &WalkedFrame<'_>) -> Result<(), FormatError> {
        let header = &frame.header;
        let malformed = |field, reason| {
            Err(FormatError::Field {
                what: WHAT,
                field,
                reason,
            })
        };
        if header.group != group {
            return malformed("group", "another group's");
        }
        let span = self.span.get_or_insert_with(|| Span {
            first_frame: header.frame_no,
            next_frame: header.frame_no,
            base_seq: header.first_seq,
            end_seq: header.first_seq,
            first_time: header.first_time,
            last_time: header.first_time,
            last: header.clone(),
        });
        if header.frame_no != span.next_frame {
            return malformed("frame_no", "not the next");
        }
        if header.first_seq < span.end_seq {
            return malformed("first_seq", "not above the frame before");
        }
        let base = span.base_seq.0;
        let too_far = FormatError::Limit {
            what: WHAT,
            field: "first_seq",
            value: header.end_seq().0.saturating_sub(base),
            limit: u32::MAX.into(),
        };
        let last_delta = u32::try_from(header.end_seq().0 - base).map_err(|_| too_far)?;
        let slot = u32::try_from(self.slots.len()).expect("invariant: frames are numbered by u32");
        let offset = u32::try_from(frame.offset).map_err(|_| FormatError::Limit {
            what: WHAT,
            field: "offset",
            value: frame.offset,
            limit: u32::MAX.into(),
        })?;
        // Two passes: a table that ends in damage must leave nothing behind.
        let records: Vec<PlacedRecord> =
            read_table(header, frame.table).collect::<Result<_, _>>()?;
        span.next_frame = FrameNo(header.frame_no.0 + 1);
        span.end_seq = Seq(base + u64::from(last_delta));
        span.last_time = header.last_time;
        span.last = header.clone();
        self.slots.push(offset);
        self.records += u64::from(header.record_count);
        self.bytes = frame.offset + header.frame_len() as u64;
        for placed in &records {
            let delta = u32::try_from(placed.record.seq.0 - base)
                .expect("invariant: below the frame's end_seq");
            self.record(placed, delta, slot);
        }
        Ok(())
    }

    fn record(&mut self, placed: &PlacedRecord, delta: u32, slot: u32) {
        let record = &placed.record;
        match &record.body {
            RecordBody::Write { extent, payload } | RecordBody::Resync { extent, payload } => {
                self.payload(*extent, payload, placed.payload_block, delta, slot);
            }
            RecordBody::Zero { extent } => self.extent(*extent, Content::Zero, delta, slot),
            RecordBody::Discard { extent } => {
                self.extent(*extent, Content::Discarded, delta, slot);
            }
            _ => {
                self.events.extend(Event::of(record));
                return;
            }
        }
        if self.first_data_seq == Seq(0) {
            self.first_data_seq = record.seq;
        }
    }

    fn payload(&mut self, extent: Extent, payload: &Payload, first: u32, delta: u32, slot: u32) {
        match payload {
            Payload::All(kind) => self.alike(extent, *kind, first, delta, slot),
            Payload::Map(kinds) => {
                let mut payload_block = first;
                let mut start = extent.start.0;
                for alike in kinds.chunk_by(|a, b| a == b) {
                    let blocks = alike.len() as u64;
                    let part = Extent {
                        start: BlockIndex(start),
                        blocks,
                        ..extent
                    };
                    self.alike(part, alike[0], payload_block, delta, slot);
                    start += blocks;
                    if alike[0] == BlockPayload::Stored {
                        payload_block +=
                            u32::try_from(blocks).expect("invariant: a record is short");
                    }
                }
            }
        }
    }

    fn alike(&mut self, extent: Extent, kind: BlockPayload, first: u32, delta: u32, slot: u32) {
        match kind {
            BlockPayload::Stored => {
                self.extent(
                    extent,
                    Content::Stored {
                        payload_block: first,
                    },
                    delta,
                    slot,
                );
            }
            BlockPayload::Zero => self.extent(extent, Content::Zero, delta, slot),
            // The version before is the answer still.
            BlockPayload::Same => {}
        }
    }

    fn extent(&mut self, extent: Extent, content: Content, delta: u32, slot: u32) {
        pieces(extent.start, extent.blocks, |level, index, offset| {
            let content = match content {
                Content::Stored { payload_block } => {
                    let offset = u32::try_from(offset).expect("invariant: a record is short");
                    Content::Stored {
                        payload_block: payload_block + offset,
                    }
                }
                other => other,
            };
            let entry = Entry::new(index, delta, slot, content);
            self.lanes
                .entry((extent.volume, level))
                .or_default()
                .push(entry);
        });
    }

    fn finish(self, group: GroupId, ordinal: u32) -> Option<Indexed> {
        let span = self.span.filter(|_| !self.slots.is_empty())?;
        let mut tail = Tail::default();
        let mut all = Vec::with_capacity(self.lanes.values().map(Vec::len).sum());
        for ((volume, level), mut entries) in self.lanes {
            entries.sort_unstable();
            tail.lanes.push(Lane {
                volume,
                level,
                first: all.len() as u64,
                count: entries.len() as u64,
                min_index: entries[0].index(),
                max_index: entries[entries.len() - 1].index(),
            });
            all.append(&mut entries);
        }
        let count = |number: usize| u32::try_from(number).expect("invariant: a segment is bounded");
        tail.members.push(Member {
            ordinal,
            first_frame: span.first_frame,
            last_frame: FrameNo(span.next_frame.0 - 1),
            first_slot: 0,
            first_seq: span.base_seq,
            end_seq: span.end_seq,
            last_digest: span.last.digest(),
        });
        let header = RunHeader {
            group,
            base_seq: span.base_seq,
            end_seq: span.end_seq,
            first_time: span.first_time,
            last_time: span.last_time,
            first_data_seq: self.first_data_seq,
            entries: all.len() as u64,
            slots: count(self.slots.len()),
            members: 1,
            lanes: count(tail.lanes.len()),
            records: self.records,
            tail_checksum: 0,
        };
        let run = Run::in_memory(header, tail, all, self.slots);
        Some(Indexed {
            run,
            events: self.events,
            bytes: self.bytes,
        })
    }
}
