//! Events of frames (records that are not plain data) as the manifest lists them.
//!
//! Bounded: with more than `EVENTS_MAX` the manifest leaves out what is missed least, oldest first,
//! until an eighth is free: steps of the clock, then bookmarks and the gaps that open a span (their
//! records stay in the log). Then spans that lie nearest to one another become one: points between
//! them are no longer offered, which never offers a wrong one. An open span and the changes of
//! volumes stay.

use crate::constants::{EVENTS_MAX, VOLUME_CHANGES_MAX};
use crate::format::FormatError;
use crate::format::frame::{FrameFlags, FrameHeader};
use crate::format::manifest::{EventEntry, Manifest, VolumeEntry};
use crate::format::record::{Cause, Record, RecordBody, read_table};

fn event(record: &Record, kind: &str) -> EventEntry {
    EventEntry {
        seq: record.seq.0,
        time_us: record.time.0,
        kind: kind.to_owned(),
        label: String::new(),
        cause: None,
        gap_first_time_us: None,
        bytes: None,
        volume: None,
    }
}

/// The entry of one record; `None` for data and barriers, of which there are too many to list.
fn entry(record: &Record) -> Option<EventEntry> {
    Some(match &record.body {
        RecordBody::Bookmark { label } => EventEntry {
            label: label.clone(),
            ..event(record, "bookmark")
        },
        RecordBody::SpanBegin { cause } => EventEntry {
            cause: Some(*cause as u8),
            ..event(record, "span_begin")
        },
        RecordBody::SpanEnd => event(record, "span_end"),
        RecordBody::Gap {
            cause,
            first_time,
            bytes,
            ..
        } => EventEntry {
            cause: Some(*cause as u8),
            gap_first_time_us: Some(first_time.0),
            bytes: Some(*bytes),
            ..event(record, "gap")
        },
        RecordBody::ClockStep { us } => EventEntry {
            label: us.to_string(),
            ..event(record, "clock_step")
        },
        RecordBody::Volume { volume, size, name } => EventEntry {
            label: name.clone(),
            bytes: Some(*size),
            volume: Some(volume.0),
            ..event(record, "volume")
        },
        RecordBody::Write { .. }
        | RecordBody::Resync { .. }
        | RecordBody::Zero { .. }
        | RecordBody::Discard { .. }
        | RecordBody::Barrier => return None,
    })
}

/// Appends the events of one frame. `body` is all behind the header, or at least its table.
pub(super) fn collect(
    header: &FrameHeader,
    body: &[u8],
    events: &mut Vec<EventEntry>,
) -> Result<(), FormatError> {
    if !header.flags.has(FrameFlags::EVENTS) {
        return Ok(());
    }
    let need = header.table_len as usize;
    let what = "record table";
    let table = body.get(..need).ok_or(FormatError::Truncated {
        what,
        need,
        have: body.len(),
    })?;
    for placed in read_table(header, table) {
        events.extend(entry(&placed?.record));
    }
    Ok(())
}

/// Adds events to a manifest. A volume that is what it was (each incarnation repeats them all)
/// is not listed again.
pub(super) fn publish(manifest: &mut Manifest, events: Vec<EventEntry>) {
    for event in events {
        if let (Some(index), Some(size)) = (event.volume, event.bytes) {
            let entry = VolumeEntry {
                index,
                name: event.label.clone(),
                size,
            };
            match manifest
                .volumes
                .iter_mut()
                .find(|known| known.index == index)
            {
                Some(known) if *known == entry => continue,
                Some(known) => *known = entry,
                None => manifest.volumes.push(entry),
            }
        }
        manifest.events.push(event);
    }
    if manifest.events.len() > EVENTS_MAX {
        thin(&mut manifest.events);
    }
}

/// Refuses events with more changes of volumes than a manifest may list.
pub(super) fn check(manifest: &Manifest, events: &[EventEntry]) -> Result<(), FormatError> {
    let fresh = events.iter().filter(|event| event.volume.is_some()).count();
    // An incarnation repeats all volumes; only what differs is listed.
    if fresh == 0 || manifest.events.len() + fresh <= VOLUME_CHANGES_MAX {
        return Ok(());
    }
    let listed = |event: &&EventEntry| event.volume.is_some();
    let mut count = manifest.events.iter().filter(listed).count();
    for event in events.iter().filter(listed) {
        let known = manifest.volumes.iter().any(|known| {
            (Some(known.index), Some(known.size)) == (event.volume, event.bytes)
                && known.name == event.label
        });
        count += usize::from(!known);
    }
    if count > VOLUME_CHANGES_MAX {
        return Err(FormatError::Limit {
            what: "manifest body",
            field: "volume changes",
            value: count as u64,
            limit: VOLUME_CHANGES_MAX as u64,
        });
    }
    Ok(())
}

/// Leaves out events until an eighth of their limit is free; see the head of this file.
fn thin(events: &mut Vec<EventEntry>) {
    let surplus = |events: &[EventEntry]| events.len().saturating_sub(EVENTS_MAX / 8 * 7);
    let kind = |event: &EventEntry, kind: &str| event.kind == kind;
    let excess = surplus(events);
    drop_oldest(events, excess, |event, _| kind(event, "clock_step"));
    let excess = surplus(events);
    drop_oldest(events, excess, |event, next| {
        kind(event, "bookmark")
            || kind(event, "gap") && next.is_some_and(|next| kind(next, "span_begin"))
    });
    let excess = surplus(events);
    merge_spans(events, excess.div_ceil(2));
}

fn drop_oldest(
    events: &mut Vec<EventEntry>,
    mut count: usize,
    may_go: impl Fn(&EventEntry, Option<&EventEntry>) -> bool,
) {
    let mut kept = Vec::with_capacity(events.len());
    let mut rest = std::mem::take(events).into_iter().peekable();
    while let Some(event) = rest.next() {
        if count > 0 && may_go(&event, rest.peek()) {
            count -= 1;
        } else {
            kept.push(event);
        }
    }
    *events = kept;
}

/// Joins the `count` pairs of neighbouring spans that lie nearest in time.
fn merge_spans(events: &mut Vec<EventEntry>, count: usize) {
    // Places of a span's end and the next one's begin, with the time between.
    let mut borders: Vec<(u64, usize, usize)> = Vec::new();
    let mut end: Option<usize> = None;
    let mut begun = None;
    // Begin of the span that each begin follows.
    let mut before: Vec<Option<usize>> = vec![None; events.len()];
    for (place, event) in events.iter().enumerate() {
        match event.kind.as_str() {
            "span_begin" => {
                if let Some(end) = end.take() {
                    let between = event.time_us.saturating_sub(events[end].time_us);
                    borders.push((between, end, place));
                    before[place] = begun;
                }
                begun = Some(place);
            }
            "span_end" => end = Some(place),
            // A gap without a span of its own opens one: it is not to be crossed.
            "gap" => end = None,
            _ => {}
        }
    }
    borders.sort_unstable();
    borders.truncate(count);
    borders.sort_unstable_by_key(|(_, end, _)| std::cmp::Reverse(*end));
    let mut gone = vec![false; events.len()];
    for (_, end, begin) in borders {
        (gone[end], gone[begin]) = (true, true);
        // A first copy stands for everything before it, in whatever span it is.
        let copies = events[begin].cause == Some(Cause::FirstCopy as u8);
        if let Some(first) = before[begin].filter(|_| copies) {
            events[first].cause = events[begin].cause;
        }
    }
    let mut place = 0;
    events.retain(|_| {
        place += 1;
        !gone[place - 1]
    });
}
