//! The writer. One `pwrite` a call, no sync, no allocation unless frames bring events.

use std::fmt::Debug;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use super::admit::{Admitted, Chain, Recent, admit};
use super::catalog::{Catalog, Sealing, SegmentFile};
use super::names::{self, SegmentId, SegmentState};
use super::recovery::{incarnation_entry, recover};
use super::sync::SyncHandle;
use super::synced::SyncedFile;
use super::{
    Home, LogEnd, LogError, LogOptions, LogPosition, RecoveryReport, digest_hex, digest_of, events,
};
use crate::constants::SEGMENT_EVENTS_MAX;
use crate::format::frame::{Digest, FrameHeader};
use crate::format::manifest::{EventEntry, Manifest, SegmentEntry};
use crate::format::segment::{SEGMENT_HEADER_LEN, SegmentHeader};
use crate::storage::{Directory, is_full};
use crate::types::{FrameNo, Generation, GroupId, Seq, TimeUs};

/// The segment that grows. Its entry is complete but for the digest.
#[derive(Debug)]
pub(super) struct OpenSegment {
    pub file: Arc<SegmentFile>,
    pub entry: SegmentEntry,
    last_digest: Digest,
    events: Vec<EventEntry>,
    since: Instant,
}

/// The one writer of a log. Dropped without `seal`, it leaves what a killed process leaves.
#[derive(Debug)]
pub struct LogWriter {
    pub(super) catalog: Arc<Catalog>,
    options: LogOptions,
    promised: Generation,
    pub(super) chain: Option<Chain>,
    recent: Recent,
    pub(super) open: Option<OpenSegment>,
    pub(super) end: LogEnd,
    sealer: Option<JoinHandle<()>>,
    _lock: Box<dyn Send + Sync + Debug>,
}

fn end_of(manifest: &Manifest) -> LogEnd {
    let total_bytes = manifest.segments.iter().map(|entry| entry.bytes).sum();
    let Some(last) = manifest.segments.last() else {
        return LogEnd::default();
    };
    let incarnation = manifest
        .incarnations
        .iter()
        .find(|known| known.ordinal == last.ordinal);
    LogEnd {
        incarnation: incarnation.and_then(|known| known.id.parse().ok()),
        ordinal: last.ordinal,
        last_frame: Some(FrameNo(last.last_frame)),
        last_digest: digest_of(&last.last_digest),
        last_seq: Seq(last.end_seq - 1),
        last_time: TimeUs(last.last_time_us),
        open_first_frame: None,
        committed_len: 0,
        total_bytes,
    }
}

