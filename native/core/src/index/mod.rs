//! Index: for each sealed segment a sorted run `(volume, block, seq) -> position`, immutable.
//!
//! `Journal` is the log plus its runs: what a target agent writes. `Indexer` makes those runs, also
//! for a log that another process writes. `History` is what a view reads:
//! the runs and, for the open segment, an index of its own in memory, up to the committed length.
//! `entry` says how an extent becomes entries, `layout` how entries become a file.

mod build;
pub(crate) mod cache;
pub mod entry;
mod event;
mod history;
mod indexer;
mod journal;
pub mod layout;
mod names;
mod opening;
mod points;
mod records;
mod run;
mod tiers;
mod walk;
mod write;

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)] // sizes of tests are small
pub(crate) mod testing;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests;

pub use event::{Event, EventKind};
pub use history::{FramePlace, History, Incarnation, READERS_LOCK};
pub use indexer::Indexer;
pub use journal::Journal;
pub use points::{Bookmark, Gap, Span, Timeline};
pub use walk::SegmentFile;

use crate::log::LogError;
use crate::types::{FrameNo, Seq, TimeUs};

/// Where the newest version of a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Zeroes: never written (seq 0), or a zero record.
    Zero { seq: Seq },
    /// Zeroes that a discard left.
    Discarded { seq: Seq },
    /// Block `payload_block` of the payload of a frame.
    Stored {
        seq: Seq,
        ordinal: u32,
        frame_no: FrameNo,
        payload_block: u32,
    },
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
    #[error("time {} us lies before the horizon, {} us", asked.0, horizon.0)]
    BeforeHorizon { asked: TimeUs, horizon: TimeUs },
    #[error("time {} us lies behind the newest recovery point, {} us", asked.0, newest.0)]
    InFuture { asked: TimeUs, newest: TimeUs },
    #[error("seq {} lies outside of history, which holds {} to {}", asked.0, oldest.0, newest.0)]
    SeqOutside {
        asked: Seq,
        oldest: Seq,
        newest: Seq,
    },
    #[error("the point lies inside an inconsistent span; {}", before(*.last))]
    InsideSpan { last: Option<Point> },
    #[error("no bookmark is named {0:?}")]
    NoBookmark(String),
    #[error("history holds no consistent recovery point yet")]
    Empty,
    #[error("volume {0:?} is not in this group")]
    NoVolume(String),
    /// The writable layer of a view cannot be used.
    #[error("overlay file {file}: {source}")]
    Overlay { file: String, source: LogError },
}

/// The consistent point before a span, in words.
fn before(last: Option<Point>) -> String {
    last.map_or_else(
        || "no consistent one lies before it".to_owned(),
        |point| {
            let Point { seq, time } = point;
            format!(
                "the last consistent one before is seq {} at {} us",
                seq.0, time.0
            )
        },
    )
}
