//! Recovery points: which positions of history may be opened, and what `ebb points` lists.
//!
//! Invariant 5: no point inside an inconsistent span is a recovery point. A span is open from its
//! first record until its last; a gap that lost writes opens one as well, because what follows it
//! is a mixture until the copier has emitted what was missed. Nothing before the first copy's end
//! is a recovery point either, nor is a history without any data.

use std::collections::{BTreeMap, BTreeSet};

use super::event::{Event, EventKind};
use super::history::{History, Incarnation};
use super::{HistoryError, Point, PointSpec};
use crate::format::record::Cause;
use crate::types::{FrameNo, Seq, TimeUs, VolumeIndex};

/// A stretch without recovery points.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// First record of the span, or of the incarnation that it opens; seq 0 if it reaches back to
    /// the beginning of history.
    pub first: Point,
    /// Last record, itself a recovery point; None while the span is open.
    pub last: Option<Point>,
    /// Number on disk, see `format::record::Cause`; 0 if unknown.
    pub cause: u8,
}

/// A stretch of history that was not recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The record that tells of it.
    pub at: Point,
    /// From here to `at.time` nothing was recorded.
    pub first_time: TimeUs,
    /// Written meanwhile.
    pub bytes: u64,
    /// Number on disk, see `format::record::Cause`.
    pub cause: u8,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bookmark {
    pub at: Point,
    pub label: String,
    /// Whether the bookmark can be opened itself; otherwise it stands for the point before it.
    pub exact: bool,
}

/// What a history has to offer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Timeline {
    /// Oldest and newest recovery point; None if there is none yet.
    pub oldest: Option<Point>,
    pub newest: Option<Point>,
    /// Newest record that is held, be it a recovery point or not.
    pub last_record: Option<Point>,
    pub bookmarks: Vec<Bookmark>,
    pub gaps: Vec<Gap>,
    pub spans: Vec<Span>,
    pub incarnations: Vec<Incarnation>,
    /// As of the newest record: index, name, bytes.
    pub volumes: Vec<(VolumeIndex, String, u64)>,
    pub records: u64,
    pub log_bytes: u64,
}

/// Before all records.
const BEGINNING: Point = Point {
    seq: Seq(0),
    time: TimeUs(0),
};

fn point(event: &Event) -> Point {
    Point {
        seq: event.seq,
        time: event.time,
    }
}

impl History {
    /// Resolves a point (design invariant 5). `exact` refuses a point inside an inconsistent span
    /// or a gap instead of going back to the last consistent one.
    pub fn resolve(&self, spec: &PointSpec, exact: bool) -> Result<Point, HistoryError> {
        let newest = self.last_record().ok_or_else(|| self.nothing())?;
        let asked = match spec {
            // The newest recovery point is consistent by definition: nothing to be exact about.
            PointSpec::Newest => {
                if let Some(damage) = self.cut() {
                    return Err(damage.into());
                }
                return self.consistent(newest)?.ok_or(HistoryError::Empty);
            }
            PointSpec::At(time) => self.at_time(*time, newest)?,
            PointSpec::AtSeq(seq) => self.at_seq(*seq, newest)?,
            PointSpec::Bookmark(label) => self.bookmark(label)?,
        };
        let oldest = self.oldest()?;
        let consistent = self.consistent(asked)?;
        if let Some(oldest) = oldest
            && asked.seq < oldest.seq
            && self.span_around(asked.seq).is_none()
        {
            return Err(HistoryError::BeforeHorizon {
                asked: asked.time,
                horizon: oldest.time,
            });
        }
        let in_gap = match spec {
            PointSpec::At(time) => self.gap_around(*time),
            _ => false,
        };
        match consistent {
            Some(point) if point == asked && !(exact && in_gap) => Ok(point),
            Some(point) if !exact => Ok(point),
            None if oldest.is_none() && self.span_around(asked.seq).is_none() => {
                Err(HistoryError::Empty)
            }
            last => Err(HistoryError::InsideSpan { last }),
        }
    }

    /// Everything that `ebb points` shows but the single records.
    pub fn timeline(&self) -> Result<Timeline, HistoryError> {
        let last_record = self.last_record();
        let newest = match last_record {
            Some(last) => self.consistent(last)?,
            None => None,
        };
        let inside = |seq: Seq| self.span_around(seq).is_some();
        let oldest = self.oldest()?;
        let mut timeline = Timeline {
            oldest,
            newest,
            last_record,
            incarnations: self.incarnations().to_vec(),
            volumes: self.volumes(Seq(u64::MAX)),
            records: self.segments.iter().map(|segment| segment.records).sum(),
            log_bytes: self.segments.iter().map(|segment| segment.bytes).sum(),
            ..Timeline::default()
        };
        for event in &self.events {
            match &event.kind {
                EventKind::Bookmark { label } => timeline.bookmarks.push(Bookmark {
                    at: point(event),
                    label: label.clone(),
                    exact: oldest.is_some_and(|oldest| oldest.seq <= event.seq)
                        && !inside(event.seq),
                }),
                EventKind::Gap {
                    cause,
                    first_time,
                    bytes,
                } => timeline.gaps.push(Gap {
                    at: point(event),
                    first_time: *first_time,
                    bytes: *bytes,
                    cause: *cause,
                }),
                _ => {}
            }
        }
        timeline.spans.clone_from(&self.spans);
        Ok(timeline)
    }

