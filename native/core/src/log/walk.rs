//! Walks the frames of one segment file and says how far they are good.
//!
//! Below `known_len` everything was durable once: a bad frame there is damage, noted with its place
//! and crossed if possible. From `known_len` on the first bad frame is where the torn tail begins.

use super::events;
use super::names::SegmentId;
use crate::constants::FRAME_BYTES_MAX;
use xxhash_rust::xxh3::xxh3_64;

use crate::format::FormatError;
use crate::format::frame::{
    Digest, FRAME_HEADER_LEN, FRAME_MAGIC, FrameHeader, frame_digest, verify_body,
};
use crate::format::layout;
use crate::format::manifest::{EventEntry, SegmentEntry};
use crate::format::segment::{SEGMENT_HEADER_LEN, SegmentHeader};
use crate::storage::File;
use crate::types::{FrameNo, GroupId, Seq, TimeUs};

use super::{LogError, digest_hex};

const WHAT: &str = "frame header";

/// Bytes scanned for the next frame header in one go, behind a damaged one.
const SCAN_BYTES: usize = 256 << 10;

/// A bad place in a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Damage {
    pub offset: u64,
    pub source: FormatError,
}

/// What lies in a segment file.
#[derive(Debug)]
pub(super) struct Walk {
    pub header: SegmentHeader,
    /// Whole frames, in order; `None` if there is none.
    pub entry: Option<SegmentEntry>,
    /// `prev` of the first frame.
    pub first_prev: Digest,
    pub last_digest: Digest,
    /// Bytes up to the end of the last whole frame.
    pub valid_len: u64,
    pub damage: Vec<Damage>,
    pub events: Vec<EventEntry>,
}

/// Where the walk expects the next frame.
struct Expected {
    frame_no: FrameNo,
    /// Unknown at the first frame and behind a hole.
    prev: Option<Digest>,
    seq: Seq,
    time: Option<TimeUs>,
}

fn field(field: &'static str, reason: &'static str) -> FormatError {
    FormatError::Field {
        what: WHAT,
        field,
        reason,
    }
}

/// Whether an error says that a newer program wrote this: another version, and the checksum is
/// right. Such bytes are neither torn nor damaged, and not this program's to cut.
pub(super) fn is_other_version(bytes: &[u8], error: &FormatError) -> bool {
    let FormatError::Version { .. } = error else {
        return false;
    };
    let length = usize::from(layout::HEADER_LEN.u16(bytes));
    let Some(covered) = length.checked_sub(layout::CHECKSUM_LEN) else {
        return false;
    };
    bytes
        .get(covered..length)
        .is_some_and(|checksum| xxh3_64(&bytes[..covered]).to_le_bytes() == checksum)
}

/// Reads and checks the header of a segment.
pub(super) fn read_header(
    file: &dyn File,
    id: SegmentId,
    group: GroupId,
) -> Result<Result<SegmentHeader, FormatError>, LogError> {
    let mut bytes = [0; SEGMENT_HEADER_LEN];
    let read = file
        .read_at(&mut bytes, 0)
        .map_err(LogError::io("reading a segment"))?;
    let header = match SegmentHeader::parse(&bytes[..read]) {
        Ok(header) => header,
        Err(error) if is_other_version(&bytes[..read], &error) => return Err(error.into()),
        Err(error) => return Ok(Err(error)),
    };
    if header.group != group {
        return Err(LogError::ForeignGroup {
            expected: group,
            found: header.group,
        });
    }
    if header.first_frame != id.first_frame {
        let (what, field) = ("segment header", "first_frame");
        let reason = "not what the file's name says";
        return Ok(Err(FormatError::Field {
            what,
            field,
            reason,
        }));
    }
    Ok(Ok(header))
}

