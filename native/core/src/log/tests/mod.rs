//! What several test files of the log share.

use std::sync::Arc;
use std::time::Duration;

pub(super) use super::testing::GROUP;
use super::testing::split;
use super::{LogEnd, LogError, LogOptions, LogPosition, LogReader, LogWriter, RecoveryReport};
use crate::storage::Directory;

mod agree;
mod basics;
mod crash;
mod damage;
mod events;
mod refuse;
mod space;

/// Small segments, sealed by the caller: every run does the same operations in the same order.
pub(super) const INLINE: LogOptions = LogOptions {
    segment_bytes_max: 20_000,
    segment_records_max: 100,
    segment_age: Duration::from_secs(3600),
    background: false,
};

pub(super) fn open(directory: &Arc<dyn Directory>) -> (LogWriter, RecoveryReport) {
    open_as(directory, INLINE).unwrap()
}

pub(super) fn open_as(
    directory: &Arc<dyn Directory>,
    options: LogOptions,
) -> Result<(LogWriter, RecoveryReport), LogError> {
    LogWriter::open_with(Arc::clone(directory), GROUP, options)
}

/// All frames that a reader sees, from a position on.
pub(super) fn read_from(
    directory: &Arc<dyn Directory>,
    end: &LogEnd,
    position: Option<&LogPosition>,
) -> Result<Vec<Vec<u8>>, LogError> {
    let mut reader = LogReader::open(Arc::clone(directory), GROUP)?;
    reader.seek(position)?;
    let mut frames = Vec::new();
    while let Some(batch) = reader.next_batch(end, 10_000)? {
        let split = split(&batch.frames);
        assert_eq!(split.len(), batch.frame_count as usize);
        frames.extend(split);
    }
    Ok(frames)
}

pub(super) fn read_all(directory: &Arc<dyn Directory>, end: &LogEnd) -> Vec<Vec<u8>> {
    read_from(directory, end, None).unwrap()
}
