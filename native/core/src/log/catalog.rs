//! What writer, sync handles and the sealing thread share: the manifest, and what still has to be
//! sealed, published or removed.
//!
//! Sealing, in this order, each step before the next begins: data sync, rename to the sealed name,
//! directory sync, manifest. A crash between any two leaves something recovery knows: an open
//! segment, or a sealed one that the manifest does not name. Segments are sealed in the order of
//! history, so a sealed segment proves all before it durable.
//!
//! No space for a rename or a manifest is no harm: the work stays in the queue and is tried again
//! with the next. Any other error, and every failed data or directory sync, poisons the log.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use super::events;
use super::names::{self, SegmentId, SegmentState};
use super::synced::{Synced, SyncedFile};
use super::{Home, LogError};
use crate::format::manifest::{EventEntry, IncarnationEntry, Manifest, SegmentEntry};
use crate::storage::{File, is_full, replace_file};
use crate::types::{FrameNo, IncarnationId};

/// Segments that wait to be sealed before a roll-over waits for the sealing thread.
pub(super) const SEALS_PENDING_MAX: usize = 2;

/// A segment file that grows or waits to be sealed.
#[derive(Debug)]
pub(super) struct SegmentFile {
    pub id: SegmentId,
    pub incarnation: IncarnationEntry,
    pub incarnation_id: IncarnationId,
    pub file: Arc<dyn File>,
    /// Its name is durable.
    named: AtomicBool,
    /// Bytes that are durable.
    durable_len: AtomicU64,
}

impl SegmentFile {
    pub(super) fn new(
        id: SegmentId,
        incarnation: IncarnationEntry,
        incarnation_id: IncarnationId,
        file: Arc<dyn File>,
    ) -> Self {
        let (named, durable_len) = (AtomicBool::new(false), AtomicU64::new(0));
        Self {
            id,
            incarnation,
            incarnation_id,
            file,
            named,
            durable_len,
        }
    }
}

/// A complete segment on its way into the manifest.
#[derive(Debug, Clone)]
pub(super) struct Sealing {
    pub file: Arc<SegmentFile>,
    pub entry: SegmentEntry,
    pub events: Vec<EventEntry>,
    renamed: bool,
}

impl Sealing {
    pub(super) fn new(
        file: Arc<SegmentFile>,
        entry: SegmentEntry,
        events: Vec<EventEntry>,
    ) -> Self {
        Self {
            file,
            entry,
            events,
            renamed: false,
        }
    }
}

// Independent facts, not states of one machine.
#[allow(clippy::struct_excessive_bools)]
#[derive(Debug, Default)]
pub(super) struct Inner {
    /// As it will be when all work is done, but for the segments in `sealing`.
    pub manifest: Manifest,
    /// The file does not say what `manifest` says.
    pub dirty: bool,
    pub sealing: VecDeque<Sealing>,
    /// Trimmed; their files go when the manifest no longer names them. Flag: already emptied.
    pub gone: Vec<(SegmentEntry, bool)>,
    /// Sealed since the manifest was last written; told to `listeners` when it is.
    unpublished: Vec<SegmentEntry>,
    listeners: Vec<Sender<SegmentEntry>>,
    /// A sealing thread runs.
    thread: bool,
    work: bool,
    /// The last attempt found no space: waiting for it would be waiting for somebody else.
    stalled: bool,
    stop: bool,
}

#[derive(Debug)]
pub(super) struct Catalog {
    pub home: Home,
    pub inner: Mutex<Inner>,
    changed: Condvar,
    /// Held while work is done, so that it is done once and in order.
    working: Mutex<()>,
    poisoned: AtomicBool,
    synced: SyncedFile,
}

impl Catalog {
    pub(super) fn new(home: Home, manifest: Manifest, dirty: bool, synced: SyncedFile) -> Self {
        let inner = Inner {
            manifest,
            dirty,
            ..Inner::default()
        };
        Self {
            home,
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            working: Mutex::new(()),
            poisoned: AtomicBool::new(false),
            synced,
        }
    }

    pub(super) fn check(&self) -> Result<(), LogError> {
        if self.poisoned.load(Ordering::Acquire) {
            Err(LogError::Poisoned)
        } else {
            Ok(())
        }
    }

