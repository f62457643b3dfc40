//! Builds the runs that a log lacks and merges them in tiers. Not a writer of the log: what it
//! needs of that is the list of sealed segments, so it can work beside the writer of its own
//! process (`Journal`) or of another one. One indexer a log at a time.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::build::index_segment;
use super::cache::Cache;
use super::names::{self, RunKey};
use super::opening::{describes, key_of, read_manifest};
use super::run::{PageCache, Run};
use super::tiers::{self, RunSize};
use super::walk::SegmentFile;
use super::write::{mergeable, write_run};
use crate::format::FormatError;
use crate::format::manifest::SegmentEntry;
use crate::log::LogError;
use crate::storage::Directory;
use crate::types::GroupId;

/// Keeps the runs of one log directory.
#[derive(Debug)]
pub struct Indexer {
    directory: Arc<dyn Directory>,
    group: GroupId,
    stop: AtomicBool,
}

impl Indexer {
    pub fn new(directory: Arc<dyn Directory>, group: GroupId) -> Self {
        Self {
            directory,
            group,
            stop: AtomicBool::new(false),
        }
    }

    /// Indexes what the manifest on disk names, for a log that another process writes. Returns how
    /// many segments have runs now. A segment that is sealed meanwhile waits for the next call.
    pub fn index_sealed(&self) -> Result<usize, LogError> {
        let manifest = read_manifest(self.directory.as_ref(), self.group)?;
        self.index(&manifest.segments, |_| Ok(()))
    }

    /// Ends what runs, with an error of kind `Interrupted`, and refuses more.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Builds what is missing for `segments`, the sealed ones in log order, merges what is due and
    /// removes what others replace. `built` is told of each segment that has got a run of its own.
    pub(super) fn index(
        &self,
        segments: &[SegmentEntry],
        mut built: impl FnMut(&SegmentEntry) -> Result<(), LogError>,
    ) -> Result<usize, LogError> {
        let directory = self.directory.as_ref();
        // Merging goes from end to end and caches nothing.
        let cache: Arc<PageCache> = Arc::new(Cache::new(0));
        let mut runs: Vec<Run> = Vec::new();
        let keys: Vec<_> = segments.iter().map(key_of).collect();
        let listed = directory.list().map_err(io_failed)?;
        for cover in names::cover(&keys, &listed) {
            let covered = &segments[cover.segments.clone()];
            if let Some(name) = &cover.run
                && let Some(run) = self.usable(name, covered, &cache)?
            {
                runs.push(run);
                continue;
            }
            for entry in covered {
                let name = self.build(entry)?;
                built(entry)?;
                runs.push(Run::open(directory, &name, &cache, 0)?);
            }
        }
        while let Some(range) = tiers::plan(&sizes(&runs)) {
            let inputs: Vec<&Run> = runs[range.clone()].iter().collect();
            if !mergeable(&inputs) {
                break;
            }
            let name = name_of(&inputs);
            write_run(directory, &name, &inputs, &self.stop)?;
            runs.splice(range, [Run::open(directory, &name, &cache, 0)?]);
        }
        self.sweep(&runs)?;
        Ok(segments.len())
    }

    /// A run that is there and right; a wrong one is removed, to be built anew.
    fn usable(
        &self,
        name: &str,
        segments: &[SegmentEntry],
        cache: &Arc<PageCache>,
    ) -> Result<Option<Run>, LogError> {
        match Run::open(self.directory.as_ref(), name, cache, 0) {
            Ok(run) if describes(&run, self.group, segments) => return Ok(Some(run)),
            Ok(_) | Err(LogError::Damaged { .. } | LogError::Format(_)) => {}
            Err(error) => return Err(error),
        }
        self.directory.remove(name).map_err(io_failed)?;
        Ok(None)
    }

    /// Writes the run of one segment and returns its name.
    fn build(&self, entry: &SegmentEntry) -> Result<String, LogError> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io_failed(io::ErrorKind::Interrupted.into()));
        }
        let name = key_of(entry).file_name();
        let file = self.directory.open(&name, false).map_err(io_failed)?;
        let segment = SegmentFile { name, file };
        let indexed = index_segment(self.group, entry.ordinal, &segment, entry.bytes, false)
            .map_err(|stopped| stopped.error)?;
        let empty = || segment.damaged(0, no_frames());
        let run = indexed.ok_or_else(empty)?.run;
        let name = name_of(&[&run]);
        write_run(self.directory.as_ref(), &name, &[&run], &self.stop)?;
        Ok(name)
    }

    /// Removes runs that others replace. Readers that have them open go on reading them; one that
    /// was about to open one lists the directory again.
    fn sweep(&self, runs: &[Run]) -> Result<(), LogError> {
        let used: Vec<&str> = runs.iter().filter_map(Run::name).collect();
        let listed = self.directory.list().map_err(io_failed)?;
        let mut removed = false;
        for name in names::superfluous(&used, &listed) {
            self.directory.remove(name).map_err(io_failed)?;
            removed = true;
        }
        if removed {
            self.directory.sync().map_err(io_failed)
        } else {
            Ok(())
        }
    }
}

fn no_frames() -> FormatError {
    let (what, field, reason) = ("segment", "frames", "none, though the manifest names some");
    FormatError::Field {
        what,
        field,
        reason,
    }
}

fn io_failed(source: io::Error) -> LogError {
    LogError::Io {
        action: "keeping index runs",
        source,
    }
}

fn sizes(runs: &[Run]) -> Vec<RunSize> {
    let size = |run: &Run| RunSize {
        segments: run.tail.members.len(),
        entries: run.header.entries,
    };
    runs.iter().map(size).collect()
}

/// Name of the run that covers what these cover.
fn name_of(runs: &[&Run]) -> String {
    let members = |run: &&Run| run.tail.members.clone();
    let all: Vec<_> = runs.iter().flat_map(members).collect();
    let (first, last) = (&all[0], &all[all.len() - 1]);
    RunKey {
        first: first.key(),
        last: last.key(),
    }
    .file_name()
}
