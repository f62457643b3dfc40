//! Group commit: makes durable what was appended, without the writer's lock.

use std::sync::Arc;

use super::catalog::{Catalog, SegmentFile};
use super::{LogEnd, LogError};

/// See [`LogWriter::sync_handle`](super::LogWriter::sync_handle).
#[derive(Debug)]
pub struct SyncHandle {
    pub(super) catalog: Arc<Catalog>,
    /// Files that may hold data that is not durable, oldest first, and their lengths.
    pub(super) files: Vec<(Arc<SegmentFile>, u64)>,
    pub(super) end: LogEnd,
}

impl SyncHandle {
    /// Position that is durable once `sync` has returned.
    pub fn end(&self) -> &LogEnd {
        &self.end
    }

    /// Makes it durable. An error poisons the log: what was not durable may be gone.
    pub fn sync(&self) -> Result<(), LogError> {
        self.catalog.check()?;
        // Oldest first, and the note last: nothing is called durable before all that precedes it.
        for (file, length) in &self.files {
            self.catalog.sync_segment(file, *length)?;
        }
        match self.files.last() {
            Some((file, length)) => self.catalog.note_synced(file, *length),
            None => Ok(()),
        }
    }
}