/// Checks that a frame is of this segment's incarnation and the one that is due.
fn check_place(
    segment: &SegmentHeader,
    header: &FrameHeader,
    expected: &Expected,
) -> Result<(), FormatError> {
    let checks = [
        (header.group == segment.group, "group", "not the segment's"),
        (
            header.incarnation == segment.incarnation,
            "incarnation",
            "not the segment's",
        ),
        (
            header.generation == segment.generation,
            "generation",
            "not the segment's",
        ),
        (
            header.frame_no == expected.frame_no,
            "frame_no",
            "not the next",
        ),
        (
            header.first_seq >= expected.seq,
            "first_seq",
            "not above the frame before",
        ),
        (
            expected.time.is_none_or(|time| header.first_time > time),
            "first_time_us",
            "not above the frame before",
        ),
        (
            expected.prev.is_none_or(|prev| header.prev == prev),
            "prev",
            "not the digest of the frame before",
        ),
    ];
    match checks.iter().find(|(good, ..)| !good) {
        None => Ok(()),
        Some((_, name, reason)) => Err(field(name, reason)),
    }
}

struct Walker<'a> {
    file: &'a dyn File,
    file_len: u64,
    buffer: Vec<u8>,
    walk: Walk,
    expected: Expected,
    id: SegmentId,
}

/// What was found at an offset.
enum Found {
    Good(FrameHeader),
    /// The header is right, what lies behind it is not: its place in the chain is known.
    BadBody(FrameHeader, FormatError),
    Bad(FormatError),
}

