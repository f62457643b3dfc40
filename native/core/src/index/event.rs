//! Events: the records that are not plain data, from tables and from the manifest alike.

use crate::format::manifest::EventEntry;
use crate::format::record::{Record, RecordBody};
use crate::types::{Seq, TimeUs, VolumeIndex};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub seq: Seq,
    pub time: TimeUs,
    pub kind: EventKind,
}

/// `cause` is the number on disk (`format::record::Cause`): a reader keeps causes it does not know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventKind {
    Bookmark {
        label: String,
    },
    SpanBegin {
        cause: u8,
    },
    SpanEnd,
    Gap {
        cause: u8,
        first_time: TimeUs,
        bytes: u64,
    },
    ClockStep,
    Volume {
        index: VolumeIndex,
        name: String,
        size: u64,
    },
}

impl Event {
    /// None if the record is plain data or a barrier.
    pub fn of(record: &Record) -> Option<Self> {
        let kind = match &record.body {
            RecordBody::Bookmark { label } => EventKind::Bookmark {
                label: label.clone(),
            },
            RecordBody::SpanBegin { cause } => EventKind::SpanBegin {
                cause: *cause as u8,
            },
            RecordBody::SpanEnd => EventKind::SpanEnd,
            RecordBody::Gap {
                cause,
                first_time,
                bytes,
                ..
            } => EventKind::Gap {
                cause: *cause as u8,
                first_time: *first_time,
                bytes: *bytes,
            },
            RecordBody::ClockStep { .. } => EventKind::ClockStep,
            RecordBody::Volume { volume, size, name } => EventKind::Volume {
                index: *volume,
                name: name.clone(),
                size: *size,
            },
            RecordBody::Write { .. }
            | RecordBody::Resync { .. }
            | RecordBody::Zero { .. }
            | RecordBody::Discard { .. }
            | RecordBody::Barrier => return None,
        };
        Some(Self {
            seq: record.seq,
            time: record.time,
            kind,
        })
    }

    /// From the manifest. None for a kind that this version does not know.
    pub fn from_manifest(entry: &EventEntry) -> Option<Self> {
        let cause = entry.cause.unwrap_or_default();
        let kind = match entry.kind.as_str() {
            "bookmark" => EventKind::Bookmark {
                label: entry.label.clone(),
            },
            "span_begin" => EventKind::SpanBegin { cause },
            "span_end" => EventKind::SpanEnd,
            "gap" => EventKind::Gap {
                cause,
                first_time: TimeUs(entry.gap_first_time_us.unwrap_or(entry.time_us)),
                bytes: entry.bytes.unwrap_or_default(),
            },
            "clock_step" => EventKind::ClockStep,
            "volume" => {
                let index = VolumeIndex(entry.volume?);
                EventKind::Volume {
                    index,
                    name: entry.label.clone(),
                    size: entry.bytes?,
                }
            }
            _ => return None,
        };
        Some(Self {
            seq: Seq(entry.seq),
            time: TimeUs(entry.time_us),
            kind,
        })
    }
}