    /// Volumes and their sizes as of a point.
    pub fn volumes(&self, seq: Seq) -> Vec<(VolumeIndex, String, u64)> {
        let older = self.older_volumes.iter().cloned();
        let mut volumes: BTreeMap<VolumeIndex, (String, u64)> = older
            .map(|(index, name, size)| (index, (name, size)))
            .collect();
        for event in self.events.iter().take_while(|event| event.seq <= seq) {
            if let EventKind::Volume { index, name, size } = &event.kind {
                volumes.insert(*index, (name.clone(), *size));
            }
        }
        volumes
            .into_iter()
            .map(|(index, (name, size))| (index, name, size))
            .collect()
    }

    fn nothing(&self) -> HistoryError {
        self.cut().map_or(HistoryError::Empty, HistoryError::from)
    }

    fn at_time(&self, asked: TimeUs, newest: Point) -> Result<Point, HistoryError> {
        if asked > newest.time {
            let future = HistoryError::InFuture {
                asked,
                newest: newest.time,
            };
            return Err(self.cut().map_or(future, HistoryError::from));
        }
        match self.record_before(|segment| segment.first_time <= asked, &|_, time| {
            time <= asked
        })? {
            Some(point) => Ok(point),
            None => Err(self.before_horizon(asked)?),
        }
    }

    fn at_seq(&self, asked: Seq, newest: Point) -> Result<Point, HistoryError> {
        if asked > newest.seq {
            let oldest = self
                .segments
                .first()
                .map_or(Seq(0), |segment| segment.first_seq);
            let outside = HistoryError::SeqOutside {
                asked,
                oldest,
                newest: newest.seq,
            };
            return Err(self.cut().map_or(outside, HistoryError::from));
        }
        match self.record_at_seq(asked)? {
            Some(point) => Ok(point),
            None => Err(HistoryError::SeqOutside {
                asked,
                oldest: self
                    .segments
                    .first()
                    .map_or(Seq(0), |segment| segment.first_seq),
                newest: newest.seq,
            }),
        }
    }

    /// The newest bookmark of that name.
    fn bookmark(&self, wanted: &str) -> Result<Point, HistoryError> {
        let named = |event: &&Event| match &event.kind {
            EventKind::Bookmark { label } => label == wanted,
            _ => false,
        };
        let found = self.events.iter().rev().find(named).map(point);
        found.ok_or_else(|| HistoryError::NoBookmark(wanted.to_owned()))
    }

    fn before_horizon(&self, asked: TimeUs) -> Result<HistoryError, HistoryError> {
        Ok(match self.oldest()? {
            Some(oldest) => HistoryError::BeforeHorizon {
                asked,
                horizon: oldest.time,
            },
            None => HistoryError::Empty,
        })
    }

    /// Newest record that is held.
    fn last_record(&self) -> Option<Point> {
        self.segments.last().map(|segment| Point {
            seq: Seq(segment.end_seq.0 - 1),
            time: segment.last_time,
        })
    }

    fn record_at_seq(&self, seq: Seq) -> Result<Option<Point>, HistoryError> {
        self.record_before(|segment| segment.first_seq <= seq, &|found, _| found <= seq)
    }

