//! The log: a directory of segments with a manifest. A spool and a journal are this module under
//! two retention rules. One writer (it holds `lock`), any number of readers in other processes.
//!
//! Directory: `MANIFEST`, `lock`, `IIIIIIII-FFFFFFFF-LLLLLLLL.seg` (sealed: ordinal of the
//! incarnation, first and last frame, hex), `IIIIIIII-FFFFFFFF.open` (the growing one), and index
//! runs `*.run` beside their segments.
//!
//! Recovery: the manifest names sealed segments; sealed files it does not name yet (a crash between
//! rename and manifest) are verified and adopted; an open segment is walked frame by frame, its
//! torn tail cut, and sealed: a new writer always begins a new incarnation (spool) or continues
//! behind the last whole frame in a new segment (journal). A bad frame below what was known durable
//! is damage: reported with its place, never cut.

use std::sync::Arc;

use crate::format::FormatError;
use crate::format::frame::Digest;
use crate::format::manifest::Manifest;
use crate::format::segment::SegmentHeader;
use crate::storage::Directory;
use crate::types::{FrameNo, Generation, GroupId, IncarnationId, Seq, TimeUs};

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    #[error("{action} failed: {source}")]
    Io { action: &'static str, source: std::io::Error },
    /// An earlier write or fsync failed; the object refuses work until it is recovered.
    #[error("an earlier write failed; the log must be recovered")]
    Poisoned,
    #[error("another process writes this log")]
    Locked,
    #[error("no space is left for the log")]
    NoSpace,
    #[error("segment {segment} at byte {offset}: {source}")]
    Damaged { segment: String, offset: u64, source: FormatError },
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("frame belongs to group {found}, the log to {expected}")]
    ForeignGroup { expected: GroupId, found: GroupId },
    #[error("generation {found} is older than {promised}, which this site has promised")]
    Fenced { promised: Generation, found: Generation },
    #[error("incarnation {0} was not announced")]
    UnknownIncarnation(IncarnationId),
    #[error("frame {found} came where {expected} was expected", found = found.0, expected = expected.0)]
    OutOfOrder { expected: FrameNo, found: FrameNo },
    #[error("frame {frame} does not continue the chain: its prev is not the last frame's digest", frame = frame.0)]
    BrokenChain { frame: FrameNo },
    #[error("frame {frame} needs frame {floor}, which is not held", frame = frame.0, floor = floor.0)]
    BelowFloor { frame: FrameNo, floor: FrameNo },
    /// A number that this log holds with another digest: a rolled-back or cloned writer.
    #[error("frame {frame} is held with another digest", frame = frame.0)]
    Conflict { frame: FrameNo },
    #[error("seq {found} is not above {last}, the newest that is held", found = found.0, last = last.0)]
    SeqReused { last: Seq, found: Seq },
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
    pub torn_bytes: u64,
    pub adopted_segments: u32,
    pub damage: Vec<String>,
}

/// The one writer of a log.
#[derive(Debug)]
pub struct LogWriter {
    _private: (),
}

impl LogWriter {
    /// Opens or creates the log of `group` and recovers it.
    pub fn open(
        directory: Arc<dyn Directory>,
        group: GroupId,
    ) -> Result<(Self, RecoveryReport), LogError> {
        let _ = (directory, group);
        todo!()
    }

    pub fn end(&self) -> LogEnd {
        todo!()
    }

    /// Frames older than this generation are refused from now on. The caller has stored it durably.
    pub fn promise(&mut self, generation: Generation) {
        let _ = generation;
        todo!()
    }

    /// Announces an incarnation (idempotent); frames of it may follow. Seals the open segment of
    /// another one. `header.first_frame` is the frame that will come first.
    pub fn begin(&mut self, header: &SegmentHeader) -> Result<(), LogError> {
        let _ = header;
        todo!()
    }

    /// Appends whole frames, back to back, of the current incarnation, after the checks of design
    /// section 6 (generation, incarnation, number, floor, `prev`, checksum, digests, seq). Frames
    /// already held are skipped if their digest agrees. Written, not synced. `trusted` skips the
    /// body digests: only for frames that this process has just sealed.
    pub fn append(&mut self, frames: &[u8], trusted: bool) -> Result<LogEnd, LogError> {
        let _ = (frames, trusted);
        todo!()
    }

    /// The data of everything appended before the call becomes durable when the returned handle's
    /// `sync` returns; the handle can be used without the writer's lock (group commit).
    pub fn sync_handle(&self) -> Result<SyncHandle, LogError> {
        todo!()
    }

    /// Seals the open segment, if any: sync, rename, directory sync, manifest.
    pub fn seal(&mut self) -> Result<(), LogError> {
        todo!()
    }

    /// Notes that the index run of a sealed segment is complete, in the manifest.
    pub fn publish_run(&mut self, ordinal: u32, first_frame: FrameNo) -> Result<(), LogError> {
        let _ = (ordinal, first_frame);
        todo!()
    }

    /// Removes sealed segments whose every frame lies before `position` (spool retention).
    /// Returns the bytes given back.
    pub fn trim(&mut self, position: &LogPosition) -> Result<u64, LogError> {
        let _ = position;
        todo!()
    }

    /// The manifest as it is now, with the events of the open segment added.
    pub fn manifest(&self) -> Manifest {
        todo!()
    }
}

/// See [`LogWriter::sync_handle`].
#[derive(Debug)]
pub struct SyncHandle {
    _private: (),
}

impl SyncHandle {
    /// Position that is durable once `sync` has returned.
    pub fn end(&self) -> &LogEnd {
        todo!()
    }

    pub fn sync(&self) -> Result<(), LogError> {
        todo!()
    }
}

/// Reads a log that another process may be writing.
#[derive(Debug)]
pub struct LogReader {
    _private: (),
}

/// Frames read in one go: whole, of one incarnation, ready for the wire.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Set when `frames` begins an incarnation or a hole was crossed: send it first.
    pub header: Option<SegmentHeader>,
    pub frames: Vec<u8>,
    pub first_frame: FrameNo,
    pub last_frame: FrameNo,
    pub last_seq: Seq,
    pub last_time: TimeUs,
    pub frame_count: u32,
}

impl LogReader {
    /// Opens with a shared lock on the manifest version it reads.
    pub fn open(directory: Arc<dyn Directory>, group: GroupId) -> Result<Self, LogError> {
        let _ = (directory, group);
        todo!()
    }

    /// Goes to a position; `None` is the oldest frame held. If the frame is no longer or not yet
    /// held, goes to the next one that is, and the next batch carries a header.
    pub fn seek(&mut self, position: Option<&LogPosition>) -> Result<(), LogError> {
        let _ = position;
        todo!()
    }

    /// Next frames up to `end`, what the writer has published; at least one frame if there is one,
    /// else `None`. Follows sealed and renamed segments.
    pub fn next_batch(&mut self, end: &LogEnd, max_bytes: usize) -> Result<Option<Batch>, LogError> {
        let _ = (end, max_bytes);
        todo!()
    }
}
