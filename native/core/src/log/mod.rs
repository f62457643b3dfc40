//! The log: a directory of segments with a manifest. A spool and a journal are this module under
//! two retention rules. One writer (it holds `lock`), any number of readers in other processes.
//!
//! Directory: `MANIFEST`, `lock`, `synced`, `IIIIIIII-FFFFFFFF-LLLLLLLL.seg` (sealed: ordinal of
//! the incarnation, first and last frame, hex), `IIIIIIII-FFFFFFFF.open` (not sealed yet), and
//! index runs `*.run` beside their segments. `docs/format/log-directory.md` has the whole account.
//!
//! Order of durability. A segment that is full is sealed behind the writer's back (data sync,
//! rename, directory sync, manifest) while the next one grows. Nothing in a segment is called
//! durable before everything in all older segments is, so what a crash leaves is a prefix.
//!
//! Recovery: the manifest names sealed segments; sealed files it does not name yet (a crash between
//! rename and manifest) are verified and adopted; open segments are walked frame by frame, the
//! torn tail cut, and sealed: a new writer always begins a new incarnation (spool) or continues
//! behind the last whole frame in a new segment (journal). A bad frame below what was known durable
//! is damage: reported with its place, never cut.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use crate::constants::{SEGMENT_AGE_S, SEGMENT_BYTES_MAX, SEGMENT_RECORDS_MAX};
use crate::format::FormatError;
use crate::format::frame::Digest;
use crate::storage::{Directory, is_full};
use crate::types::{FrameNo, Generation, GroupId, IncarnationId, Seq, TimeUs};

mod admit;
mod catalog;
mod events;
mod held;
pub mod names;
mod reader;
mod recovery;
mod sync;
pub mod synced;
mod verify;
mod walk;
mod writer;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use names::SegmentId;
pub use reader::{Batch, LogReader};
pub use sync::SyncHandle;
pub use verify::{Finding, verify};
pub use writer::LogWriter;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    #[error("{action} failed: {source}")]
    Io {
        action: &'static str,
        source: std::io::Error,
    },
    /// An earlier write or fsync failed; the object refuses work until it is recovered.
    #[error("an earlier write failed; the log must be recovered")]
    Poisoned,
    #[error("another process writes this log")]
    Locked,
    #[error("no space is left for the log")]
    NoSpace,
    #[error("segment {segment} at byte {offset}: {source}")]
    Damaged {
        segment: String,
        offset: u64,
        source: FormatError,
    },
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("frame belongs to group {found}, the log to {expected}")]
    ForeignGroup { expected: GroupId, found: GroupId },
    #[error("generation {found} is older than {promised}, which this site has promised")]
    Fenced {
        promised: Generation,
        found: Generation,
    },
    #[error("incarnation {0} was not announced")]
    UnknownIncarnation(IncarnationId),
    #[error("frame {} came where {} was expected", found.0, expected.0)]
    OutOfOrder { expected: FrameNo, found: FrameNo },
    #[error("frame {} breaks the chain: its prev is not the last frame's digest", frame.0)]
    BrokenChain { frame: FrameNo },
    #[error("frame {} needs frame {}, which is not held", frame.0, floor.0)]
    BelowFloor { frame: FrameNo, floor: FrameNo },
    /// A number that this log holds with another digest: a rolled-back or cloned writer.
    #[error("frame {frame} is held with another digest", frame = frame.0)]
    Conflict { frame: FrameNo },
    #[error("seq {} is not above {}, the newest that is held", found.0, last.0)]
    SeqReused { last: Seq, found: Seq },
    #[error("time {} us is not above {}, the newest that is held", found.0, last.0)]
    TimeReused { last: TimeUs, found: TimeUs },
    /// The incarnation's header differs from the one held under the same identity.
    #[error("incarnation {0} is held with another header")]
    IncarnationConflict(IncarnationId),
    /// A later incarnation has begun; this one can only be repeated, not continued.
    #[error("incarnation {0} was followed by another and cannot grow")]
    IncarnationClosed(IncarnationId),
}

impl LogError {
    fn io(action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| {
            if is_full(&source) {
                Self::NoSpace
            } else {
                Self::Io { action, source }
            }
        }
    }
}

/// A place in the log: behind frame `frame_no` of `incarnation` comes the next to read or append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogPosition {
    pub incarnation: IncarnationId,
    /// Next frame.
    pub next_frame: FrameNo,
}

/// State of the newest end of a log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogEnd {
    pub incarnation: Option<IncarnationId>,
    pub ordinal: u32,
    pub last_frame: Option<FrameNo>,
    pub last_digest: Digest,
    /// Newest record held.
    pub last_seq: Seq,
    pub last_time: TimeUs,
    /// First frame of the open segment, and its committed length: readers look no further.
    pub open_first_frame: Option<FrameNo>,
    pub committed_len: u64,
    /// Bytes of all segments.
    pub total_bytes: u64,
}

/// What recovery found. Shown by `status`, kept in the logs of the process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Bytes of frames that were never made durable and had to go.
    pub torn_bytes: u64,
    pub adopted_segments: u32,
    pub damage: Vec<String>,
}

/// When segments are sealed, and by whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogOptions {
    pub segment_bytes_max: u64,
    pub segment_records_max: u64,
    pub segment_age: Duration,
    /// Seal on a thread of the writer's own, so that a roll-over does not wait for an fsync.
    pub background: bool,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            segment_bytes_max: SEGMENT_BYTES_MAX,
            segment_records_max: SEGMENT_RECORDS_MAX,
            segment_age: Duration::from_secs(SEGMENT_AGE_S),
            background: true,
        }
    }
}

/// A directory and the group whose log it holds.
#[derive(Debug, Clone)]
struct Home {
    directory: Arc<dyn Directory>,
    group: GroupId,
}

/// A digest as the manifest writes it.
fn digest_hex(digest: &Digest) -> String {
    let mut text = String::with_capacity(2 * digest.len());
    for byte in digest {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// A digest of the manifest; its parser has checked that it is 64 hex digits.
fn digest_of(text: &str) -> Digest {
    let mut digest = Digest::default();
    for (byte, pair) in digest.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let pair = std::str::from_utf8(pair).unwrap_or("00");
        *byte = u8::from_str_radix(pair, 16).unwrap_or(0);
    }
    digest
}
