//! The note of what is durable: a hint for recovery, written after each sync, never synced itself.
//!
//! It says up to which byte of which segment everything is known durable. It is written only after
//! the data's sync has returned, so it never says too much; after a power cut it may say too
//! little. Recovery uses it for one decision: a bad frame below it is damage, above it a torn tail.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use super::names::{self, SegmentId};
use crate::format::layout::{self, Field, Format};
use crate::storage::{Directory, File, is_full};
use crate::types::{FrameNo, IncarnationId};

pub const SYNCED_LEN: usize = 64;

const INCARNATION: Field = Field::new("incarnation", 16, 16);
const ORDINAL: Field = Field::new("ordinal", 32, 4);
const FIRST_FRAME: Field = Field::new("first_frame", 36, 4);
const LENGTH: Field = Field::new("length", 40, 8);
const RESERVED_48: Field = Field::new("reserved_48", 48, 8);
const OWN: &[Field] = &[INCARNATION, ORDINAL, FIRST_FRAME, LENGTH, RESERVED_48];

/// The note, field by field; `docs/format/log-directory.md` holds the same table.
pub const LAYOUT: &[Field] = &layout::header::<{ layout::fields(OWN) }>(OWN, SYNCED_LEN);

const FORMAT: Format = Format {
    what: "synced note",
    magic: *b"EBBSYNCD",
    version: 1,
    header_len: SYNCED_LEN,
    reserved: &[layout::FLAGS, RESERVED_48],
};

/// Everything in older segments, and `length` bytes of this one, are durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Synced {
    pub incarnation: IncarnationId,
    pub segment: SegmentId,
    pub length: u64,
}

impl Synced {
    pub fn encode(&self) -> [u8; SYNCED_LEN] {
        let mut bytes = [0; SYNCED_LEN];
        FORMAT.begin(&mut bytes, 0);
        INCARNATION.put(&mut bytes, &self.incarnation.0);
        ORDINAL.put(&mut bytes, &self.segment.ordinal.to_le_bytes());
        FIRST_FRAME.put(&mut bytes, &self.segment.first_frame.0.to_le_bytes());
        LENGTH.put(&mut bytes, &self.length.to_le_bytes());
        FORMAT.finish(&mut bytes);
        bytes
    }

    /// `None` if the bytes are no note: then nothing is known, which is always safe to assume.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes = FORMAT.open(bytes).ok()?;
        let segment = SegmentId {
            ordinal: ORDINAL.u32(bytes),
            first_frame: FrameNo(FIRST_FRAME.u32(bytes)),
        };
        let incarnation = IncarnationId(INCARNATION.array(bytes));
        Some(Self {
            incarnation,
            segment,
            length: LENGTH.u64(bytes),
        })
    }

    /// Bytes of a segment that are known durable.
    pub fn known_len(&self, segment: SegmentId, incarnation: IncarnationId) -> u64 {
        // An ordinal whose incarnation was lost before it was durable may be given out again.
        if segment < self.segment {
            u64::MAX
        } else if segment == self.segment && incarnation == self.incarnation {
            self.length
        } else {
            0
        }
    }
}

/// The note's file. Without one (no space when it was to be made) nothing is noted.
#[derive(Debug)]
pub(super) struct SyncedFile {
    file: Option<Arc<dyn File>>,
    newest: Mutex<Option<(SegmentId, u64)>>,
}

/// Reads the note of a log.
pub(super) fn read(directory: &dyn Directory) -> io::Result<Option<Synced>> {
    match directory.open(names::SYNCED, false) {
        Ok(file) => {
            let mut bytes = [0; SYNCED_LEN];
            let read = file.read_at(&mut bytes, 0)?;
            Ok(Synced::parse(&bytes[..read]))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl SyncedFile {
    pub(super) fn open(directory: &dyn Directory) -> io::Result<Self> {
        let file = match directory.open(names::SYNCED, true) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                directory.create(names::SYNCED)
            }
            other => other,
        };
        let file = match file {
            Err(error) if is_full(&error) => None,
            other => Some(other?),
        };
        Ok(Self {
            file,
            newest: Mutex::new(None),
        })
    }

    /// Notes that a sync has returned. Never goes back.
    pub(super) fn advance(&self, note: &Synced) -> io::Result<()> {
        let mut newest = self.newest.lock();
        let place = (note.segment, note.length);
        if newest.is_some_and(|newest| place <= newest) {
            return Ok(());
        }
        if let Some(file) = &self.file {
            match file.write_at(&note.encode(), 0) {
                // The older note stays or is torn: less is known, nothing is wrong.
                Err(error) if is_full(&error) => return Ok(()),
                other => other?,
            }
        }
        *newest = Some(place);
        Ok(())
    }
}
