//! Index: for each sealed segment a sorted run `(volume, block, seq) -> position`, immutable.
//!
//! `Journal` is the log plus its runs: what a target agent writes. `History` is what a view reads:
//! the runs and, for the open segment, an index of its own in memory, up to the committed length.

use std::sync::Arc;

use crate::format::manifest::Manifest;
use crate::format::segment::SegmentHeader;
use crate::log::{LogEnd, LogError, RecoveryReport, SyncHandle};
use crate::storage::Directory;
use crate::types::{BlockIndex, FrameNo, Generation, GroupId, Seq, TimeUs, VolumeIndex};

/// Where the newest version of a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Zeroes: never written, or a zero record.
    Zero { seq: Seq },
    /// Zeroes that a discard left.
    Discarded { seq: Seq },
    /// Block `payload_block` of the payload of a frame.
    Stored { seq: Seq, ordinal: u32, frame_no: FrameNo, payload_block: u32 },
}

/// A log that indexes what it seals.
#[derive(Debug)]
pub struct Journal {
    _private: (),
}

impl Journal {
    /// Opens and recovers the log, builds the runs that are missing.
    pub fn open(
        directory: Arc<dyn Directory>,
        group: GroupId,
    ) -> Result<(Self, RecoveryReport), LogError> {
        let _ = (directory, group);
        todo!()
    }

    pub fn promise(&self, generation: Generation) {
        let _ = generation;
        todo!()
    }

    pub fn begin(&self, header: &SegmentHeader) -> Result<(), LogError> {
        let _ = header;
        todo!()
    }

    /// See `LogWriter::append`. Seals by size, count and age, and indexes what it sealed on a
    /// thread of its own.
    pub fn append(&self, frames: &[u8]) -> Result<LogEnd, LogError> {
        let _ = frames;
        todo!()
    }

    pub fn sync_handle(&self) -> Result<SyncHandle, LogError> {
        todo!()
    }

    pub fn end(&self) -> LogEnd {
        todo!()
    }

    pub fn manifest(&self) -> Manifest {
        todo!()
    }
}

/// The readable history of a group up to a committed end.
#[derive(Debug)]
pub struct History {
    _private: (),
}

/// A recovery point, resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    /// Records up to and including this one are seen.
    pub seq: Seq,
    pub time: TimeUs,
}

/// What a user asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PointSpec {
    Newest,
    At(TimeUs),
    AtSeq(Seq),
    Bookmark(String),
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HistoryError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("the point {asked:?} lies before the horizon {horizon:?}")]
    BeforeHorizon { asked: TimeUs, horizon: TimeUs },
    #[error("the point {asked:?} lies behind the newest recovery point {newest:?}")]
    InFuture { asked: TimeUs, newest: TimeUs },
    #[error("the point lies inside an inconsistent span; the last consistent one before is {last:?}")]
    InsideSpan { last: Option<Point> },
    #[error("no bookmark is named {0:?}")]
    NoBookmark(String),
    #[error("history holds no consistent recovery point yet")]
    Empty,
    #[error("volume {0:?} is not in this group")]
    NoVolume(String),
}

impl History {
    /// Opens runs and indexes the open segment up to `end` (or as far as frames verify).
    pub fn open(
        directory: Arc<dyn Directory>,
        group: GroupId,
        end: Option<&LogEnd>,
    ) -> Result<Self, HistoryError> {
        let _ = (directory, group, end);
        todo!()
    }

    /// Resolves a point (design invariant 5). `exact` refuses a point inside an inconsistent span
    /// instead of going back to the last consistent one.
    pub fn resolve(&self, spec: &PointSpec, exact: bool) -> Result<Point, HistoryError> {
        let _ = (spec, exact);
        todo!()
    }

    /// Newest version of a block at or before `seq`, and for how many blocks from here on the
    /// answer has the same form (same zero range; consecutive payload blocks of one frame).
    pub fn lookup(
        &self,
        volume: VolumeIndex,
        block: BlockIndex,
        seq: Seq,
    ) -> Result<(Version, u64), HistoryError> {
        let _ = (volume, block, seq);
        todo!()
    }

    /// Volumes and their sizes as of a point.
    pub fn volumes(&self, seq: Seq) -> Vec<(VolumeIndex, String, u64)> {
        let _ = seq;
        todo!()
    }
}