    /// Newest record that is `early`, which must hold for a prefix of history.
    fn record_before(
        &self,
        begins_early: impl Fn(&super::history::Segment) -> bool,
        early: &dyn Fn(Seq, TimeUs) -> bool,
    ) -> Result<Option<Point>, HistoryError> {
        let Some(number) = self.segments.partition_point(begins_early).checked_sub(1) else {
            return Ok(None);
        };
        let segment = &self.segments[number];
        let newest = Point {
            seq: Seq(segment.end_seq.0 - 1),
            time: segment.last_time,
        };
        if early(newest.seq, newest.time) {
            return Ok(Some(newest));
        }
        let file = self.file(number)?;
        // First frame whose first record is not early; frame `low` always begins early.
        let (mut low, mut high) = (segment.key.first_frame.0, segment.key.last_frame.0 + 1);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            let offset = self.frame_offset(segment, FrameNo(middle))?;
            let header = file.frame_header(offset)?;
            if early(header.first_seq, header.first_time) {
                low = middle;
            } else {
                high = middle;
            }
        }
        let offset = self.frame_offset(segment, FrameNo(low))?;
        let header = file.frame_header(offset)?;
        let records = file.records(offset, &header)?;
        let count = records.partition_point(|p| early(p.record.seq, p.record.time));
        Ok(count.checked_sub(1).map(|last| {
            let record = &records[last].record;
            Point {
                seq: record.seq,
                time: record.time,
            }
        }))
    }

    /// Finds the stretches without recovery points, oldest first.
    pub(super) fn find_spans(&self) -> Vec<Span> {
        let mut spans: Vec<Span> = Vec::new();
        let mut open: Option<Span> = self.lacks_its_beginning().then_some(Span::ALL);
        // Only a first copy makes up for a beginning that is not held.
        let mut needs_copy = open.is_some();
        let older = self.older_volumes.iter().map(|(index, ..)| *index);
        let mut volumes: BTreeSet<VolumeIndex> = older.collect();
        for (place, event) in self.events.iter().enumerate() {
            let cause = match event.kind {
                EventKind::SpanBegin { cause } => cause,
                EventKind::Gap { cause, bytes, .. } if bytes > 0 => cause,
                EventKind::SpanEnd => {
                    if needs_copy {
                        continue;
                    }
                    let mut span = open.take().unwrap_or(Span::ALL);
                    span.last = Some(point(event));
                    spans.push(span);
                    continue;
                }
                EventKind::Volume { index, .. } => {
                    volumes.insert(index);
                    continue;
                }
                _ => continue,
            };
            let copies = cause == Cause::FirstCopy as u8;
            needs_copy &= !copies;
            if let Some(span) = &mut open {
                if span.cause == 0 {
                    span.cause = cause;
                }
                continue;
            }
            // What precedes all data is no state of the volumes at all.
            let blank = self.first_data_seq().is_none_or(|data| event.seq < data);
            let first = if blank && spans.is_empty() {
                BEGINNING
            } else {
                let before = place.checked_sub(1).map(|place| &self.events[place]);
                self.head_of(event, before, volumes.len())
            };
            open = Some(Span {
                first,
                last: None,
                cause,
            });
        }
        spans.extend(open);
        spans
    }

    /// Where a span begins that an event opens. At the head of an incarnation the VOLUME records
    /// before it, and a GAP that lost nothing, belong to it: what history shows there is older than
    /// their time says.
    fn head_of(&self, opening: &Event, before: Option<&Event>, volumes: usize) -> Point {
        let number = self
            .segments
            .partition_point(|segment| segment.first_seq <= opening.seq);
        let Some(segment) = number.checked_sub(1).map(|number| &self.segments[number]) else {
            return point(opening);
        };
        let gap = before.is_some_and(|before| {
            before.seq.0 + 1 == opening.seq.0 && matches!(before.kind, EventKind::Gap { .. })
        });
        // Not more records than there are volumes: each incarnation lists all of them first.
        let head = volumes as u64 + u64::from(gap);
        if segment.key.first_frame == FrameNo(0) && opening.seq.0 - segment.first_seq.0 <= head {
            Point {
                seq: segment.first_seq,
                time: segment.first_time,
            }
        } else {
            point(opening)
        }
    }

    /// History whose first frames are gone shows no whole state.
    fn lacks_its_beginning(&self) -> bool {
        let first = self.segments.first();
        first.is_some_and(|s| s.key.ordinal > 1 || s.key.first_frame > FrameNo(0))
    }

    fn span_around(&self, seq: Seq) -> Option<&Span> {
        let begun = self.spans.partition_point(|span| span.first.seq <= seq);
        let newest = begun.checked_sub(1).map(|number| &self.spans[number]);
        newest.filter(|span| span.covers(seq))
    }

    fn gap_around(&self, time: TimeUs) -> bool {
        self.events.iter().any(|event| match event.kind {
            EventKind::Gap { first_time, .. } => first_time <= time && time < event.time,
            _ => false,
        })
    }

    /// First seq that any recovery point can have.
    fn floor(&self) -> Option<Seq> {
        let ends = self.spans.iter().filter_map(|span| span.last);
        let copied = ends.map(|last| last.seq).next();
        let begun = match (self.first_data_seq(), copied) {
            (Some(data), Some(copied)) => data.min(copied),
            (Some(seq), None) | (None, Some(seq)) => seq,
            (None, None) => return None,
        };
        Some(begun.max(self.horizon_seq()))
    }

    /// Oldest recovery point.
    fn oldest(&self) -> Result<Option<Point>, HistoryError> {
        let Some(mut seq) = self.floor() else {
            return Ok(None);
        };
        for span in &self.spans {
            if span.covers(seq) {
                match span.last {
                    Some(last) => seq = last.seq,
                    None => return Ok(None),
                }
            }
        }
        self.record_at_seq(seq)
    }

    /// `asked` itself if it is a recovery point, else the last one before it.
    fn consistent(&self, asked: Point) -> Result<Option<Point>, HistoryError> {
        let Some(floor) = self.floor() else {
            return Ok(None);
        };
        let mut found = asked;
        while let Some(span) = self.span_around(found.seq) {
            let Some(before) = span.first.seq.0.checked_sub(1) else {
                return Ok(None);
            };
            match self.record_at_seq(Seq(before))? {
                Some(point) => found = point,
                None => return Ok(None),
            }
        }
        Ok((found.seq >= floor).then_some(found))
    }
}

impl Span {
    /// From the beginning of history, open.
    const ALL: Self = Self {
        first: BEGINNING,
        last: None,
        cause: 0,
    };

    /// Whether a state as of `seq` is inside: the last record ends the span.
    pub fn covers(&self, seq: Seq) -> bool {
        self.first.seq <= seq && self.last.is_none_or(|last| seq < last.seq)
    }
}
