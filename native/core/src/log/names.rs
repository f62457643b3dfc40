//! Names of the files of a log, and what they say.

use crate::format::manifest::SegmentEntry;
use crate::types::FrameNo;

pub const MANIFEST: &str = "MANIFEST";
/// A manifest that did not parse is kept under this name when it is rebuilt from the segments.
pub const MANIFEST_DAMAGED: &str = "MANIFEST.damaged";
pub const LOCK: &str = "lock";
pub const SYNCED: &str = "synced";

/// A segment within its log. Ordered as history is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId {
    /// Position of the incarnation in this log, from 1.
    pub ordinal: u32,
    pub first_frame: FrameNo,
}

/// What the name of a segment file says about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentState {
    /// Grows, or waits to be sealed.
    Open,
    Sealed {
        last_frame: FrameNo,
    },
    /// Trimmed when the disk was full; empty, waits for the manifest that no longer names it.
    Gone {
        last_frame: FrameNo,
    },
}

impl SegmentId {
    pub fn of(entry: &SegmentEntry) -> Self {
        Self {
            ordinal: entry.ordinal,
            first_frame: FrameNo(entry.first_frame),
        }
    }

    pub fn file_name(self, state: SegmentState) -> String {
        let Self {
            ordinal,
            first_frame,
        } = self;
        match state {
            SegmentState::Open => format!("{ordinal:08x}-{:08x}.open", first_frame.0),
            SegmentState::Sealed { last_frame } => self.name(last_frame, "seg"),
            SegmentState::Gone { last_frame } => self.name(last_frame, "gone"),
        }
    }

    /// Name of a sealed segment's companion file.
    fn name(self, last_frame: FrameNo, extension: &str) -> String {
        let (ordinal, first) = (self.ordinal, self.first_frame.0);
        format!("{ordinal:08x}-{first:08x}-{:08x}.{extension}", last_frame.0)
    }
}

/// Name of a sealed segment's file.
pub fn sealed_name(entry: &SegmentEntry) -> String {
    let last_frame = FrameNo(entry.last_frame);
    SegmentId::of(entry).file_name(SegmentState::Sealed { last_frame })
}

/// Name of the index run of a sealed segment.
pub fn run_name(entry: &SegmentEntry) -> String {
    SegmentId::of(entry).name(FrameNo(entry.last_frame), "run")
}

fn hex(text: &str) -> Option<u32> {
    // `from_str_radix` alone would take a sign and upper case: a second name for one segment.
    let plain = text.len() == 8 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    plain.then(|| u32::from_str_radix(text, 16).ok()).flatten()
}

/// Parses the name of a segment file; `None` for all other files.
pub fn parse(name: &str) -> Option<(SegmentId, SegmentState)> {
    let (stem, extension) = name.split_once('.')?;
    let mut numbers = stem.split('-');
    let ordinal = hex(numbers.next()?)?;
    let first_frame = FrameNo(hex(numbers.next()?)?);
    let last_frame = numbers.next().map(|text| hex(text).map(FrameNo));
    let state = match (extension, last_frame) {
        ("open", None) => SegmentState::Open,
        ("seg", Some(last)) => SegmentState::Sealed { last_frame: last? },
        ("gone", Some(last)) => SegmentState::Gone { last_frame: last? },
        _ => return None,
    };
    let forward = match state {
        SegmentState::Open => true,
        SegmentState::Sealed { last_frame } | SegmentState::Gone { last_frame } => {
            first_frame <= last_frame
        }
    };
    (ordinal != 0 && forward && numbers.next().is_none()).then_some((
        SegmentId {
            ordinal,
            first_frame,
        },
        state,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_back_and_others_refused() {
        let id = SegmentId {
            ordinal: 0x1a,
            first_frame: FrameNo(0x100),
        };
        let last_frame = FrameNo(0x1ff);
        for state in [
            SegmentState::Open,
            SegmentState::Sealed { last_frame },
            SegmentState::Gone { last_frame },
        ] {
            assert_eq!(parse(&id.file_name(state)), Some((id, state)));
        }
        assert_eq!(id.file_name(SegmentState::Open), "0000001a-00000100.open");
        for name in [
            "MANIFEST",
            "lock",
            "0000001a-00000100-000001ff.run",
            "0000001A-00000100.open",
            "+000001a-00000100.open",
            "00000000-00000100.open",
            "1a-100.open",
            "0000001a-00000100.open.new",
            "0000001a-00000100-00000001.seg",
            "0000001a-00000100-000001ff-00000001.seg",
            "0000001a-00000100.seg",
            "0000001a-00000100-000001ff.open",
        ] {
            assert_eq!(parse(name), None, "{name}");
        }
    }
}
