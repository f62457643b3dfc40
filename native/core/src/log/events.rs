//! Events of frames (records that are not plain data) as the manifest lists them.

use crate::format::FormatError;
use crate::format::frame::{FrameFlags, FrameHeader};
use crate::format::manifest::{EventEntry, Manifest, VolumeEntry};
use crate::format::record::{Record, RecordBody, read_table};

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
}