impl Walker<'_> {
    fn read(&mut self, offset: u64, length: usize) -> Result<usize, LogError> {
        self.buffer.resize(length, 0);
        self.file
            .read_at(&mut self.buffer, offset)
            .map_err(LogError::io("reading a segment"))
    }

    fn frame_at(&mut self, offset: u64) -> Result<Found, LogError> {
        let read = self.read(offset, FRAME_HEADER_LEN)?;
        let header = match FrameHeader::parse(&self.buffer[..read]) {
            Ok(header) => header,
            Err(error) if is_other_version(&self.buffer[..read], &error) => {
                return Err(error.into());
            }
            Err(error) => return Ok(Found::Bad(error)),
        };
        if let Err(error) = check_place(&self.walk.header, &header, &self.expected) {
            return Ok(Found::Bad(error));
        }
        let need = header.body_len();
        let read = self.read(offset + FRAME_HEADER_LEN as u64, need)?;
        if let Err(error) = verify_body(&header, &self.buffer[..read]) {
            return Ok(Found::BadBody(header, error));
        }
        let mut found = Vec::new();
        if let Err(error) = events::collect(&header, &self.buffer[..read], &mut found) {
            return Ok(Found::BadBody(header, error));
        }
        self.walk.events.append(&mut found);
        Ok(Found::Good(header))
    }

    fn accept(&mut self, header: &FrameHeader, offset: u64) {
        let end = offset + header.frame_len() as u64;
        let digest = frame_digest(&header.encode());
        let entry = self.walk.entry.get_or_insert_with(|| SegmentEntry {
            ordinal: self.id.ordinal,
            // Also if the first frame is damaged: it is part of the file's name.
            first_frame: self.id.first_frame.0,
            last_frame: header.frame_no.0,
            first_seq: header.first_seq.0,
            end_seq: header.end_seq().0,
            first_time_us: header.first_time.0,
            last_time_us: header.last_time.0,
            bytes: end,
            records: 0,
            last_digest: String::new(),
            indexed: false,
        });
        if entry.records == 0 {
            self.walk.first_prev = header.prev;
        }
        entry.last_frame = header.frame_no.0;
        entry.end_seq = header.end_seq().0;
        entry.last_time_us = header.last_time.0;
        entry.bytes = end;
        entry.records += u64::from(header.record_count);
        self.walk.last_digest = digest;
        self.walk.valid_len = end;
        self.expected = Expected {
            frame_no: FrameNo(header.frame_no.0.saturating_add(1)),
            prev: Some(digest),
            seq: header.end_seq(),
            time: Some(header.last_time),
        };
    }

    /// Finds the next place behind `from` where a whole later frame of this segment lies.
    fn scan(&mut self, from: u64) -> Result<Option<u64>, LogError> {
        let (file, file_len) = (self.file, self.file_len);
        let due = self.expected.frame_no;
        let incarnation = self.walk.header.incarnation;
        find_header(file, from, file_len, &mut |header, offset| {
            if header.frame_no <= due || header.incarnation != incarnation {
                return Ok(false);
            }
            self.expected.frame_no = header.frame_no;
            self.expected.prev = None;
            let good = matches!(self.frame_at(offset)?, Found::Good(_));
            // `frame_at` has noted its events; the walk comes by here again.
            self.walk
                .events
                .retain(|event| event.seq < header.first_seq.0);
            Ok(good)
        })
    }

    fn run(&mut self, known_len: u64) -> Result<(), LogError> {
        let mut offset = SEGMENT_HEADER_LEN as u64;
        while offset < self.file_len {
            let (header, error) = match self.frame_at(offset)? {
                Found::Good(header) => {
                    self.accept(&header, offset);
                    offset += header.frame_len() as u64;
                    continue;
                }
                Found::BadBody(header, error) => (Some(header), error),
                Found::Bad(error) => (None, error),
            };
            if offset >= known_len {
                return Ok(());
            }
            self.walk.damage.push(Damage {
                offset,
                source: error,
            });
            let whole = header.filter(|header| offset + header.frame_len() as u64 <= self.file_len);
            if let Some(header) = whole {
                self.accept(&header, offset);
                offset += header.frame_len() as u64;
            } else if let Some(next) = self.scan(offset + 1)? {
                offset = next;
            } else {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Finds the first offset in `[from, to)` where a frame header lies that `accept` takes.
pub(super) fn find_header(
    file: &dyn File,
    from: u64,
    to: u64,
    accept: &mut dyn FnMut(&FrameHeader, u64) -> Result<bool, LogError>,
) -> Result<Option<u64>, LogError> {
    let mut start = from;
    let mut buffer = vec![0; SCAN_BYTES];
    while start + FRAME_HEADER_LEN as u64 <= to {
        let length = usize::try_from(to - start)
            .unwrap_or(SCAN_BYTES)
            .min(SCAN_BYTES);
        let read = file
            .read_at(&mut buffer[..length], start)
            .map_err(LogError::io("reading a segment"))?;
        let window = &buffer[..read];
        for at in 0..window.len().saturating_sub(FRAME_HEADER_LEN - 1) {
            if window[at..].starts_with(&FRAME_MAGIC)
                && let Ok(header) = FrameHeader::parse(&window[at..])
                && accept(&header, start + at as u64)?
            {
                return Ok(Some(start + at as u64));
            }
        }
        // Windows overlap, so that no header is missed at a border.
        start += (SCAN_BYTES - FRAME_HEADER_LEN + 1) as u64;
    }
    Ok(None)
}

/// Walks a segment. The outer error is I/O or a foreign group, the inner a header that is none.
pub(super) fn walk(
    file: &dyn File,
    id: SegmentId,
    group: GroupId,
    known_len: impl FnOnce(&SegmentHeader) -> u64,
) -> Result<Result<Walk, FormatError>, LogError> {
    let file_len = file.len().map_err(LogError::io("reading a segment"))?;
    let header = match read_header(file, id, group)? {
        Ok(header) => header,
        Err(error) => return Ok(Err(error)),
    };
    let known_len = known_len(&header);
    let expected = Expected {
        frame_no: id.first_frame,
        prev: None,
        seq: header.first_seq,
        time: None,
    };
    let walk = Walk {
        header,
        entry: None,
        first_prev: Digest::default(),
        last_digest: Digest::default(),
        valid_len: SEGMENT_HEADER_LEN as u64,
        damage: Vec::new(),
        events: Vec::new(),
    };
    let buffer = Vec::with_capacity(FRAME_BYTES_MAX);
    let mut walker = Walker {
        file,
        file_len,
        buffer,
        walk,
        expected,
        id,
    };
    walker.run(known_len)?;
    let mut walk = walker.walk;
    if let Some(entry) = &mut walk.entry {
        entry.last_digest = digest_hex(&walk.last_digest);
    }
    Ok(Ok(walk))
}