    pub(super) fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
        // Under the lock, so that nobody who is about to wait misses it.
        let _inner = self.inner.lock();
        self.changed.notify_all();
    }

    /// Poisons the log and makes the error that says why.
    pub(super) fn fail(&self, action: &'static str) -> impl FnOnce(std::io::Error) -> LogError {
        move |source| {
            self.poison();
            LogError::Io { action, source }
        }
    }

    /// Like `fail`, but a full medium is an answer, not a failure.
    fn fail_unless_full(&self, action: &'static str) -> impl FnOnce(std::io::Error) -> LogError {
        move |source| {
            if is_full(&source) {
                LogError::NoSpace
            } else {
                self.fail(action)(source)
            }
        }
    }

    pub(super) fn listen(&self, listener: Sender<SegmentEntry>) {
        self.inner.lock().listeners.push(listener);
    }

    /// Ends the channels of all listeners. A `SyncHandle` may keep the catalog beyond its writer.
    pub(super) fn unlisten(&self) {
        self.inner.lock().listeners.clear();
    }

    /// Makes `length` bytes of a segment durable, its name included.
    pub(super) fn sync_segment(&self, file: &SegmentFile, length: u64) -> Result<(), LogError> {
        self.check()?;
        if file.durable_len.load(Ordering::Acquire) < length {
            file.file
                .sync_data()
                .map_err(self.fail("syncing a segment"))?;
            file.durable_len.fetch_max(length, Ordering::AcqRel);
        }
        if !file.named.load(Ordering::Acquire) {
            self.home
                .directory
                .sync()
                .map_err(self.fail("syncing the directory"))?;
            file.named.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Notes that everything up to here is durable. The caller has synced all older segments too.
    pub(super) fn note_synced(&self, file: &SegmentFile, length: u64) -> Result<(), LogError> {
        let note = Synced {
            incarnation: file.incarnation_id,
            segment: file.id,
            length,
        };
        self.synced
            .advance(&note)
            .map_err(self.fail("noting what is durable"))
    }

    /// Queues a complete segment. With a sealing thread, waits while too many wait already.
    pub(super) fn queue(&self, sealing: Sealing) -> Result<(), LogError> {
        let mut inner = self.inner.lock();
        inner.sealing.push_back(sealing);
        inner.work = true;
        inner.stalled = false;
        self.changed.notify_all();
        while inner.thread && inner.sealing.len() > SEALS_PENDING_MAX && !inner.stalled {
            self.check()?;
            self.changed.wait(&mut inner);
        }
        drop(inner);
        self.check()
    }

    /// Wakes the sealing thread for a changed manifest.
    pub(super) fn wake(&self) {
        self.inner.lock().work = true;
        self.changed.notify_all();
    }

    /// Does all outstanding work: seals, publishes, removes.
    pub(super) fn work(&self) -> Result<(), LogError> {
        let _working = self.working.lock();
        self.check()?;
        loop {
            // Only this function takes from the queue, and one thread at a time is in it.
            let Some(next) = self.inner.lock().sealing.front().cloned() else {
                break;
            };
            self.seal(&next)?;
        }
        let unnamed = match self.publish() {
            Err(LogError::NoSpace) => {
                // Only if trimmed segments could be emptied is there hope for more space.
                if !self.empty_gone()? {
                    return Err(LogError::NoSpace);
                }
                self.publish()?
            }
            other => other?,
        };
        self.remove_gone(unnamed);
        Ok(())
    }

    fn seal(&self, next: &Sealing) -> Result<(), LogError> {
        let directory = &self.home.directory;
        if !next.renamed {
            self.sync_segment(&next.file, next.entry.bytes)?;
            directory
                .rename(
                    &next.file.id.file_name(SegmentState::Open),
                    &names::sealed_name(&next.entry),
                )
                .map_err(self.fail_unless_full("renaming a segment"))?;
            if let Some(front) = self.inner.lock().sealing.front_mut() {
                front.renamed = true;
            }
        }
        directory
            .sync()
            .map_err(self.fail("syncing the directory"))?;
        self.note_synced(&next.file, next.entry.bytes)?;
        let mut inner = self.inner.lock();
        inner.sealing.pop_front();
        let manifest = &mut inner.manifest;
        add_incarnation(manifest, &next.file.incarnation);
        events::publish(manifest, next.events.clone());
        manifest.segments.push(next.entry.clone());
        inner.unpublished.push(next.entry.clone());
        inner.dirty = true;
        self.changed.notify_all();
        Ok(())
    }

    /// Replaces the manifest if it changed. Returns how many trimmed segments it names no longer:
    /// the first of `gone`; others may have joined them meanwhile.
    fn publish(&self) -> Result<usize, LogError> {
        let (manifest, entries, unnamed) = {
            let mut inner = self.inner.lock();
            if !inner.dirty {
                return Ok(inner.gone.len());
            }
            inner.manifest.version += 1;
            inner.dirty = false;
            let unpublished = std::mem::take(&mut inner.unpublished);
            (inner.manifest.clone(), unpublished, inner.gone.len())
        };
        let replaced = replace_file(&*self.home.directory, names::MANIFEST, &manifest.encode());
        let mut inner = self.inner.lock();
        if let Err(source) = replaced {
            inner.dirty = true;
            inner.unpublished.splice(0..0, entries);
            drop(inner);
            // Even a sync that found no space: the copy that failed is thrown away and made anew.
            return Err(self.fail_unless_full("replacing the manifest")(source));
        }
        for entry in entries {
            inner
                .listeners
                .retain(|listener| listener.send(entry.clone()).is_ok());
        }
        Ok(unnamed)
    }

    /// Empties the files of trimmed segments, which gives room for the manifest that drops them.
    /// Renamed first, and that made durable: an empty file under the sealed name is damage.
    fn empty_gone(&self) -> Result<bool, LogError> {
        let directory = &self.home.directory;
        let full: Vec<SegmentEntry> = {
            let inner = self.inner.lock();
            inner
                .gone
                .iter()
                .filter(|(_, emptied)| !emptied)
                .map(|(e, _)| e.clone())
                .collect()
        };
        for entry in &full {
            let gone = gone_name(entry);
            match directory.rename(&names::sealed_name(entry), &gone) {
                // A crash-free retry finds the rename done.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                other => other.map_err(self.fail_unless_full("renaming a trimmed segment"))?,
            }
            directory
                .sync()
                .map_err(self.fail("syncing the directory"))?;
            let emptied = directory.open(&gone, true).and_then(|file| file.set_len(0));
            emptied.map_err(self.fail("emptying a trimmed segment"))?;
        }
        for (entry, emptied) in &mut self.inner.lock().gone {
            *emptied |= full.contains(entry);
        }
        Ok(!full.is_empty())
    }

    /// Removes the files of trimmed segments and their runs. What cannot be removed now is found
    /// by the next recovery: its frames lie below the horizon.
    fn remove_gone(&self, unnamed: usize) {
        let gone: Vec<_> = self.inner.lock().gone.drain(..unnamed).collect();
        for (entry, emptied) in gone {
            let name = if emptied {
                gone_name(&entry)
            } else {
                names::sealed_name(&entry)
            };
            let _ = self.home.directory.remove(&name);
            let _ = self.home.directory.remove(&names::run_name(&entry));
        }
    }

    /// Starts the sealing thread. It ends at `stop`; what is left then, recovery does.
    pub(super) fn spawn(catalog: &Arc<Self>) -> Result<JoinHandle<()>, LogError> {
        let catalog = Arc::clone(catalog);
        catalog.inner.lock().thread = true;
        std::thread::Builder::new()
            .name("log-seal".to_owned())
            .spawn(move || {
                let _watch = SealerWatch(&catalog);
                loop {
                    let mut inner = catalog.inner.lock();
                    while !inner.work && !inner.stop {
                        catalog.changed.wait(&mut inner);
                    }
                    if inner.stop {
                        return;
                    }
                    inner.work = false;
                    drop(inner);
                    // No space: tried again with the next work. Poisoned: every caller is told.
                    if catalog.work().is_err() {
                        catalog.inner.lock().stalled = true;
                    }
                    catalog.changed.notify_all();
                }
            })
            .map_err(LogError::io("starting the sealing thread"))
    }

    pub(super) fn stop(&self) {
        self.inner.lock().stop = true;
        self.changed.notify_all();
    }
}

/// A sealing thread that panicked seals no more: nobody may wait for it, and the log takes nothing.
struct SealerWatch<'a>(&'a Catalog);

impl Drop for SealerWatch<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.inner.lock().thread = false;
            self.0.poison();
        }
    }
}

pub(super) fn gone_name(entry: &SegmentEntry) -> String {
    let last_frame = FrameNo(entry.last_frame);
    SegmentId::of(entry).file_name(SegmentState::Gone { last_frame })
}

/// Lists an incarnation, once.
pub(super) fn add_incarnation(manifest: &mut Manifest, entry: &IncarnationEntry) {
    if manifest
        .incarnations
        .iter()
        .all(|known| known.ordinal != entry.ordinal)
    {
        manifest.incarnations.push(entry.clone());
    }
}
