//! Journal: the log plus its runs. What a target agent writes.
//!
//! A thread indexes segments as they are sealed and merges runs in tiers. It is never in the way of
//! an append, and what it has not done yet costs readers time, not answers: a run that is missing
//! is built by whoever needs it, and runs are found by their names.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, MappedMutexGuard, Mutex, MutexGuard};

use super::indexer::Indexer;
use crate::format::manifest::{Manifest, SegmentEntry};
use crate::format::segment::SegmentHeader;
use crate::log::{LogEnd, LogError, LogOptions, LogWriter, RecoveryReport, SyncHandle};
use crate::storage::Directory;
use crate::types::{FrameNo, Generation, GroupId};

/// Between two looks at the age of the open segment; seals late by at most this.
const AGE_CHECK: Duration = Duration::from_secs(10);

/// A log that indexes what it seals.
#[derive(Debug)]
pub struct Journal {
    shared: Arc<Shared>,
    indexer: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    indexer: Indexer,
    /// None once the journal is being dropped.
    writer: Mutex<Option<LogWriter>>,
    progress: Mutex<Progress>,
    progressed: Condvar,
}

#[derive(Debug, Default)]
struct Progress {
    /// Sealed segments that have runs, merged as they should be.
    indexed: usize,
    error: Option<String>,
}

impl Journal {
    /// Opens and recovers the log; the runs that are missing are built from now on.
    pub fn open(
        directory: Arc<dyn Directory>,
        group: GroupId,
    ) -> Result<(Self, RecoveryReport), LogError> {
        Self::open_with(directory, group, LogOptions::default())
    }

    pub fn open_with(
        directory: Arc<dyn Directory>,
        group: GroupId,
        options: LogOptions,
    ) -> Result<(Self, RecoveryReport), LogError> {
        let (writer, report) = LogWriter::open_with(Arc::clone(&directory), group, options)?;
        let sealed = writer.sealed();
        let shared = Arc::new(Shared {
            indexer: Indexer::new(directory, group),
            writer: Mutex::new(Some(writer)),
            progress: Mutex::new(Progress::default()),
            progressed: Condvar::new(),
        });
        let indexer = {
            let shared = Arc::clone(&shared);
            let thread = thread::Builder::new().name("journal-index".into());
            let spawned = thread.spawn(move || shared.run(&sealed));
            spawned.map_err(|source| LogError::Io {
                action: "starting a thread",
                source,
            })?
        };
        Ok((
            Self {
                shared,
                indexer: Some(indexer),
            },
            report,
        ))
    }

    fn writer(&self) -> MappedMutexGuard<'_, LogWriter> {
        MutexGuard::map(self.shared.writer.lock(), |writer| {
            writer
                .as_mut()
                .expect("invariant: only drop takes the writer")
        })
    }

    pub fn promise(&self, generation: Generation) {
        self.writer().promise(generation);
    }

    pub fn begin(&self, header: &SegmentHeader) -> Result<(), LogError> {
        self.writer().begin(header)
    }

    /// See `LogWriter::append`. Seals by size, count and age, and indexes what it sealed on a
    /// thread of its own.
    pub fn append(&self, frames: &[u8]) -> Result<LogEnd, LogError> {
        self.writer().append(frames, false)
    }

    pub fn sync_handle(&self) -> Result<SyncHandle, LogError> {
        self.writer().sync_handle()
    }

    /// Seals the open segment now; see `LogWriter::seal`.
    pub fn seal(&self) -> Result<(), LogError> {
        self.writer().seal()
    }

    pub fn end(&self) -> LogEnd {
        self.writer().end()
    }

    pub fn manifest(&self) -> Manifest {
        self.writer().manifest()
    }

    /// Waits until every sealed segment has its run and no merge is due; false if that took longer.
    pub fn wait_indexed(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            let sealed = self.manifest().segments.len();
            let mut progress = self.shared.progress.lock();
            if progress.indexed >= sealed {
                return true;
            }
            if self
                .shared
                .progressed
                .wait_until(&mut progress, deadline)
                .timed_out()
            {
                return false;
            }
        }
    }

    /// Why the newest attempt to index failed, if it did. Reading works without, only slower.
    pub fn index_error(&self) -> Option<String> {
        self.shared.progress.lock().error.clone()
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.shared.indexer.stop();
        // Without a writer nobody sends: the thread's channel ends.
        drop(self.shared.writer.lock().take());
        if let Some(indexer) = self.indexer.take() {
            // A panic in there has been reported by the thread itself.
            let _ = indexer.join();
        }
    }
}

impl Shared {
    fn run(&self, sealed: &Receiver<SegmentEntry>) {
        self.index();
        loop {
            match sealed.recv_timeout(AGE_CHECK) {
                Ok(_) => {
                    while sealed.try_recv().is_ok() {}
                    self.index();
                }
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(writer) = self.writer.lock().as_mut() {
                        // A poisoned log says so to whoever appends next.
                        let _ = writer.seal_if_due();
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Builds what is missing, merges what is due. An error waits for the next sealed segment.
    fn index(&self) {
        let outcome = self.index_all();
        let mut progress = self.progress.lock();
        match outcome {
            Ok(indexed) => {
                *progress = Progress {
                    indexed,
                    error: None,
                }
            }
            Err(error) => progress.error = Some(error.to_string()),
        }
        self.progressed.notify_all();
    }

    fn index_all(&self) -> Result<usize, LogError> {
        let Some(segments) = self.writer.lock().as_ref().map(|w| w.manifest().segments) else {
            return Ok(0);
        };
        self.indexer
            .index(&segments, |entry| match self.writer.lock().as_mut() {
                Some(writer) => writer.publish_run(entry.ordinal, FrameNo(entry.first_frame)),
                None => Ok(()),
            })
    }
}