impl LogWriter {
    /// Opens or creates the log of `group` and recovers it.
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
        let (mut writer, report) = Self::recovered(directory, group, options)?;
        if options.background {
            writer.sealer = Some(Catalog::spawn(&writer.catalog)?);
        }
        Ok((writer, report))
    }

    /// As `open_with`, but with `background` nothing is sealed until `seal` is called: the state
    /// that a sealing thread passes through, held still for tests.
    #[cfg(test)]
    pub(super) fn open_deferred(
        directory: Arc<dyn Directory>,
        group: GroupId,
        options: LogOptions,
    ) -> Result<(Self, RecoveryReport), LogError> {
        Self::recovered(directory, group, options)
    }

    fn recovered(
        directory: Arc<dyn Directory>,
        group: GroupId,
        options: LogOptions,
    ) -> Result<(Self, RecoveryReport), LogError> {
        let lock = directory
            .lock(names::LOCK, true)
            .map_err(|source| match source.kind() {
                ErrorKind::WouldBlock => LogError::Locked,
                _ => LogError::io("locking the log")(source),
            })?;
        let home = Home { directory, group };
        let recovered = recover(&home)?;
        let synced = SyncedFile::open(&*home.directory)
            .map_err(LogError::io("opening the note of what is durable"))?;
        let end = end_of(&recovered.manifest);
        let catalog = Arc::new(Catalog::new(
            home,
            recovered.manifest,
            recovered.dirty,
            synced,
        ));
        let mut writer = Self {
            catalog,
            options,
            promised: Generation::default(),
            chain: None,
            recent: Recent::starting_at(FrameNo(0)),
            open: None,
            end,
            sealer: None,
            _lock: lock,
        };
        if let Some(header) = recovered.newest {
            writer.chain = writer.held_chain(&header);
            writer.recent = Recent::starting_at(writer.next_frame());
        }
        Ok((writer, recovered.report))
    }

    pub fn end(&self) -> LogEnd {
        self.end.clone()
    }

    /// Segments, as they are sealed from now on, each after the manifest that names it is durable.
    pub fn sealed(&self) -> Receiver<SegmentEntry> {
        let (sender, receiver) = channel();
        self.catalog.listen(sender);
        receiver
    }

    /// Frames older than this generation are refused from now on. The caller has stored it durably.
    pub fn promise(&mut self, generation: Generation) {
        self.promised = self.promised.max(generation);
    }

    fn next_frame(&self) -> FrameNo {
        self.chain
            .as_ref()
            .map_or(FrameNo(0), |chain| chain.next_frame)
    }

    /// Announces an incarnation (idempotent); frames of it may follow. Seals the open segment of
    /// another one. `header.first_frame` is the frame that will come first.
    ///
    /// A hole is refused (`OutOfOrder`): frames missing between what is held of this incarnation
    /// and `first_frame`, or between what is held and the `parent` that the header names. Without
    /// them no later point could be trusted; the source begins a new incarnation and copies.
    pub fn begin(&mut self, header: &SegmentHeader) -> Result<(), LogError> {
        self.catalog.check()?;
        header.check()?;
        let group = self.catalog.home.group;
        if header.group != group {
            return Err(LogError::ForeignGroup {
                expected: group,
                found: header.group,
            });
        }
        if header.generation < self.promised {
            let (promised, found) = (self.promised, header.generation);
            return Err(LogError::Fenced { promised, found });
        }
        let current = self
            .chain
            .as_ref()
            .filter(|chain| chain.is(header.incarnation));
        // Without a frame nothing binds the announcement.
        let current = current.filter(|chain| chain.last_digest.is_some());
        let held = current.cloned().or_else(|| self.held_chain(header));
        if let Some(mut chain) = held {
            let first_frame = chain.header.first_frame;
            let same = SegmentHeader {
                first_frame,
                ..header.clone()
            };
            let known = self.known_header(&chain)?;
            if known.is_some_and(|known| {
                SegmentHeader {
                    first_frame,
                    ..known
                } != same
            }) {
                return Err(LogError::IncarnationConflict(header.incarnation));
            }
            if header.first_frame > chain.next_frame {
                let (expected, found) = (chain.next_frame, header.first_frame);
                return Err(LogError::OutOfOrder { expected, found });
            }
            if !self
                .chain
                .as_ref()
                .is_some_and(|current| current.is(header.incarnation))
            {
                chain.header = header.clone();
                self.recent = Recent::starting_at(chain.next_frame);
                self.chain = Some(chain);
            }
            return Ok(());
        }
        self.check_parent(header)?;
        self.seal_before(header)?;
        self.recent = Recent::starting_at(header.first_frame);
        self.chain = Some(Chain {
            header: header.clone(),
            ordinal: self.end.ordinal + 1,
            base: header.first_frame,
            next_frame: header.first_frame,
            last_digest: None,
            closed: false,
        });
        Ok(())
    }

    /// Hands over the open segment when another incarnation begins. If the new one's header does
    /// not name the last frame held, recovery could not see that this frame is missing: then it is
    /// made durable first.
    fn seal_before(&mut self, header: &SegmentHeader) -> Result<(), LogError> {
        let provable = header.parent.is_some_and(|parent| {
            Some(parent.incarnation) == self.end.incarnation
                && Some(parent.frame_no) == self.end.last_frame
                && parent.digest == self.end.last_digest
        });
        if !provable {
            self.sync_handle()?.sync()?;
        }
        self.hand_over()
    }

    /// Appends whole frames, back to back, of the current incarnation, after the checks of design
    /// section 6 (generation, incarnation, number, floor, `prev`, checksum, digests, seq, time).
    /// Frames already held are skipped if their digest agrees. Written, not synced. `trusted` skips
    /// the body digests: only for frames that this process has just sealed. Takes all or nothing.
    ///
    /// After `NoSpace` the log is as it was before the call and can be used again: the partial
    /// write has been cut off. That is sound, unlike going on after a failed fsync, because the
    /// write itself reported that its bytes found no place; bytes written before are not touched.
    pub fn append(&mut self, frames: &[u8], trusted: bool) -> Result<LogEnd, LogError> {
        self.catalog.check()?;
        let Some(chain) = &self.chain else {
            let header = FrameHeader::parse(frames)?;
            return Err(LogError::UnknownIncarnation(header.incarnation));
        };
        let before = chain.next_frame;
        let mut recent = std::mem::replace(&mut self.recent, Recent::empty());
        let mut cursor = None;
        let admitted = admit(
            chain,
            &self.end,
            self.promised,
            &mut recent,
            frames,
            trusted,
            |frame| self.held_digest(chain, frame, &mut cursor),
        );
        self.recent = recent;
        let written = match admitted {
            Ok(None) => return Ok(self.end()),
            Ok(Some(batch)) => self.write(batch, frames),
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            self.recent.rewind(before);
            return Err(error);
        }
        Ok(self.end())
    }

    fn write(&mut self, mut batch: Admitted, frames: &[u8]) -> Result<(), LogError> {
        if !batch.events.is_empty() {
            events::check(&self.catalog.inner.lock().manifest, &batch.events)?;
        }
        let fresh = &frames[batch.skip..];
        let due = self.open.as_ref().is_some_and(|open| {
            open.entry.bytes + fresh.len() as u64 > self.options.segment_bytes_max
                || open.entry.records + batch.records > self.options.segment_records_max
                || open.events.len() + batch.events.len() > SEGMENT_EVENTS_MAX
                || open.since.elapsed() >= self.options.segment_age
        });
        if due || self.open.is_none() {
            // The next one first: if there is no room for it, the full one stays open.
            let next = self.create(&batch)?;
            self.hand_over()?;
            self.open = Some(next);
        }
        let catalog = Arc::clone(&self.catalog);
        let open = self
            .open
            .as_mut()
            .expect("invariant: made above if there was none");
        let offset = open.entry.bytes;
        if let Err(source) = open.file.file.write_at(fresh, offset) {
            if !is_full(&source) {
                return Err(catalog.fail("appending to a segment")(source));
            }
            open.file
                .file
                .set_len(offset)
                .map_err(catalog.fail("cutting a partial append"))?;
            self.drop_empty();
            return Err(LogError::NoSpace);
        }
        if open.entry.records == 0 {
            self.end.total_bytes += offset;
        }
        let entry = &mut open.entry;
        entry.bytes += fresh.len() as u64;
        entry.records += batch.records;
        entry.last_frame = batch.next_frame.0 - 1;
        entry.end_seq = batch.last_seq.0 + 1;
        entry.last_time_us = batch.last_time.0;
        open.last_digest = batch.last_digest;
        open.events.append(&mut batch.events);
        let chain = self
            .chain
            .as_mut()
            .expect("invariant: frames were admitted to it");
        chain.next_frame = batch.next_frame;
        chain.last_digest = Some(batch.last_digest);
        self.end.incarnation = Some(chain.header.incarnation);
        self.end.ordinal = chain.ordinal;
        self.end.last_frame = Some(FrameNo(entry.last_frame));
        self.end.last_digest = batch.last_digest;
        self.end.last_seq = batch.last_seq;
        self.end.last_time = batch.last_time;
        self.end.open_first_frame = Some(open.file.id.first_frame);
        self.end.committed_len = entry.bytes;
        self.end.total_bytes += fresh.len() as u64;
        Ok(())
    }

    /// A segment that never got a frame leaves no trace: its name may be needed again.
    fn drop_empty(&mut self) {
        if let Some(open) = self.open.take_if(|open| open.entry.records == 0) {
            let name = open.file.id.file_name(SegmentState::Open);
            if self.catalog.home.directory.remove(&name).is_err() {
                self.catalog.poison();
            }
        }
    }

    /// Makes the file of the next segment and writes its header.
    fn create(&self, batch: &Admitted) -> Result<OpenSegment, LogError> {
        let chain = self
            .chain
            .as_ref()
            .expect("invariant: frames were admitted to it");
        let directory = &self.catalog.home.directory;
        let id = SegmentId {
            ordinal: chain.ordinal,
            first_frame: batch.first_frame,
        };
        let name = id.file_name(SegmentState::Open);
        let header = SegmentHeader {
            first_frame: id.first_frame,
            ..chain.header.clone()
        };
        let unless_full = |action| {
            move |source: std::io::Error| {
                if is_full(&source) {
                    LogError::NoSpace
                } else {
                    self.catalog.fail(action)(source)
                }
            }
        };
        let file = directory
            .create(&name)
            .map_err(unless_full("creating a segment"))?;
        if let Err(source) = file.write_at(&header.encode(), 0) {
            directory
                .remove(&name)
                .map_err(self.catalog.fail("removing a partial segment"))?;
            return Err(unless_full("writing a segment header")(source));
        }
        let incarnation = incarnation_entry(id.ordinal, &header);
        let file = Arc::new(SegmentFile::new(id, incarnation, header.incarnation, file));
        if self.end.last_frame.is_none() {
            // The first of the log: recovery could not tell that it is missing.
            self.catalog.sync_segment(&file, 0)?;
        }
        let entry = SegmentEntry {
            ordinal: id.ordinal,
            first_frame: id.first_frame.0,
            last_frame: id.first_frame.0,
            first_seq: batch.first_seq.0,
            end_seq: batch.first_seq.0,
            first_time_us: batch.first_time.0,
            last_time_us: batch.first_time.0,
            bytes: SEGMENT_HEADER_LEN as u64,
            records: 0,
            last_digest: String::new(),
            indexed: false,
        };
        let last_digest = Digest::default();
        Ok(OpenSegment {
            file,
            entry,
            last_digest,
            events: Vec::new(),
            since: Instant::now(),
        })
    }

    /// Queues the open segment to be sealed, and seals it here if no thread does.
    fn hand_over(&mut self) -> Result<(), LogError> {
        self.drop_empty();
        let Some(open) = self.open.take() else {
            return Ok(());
        };
        self.end.open_first_frame = None;
        self.end.committed_len = 0;
        let last_digest = digest_hex(&open.last_digest);
        let entry = SegmentEntry {
            last_digest,
            ..open.entry
        };
        let sealing = Sealing::new(open.file, entry, open.events);
        self.catalog.queue(sealing)?;
        if self.options.background {
            return Ok(());
        }
        match self.catalog.work() {
            // It waits in the queue; the frames are where they were.
            Err(LogError::NoSpace) => Ok(()),
            other => other,
        }
    }

    /// The data of everything appended before the call becomes durable when the returned handle's
    /// `sync` returns; the handle can be used without the writer's lock (group commit).
    pub fn sync_handle(&self) -> Result<SyncHandle, LogError> {
        self.catalog.check()?;
        let mut files: Vec<_> = {
            let inner = self.catalog.inner.lock();
            let waiting = inner.sealing.iter();
            waiting
                .map(|next| (Arc::clone(&next.file), next.entry.bytes))
                .collect()
        };
        if let Some(open) = self.open.as_ref().filter(|open| open.entry.records > 0) {
            files.push((Arc::clone(&open.file), open.entry.bytes));
        }
        Ok(SyncHandle {
            catalog: Arc::clone(&self.catalog),
            files,
            end: self.end(),
        })
    }

    /// Seals the open segment, if any: sync, rename, directory sync, manifest. Waits until that and
    /// everything queued before is done.
    pub fn seal(&mut self) -> Result<(), LogError> {
        self.catalog.check()?;
        self.hand_over()?;
        self.catalog.work()
    }

    /// Hands over an open segment that has reached its age, for logs that are seldom written to.
    pub fn seal_if_due(&mut self) -> Result<(), LogError> {
        self.catalog.check()?;
        let age = self.options.segment_age;
        if self
            .open
            .as_ref()
            .is_some_and(|open| open.since.elapsed() >= age)
        {
            self.hand_over()?;
        }
        Ok(())
    }

    /// Notes that the index run of a sealed segment is complete. Goes into the manifest soon: with
    /// the next one that the sealing thread writes. If that is lost the run is built again.
    /// A segment that has been trimmed meanwhile is no error; one not sealed yet is not noted.
    pub fn publish_run(&mut self, ordinal: u32, first_frame: FrameNo) -> Result<(), LogError> {
        self.catalog.check()?;
        let id = SegmentId {
            ordinal,
            first_frame,
        };
        {
            let mut inner = self.catalog.inner.lock();
            let found = inner
                .manifest
                .segments
                .iter_mut()
                .find(|e| SegmentId::of(e) == id);
            let Some(entry) = found.filter(|entry| !entry.indexed) else {
                return Ok(());
            };
            entry.indexed = true;
            inner.dirty = true;
        }
        match self.do_work() {
            Err(LogError::NoSpace) => Ok(()),
            other => other,
        }
    }

    /// Removes sealed segments whose every frame lies before `position` (spool retention), but the
    /// newest. Returns the bytes given back; with a sealing thread they are free soon after.
    pub fn trim(&mut self, position: &LogPosition) -> Result<u64, LogError> {
        self.catalog.check()?;
        let id = position.incarnation.to_string();
        let freed = {
            let mut inner = self.catalog.inner.lock();
            let waiting = inner
                .sealing
                .iter()
                .map(|sealing| &sealing.file.incarnation);
            let open = self.open.as_ref().map(|open| &open.file.incarnation);
            let mut known = inner
                .manifest
                .incarnations
                .iter()
                .chain(waiting)
                .chain(open);
            let Some(ordinal) = known
                .find(|known| known.id == id)
                .map(|known| known.ordinal)
            else {
                return Ok(0);
            };
            let next = (ordinal, position.next_frame.0);
            let segments = &mut inner.manifest.segments;
            let before = segments.partition_point(|e| (e.ordinal, e.last_frame) < next);
            let count = before.min(segments.len().saturating_sub(1));
            let removed: Vec<SegmentEntry> = segments.drain(..count).collect();
            let Some(last) = removed.last() else {
                return Ok(0);
            };
            let horizon = last.end_seq;
            let oldest = segments.first().map_or(ordinal, |entry| entry.ordinal);
            let manifest = &mut inner.manifest;
            manifest.horizon_seq = manifest.horizon_seq.max(horizon);
            manifest.events.retain(|event| event.seq >= horizon);
            manifest
                .incarnations
                .retain(|known| known.ordinal >= oldest);
            let freed = removed.iter().map(|entry| entry.bytes).sum();
            inner
                .gone
                .extend(removed.into_iter().map(|entry| (entry, false)));
            inner.dirty = true;
            freed
        };
        self.end.total_bytes -= freed;
        match self.do_work() {
            Err(LogError::NoSpace) => Ok(freed),
            other => other.map(|()| freed),
        }
    }

    /// Does queued work here, or wakes the thread that does.
    fn do_work(&self) -> Result<(), LogError> {
        if self.options.background {
            self.catalog.wake();
            return Ok(());
        }
        self.catalog.work()
    }

    /// The manifest as it is now, with the events of the segments that are not sealed yet added.
    pub fn manifest(&self) -> Manifest {
        let mut manifest = {
            let inner = self.catalog.inner.lock();
            let mut manifest = inner.manifest.clone();
            for sealing in &inner.sealing {
                super::catalog::add_incarnation(&mut manifest, &sealing.file.incarnation);
                events::publish(&mut manifest, sealing.events.clone());
            }
            manifest
        };
        if let Some(open) = &self.open {
            super::catalog::add_incarnation(&mut manifest, &open.file.incarnation);
            events::publish(&mut manifest, open.events.clone());
        }
        manifest
    }
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        self.catalog.stop();
        if let Some(sealer) = self.sealer.take() {
            // Its panic would have poisoned nothing; there is nobody left to tell.
            let _ = sealer.join();
        }
        self.catalog.unlisten();
    }
}
