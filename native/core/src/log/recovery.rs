//! Recovery: brings the directory back to a manifest that names everything that is held.
//!
//! Every step can be cut by another crash and repeated: a tail is cut and synced before the segment
//! is renamed, renamed before the manifest names it, and nothing is removed that was ever durable.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::Arc;

use super::catalog::add_incarnation;
use super::names::{self, SegmentId, SegmentState};
use super::synced::{self, Synced};
use super::walk::{self, Walk};
use super::{Home, LogError, RecoveryReport, digest_of, events};
use crate::format::FormatError;
use crate::format::frame::{FRAME_HEADER_LEN, FrameHeader};
use crate::format::manifest::{
    IncarnationEntry, MANIFEST_BODY_MAX, MANIFEST_HEADER_LEN, Manifest, SegmentEntry,
};
use crate::format::segment::{SEGMENT_HEADER_LEN, SegmentHeader};
use crate::storage::{File, is_full, read_file, replace_file};

/// Ending of segment files that were put aside.
const ASIDE: &str = ".aside";

const NOT_NEXT: FormatError = FormatError::Field {
    what: "segment",
    field: "first_frame",
    reason: "does not follow the segments before it",
};

/// What recovery hands to the writer.
#[derive(Debug)]
pub(super) struct Recovered {
    pub manifest: Manifest,
    /// The manifest could not be written for want of space.
    pub dirty: bool,
    pub report: RecoveryReport,
    /// Header of the newest segment, if it can be read.
    pub newest: Option<SegmentHeader>,
}

struct Recovery<'a> {
    home: &'a Home,
    manifest: Manifest,
    changed: bool,
    report: RecoveryReport,
    synced: Option<Synced>,
    /// A tail was cut: what comes later was never durable.
    cut: bool,
}

/// Whether another program wrote this manifest: a newer version, or a body that is whole but not
/// of this version's shape.
fn is_refused(bytes: &[u8], error: &FormatError) -> bool {
    let of_body = matches!(
        error,
        FormatError::Field {
            what: "manifest body",
            ..
        }
    );
    of_body || walk::is_other_version(bytes, error)
}

/// Reads the manifest; `None` if there is none yet. The inner error is damage.
pub(super) fn read_manifest(
    home: &Home,
) -> Result<Result<Option<Manifest>, FormatError>, LogError> {
    let limit = (MANIFEST_BODY_MAX + MANIFEST_HEADER_LEN) as u64;
    let bytes = match read_file(&*home.directory, names::MANIFEST, limit) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Ok(None)),
        Err(error) => return Err(LogError::io("reading the manifest")(error)),
    };
    let manifest = match Manifest::parse(&bytes) {
        Ok(manifest) => manifest,
        // Its checksums are right, so it is whole, and what it says must not be thrown away.
        Err(error) if is_refused(&bytes, &error) => {
            return Err(damaged(names::MANIFEST, 0, error));
        }
        Err(error) => return Ok(Err(error)),
    };
    let found = manifest.group.parse().unwrap_or_default();
    if found != home.group {
        return Err(LogError::ForeignGroup {
            expected: home.group,
            found,
        });
    }
    Ok(Ok(Some(manifest)))
}

/// All segment files, in the order of history.
pub(super) fn list_segments(home: &Home) -> Result<Vec<(SegmentId, SegmentState)>, LogError> {
    let listed = home
        .directory
        .list()
        .map_err(LogError::io("listing the log"))?;
    let mut segments: Vec<_> = listed
        .iter()
        .filter_map(|name| names::parse(name))
        .collect();
    segments.sort_by_key(|(id, _)| *id);
    Ok(segments)
}

pub(super) fn damaged(segment: &str, offset: u64, source: FormatError) -> LogError {
    LogError::Damaged {
        segment: segment.to_owned(),
        offset,
        source,
    }
}

impl Recovery<'_> {
    fn report_damage(&mut self, segment: &str, offset: u64, source: FormatError) {
        self.report
            .damage
            .push(damaged(segment, offset, source).to_string());
    }

    fn open(&self, name: &str, writable: bool) -> Result<Arc<dyn File>, LogError> {
        self.home
            .directory
            .open(name, writable)
            .map_err(LogError::io("opening a segment"))
    }

    fn remove(&self, name: &str) -> Result<(), LogError> {
        self.home
            .directory
            .remove(name)
            .map_err(LogError::io("removing a file"))
    }

    /// Keeps a file that cannot take its place in history, under a name that no segment has.
    fn put_aside(&mut self, name: &str, offset: u64, error: FormatError) -> Result<(), LogError> {
        self.report_damage(name, offset, error);
        self.home
            .directory
            .rename(name, &format!("{name}{ASIDE}"))
            .map_err(LogError::io("putting a damaged segment aside"))
    }

    /// A manifest that does not parse is kept aside and rebuilt from the segments.
    fn load_manifest(&mut self) -> Result<(), LogError> {
        match read_manifest(self.home)? {
            Ok(Some(manifest)) => self.manifest = manifest,
            Ok(None) => self.changed = true,
            Err(error) => {
                self.report_damage(names::MANIFEST, 0, error);
                let directory = &self.home.directory;
                directory
                    .rename(names::MANIFEST, names::MANIFEST_DAMAGED)
                    .map_err(LogError::io("keeping the damaged manifest"))?;
                self.changed = true;
            }
        }
        Ok(())
    }

    /// Drops from the manifest what was trimmed, and checks that the rest is there in full length.
    fn check_listed(&mut self, files: &BTreeMap<SegmentId, SegmentState>) -> Result<(), LogError> {
        let mut kept = Vec::new();
        for entry in std::mem::take(&mut self.manifest.segments) {
            let name = names::sealed_name(&entry);
            if let Some(SegmentState::Gone { .. }) = files.get(&SegmentId::of(&entry)) {
                self.manifest.horizon_seq = self.manifest.horizon_seq.max(entry.end_seq);
                self.changed = true;
                continue;
            }
            match self.home.directory.open(&name, false) {
                Ok(file) => self.check_sealed(&name, &*file, &entry)?,
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    let (what, have) = ("sealed segment", 0);
                    let need = usize::try_from(entry.bytes).unwrap_or(usize::MAX);
                    self.report_damage(&name, 0, FormatError::Truncated { what, need, have });
                }
                Err(error) => return Err(LogError::io("opening a segment")(error)),
            }
            kept.push(entry);
        }
        self.manifest.segments = kept;
        Ok(())
    }

    fn check_sealed(
        &mut self,
        name: &str,
        file: &dyn File,
        entry: &SegmentEntry,
    ) -> Result<(), LogError> {
        let have = file.len().map_err(LogError::io("reading a segment"))?;
        if have < entry.bytes {
            let what = "sealed segment";
            let need = usize::try_from(entry.bytes).unwrap_or(usize::MAX);
            let short = FormatError::Truncated {
                what,
                need,
                have: usize::try_from(have).unwrap_or(usize::MAX),
            };
            self.report_damage(name, have, short);
        }
        if let Err(error) = walk::read_header(file, SegmentId::of(entry), self.home.group)? {
            self.report_damage(name, 0, error);
        }
        Ok(())
    }

    /// Whether a sealed file that the manifest does not name is left from an interrupted trim.
    fn is_trimmed(&self, file: &dyn File) -> Result<bool, LogError> {
        let mut bytes = [0; FRAME_HEADER_LEN];
        let read = file
            .read_at(&mut bytes, SEGMENT_HEADER_LEN as u64)
            .map_err(LogError::io("reading a segment"))?;
        let horizon = self.manifest.horizon_seq;
        Ok(FrameHeader::parse(&bytes[..read]).is_ok_and(|frame| frame.first_seq.0 < horizon))
    }

    /// Whether a walked segment follows what is held: nothing is missing between.
    ///
    /// Nothing before: the name of a log's first segment is made durable before a second is made,
    /// and trimming keeps the newest sealed one, so nothing was lost. Another incarnation: ordinals
    /// have no holes, a log that holds something takes it from frame 0 on, and `parent` names the
    /// last frame before it, or `begin` has synced that.
    fn follows(&self, id: SegmentId, walk: &Walk, entry: &SegmentEntry) -> bool {
        let Some(last) = self.manifest.segments.last() else {
            return true;
        };
        if SegmentId::of(last) >= id || entry.first_seq < last.end_seq {
            return false;
        }
        if last.ordinal == id.ordinal {
            return last.last_frame.checked_add(1) == Some(id.first_frame.0)
                && (walk.first_prev == digest_of(&last.last_digest) || !walk.damage.is_empty());
        }
        let known = &self.manifest.incarnations;
        let parent_held = walk.header.parent.is_none_or(|parent| {
            let parent_id = parent.incarnation.to_string();
            let is_last = known
                .iter()
                .any(|known| known.ordinal == last.ordinal && known.id == parent_id);
            !is_last || last.last_frame >= parent.frame_no.0
        });
        last.ordinal.checked_add(1) == Some(id.ordinal) && id.first_frame.0 == 0 && parent_held
    }

    /// Whether the ordinal is free or that incarnation's.
    fn owns_ordinal(&self, id: SegmentId, header: &SegmentHeader) -> bool {
        let text = header.incarnation.to_string();
        let known = &self.manifest.incarnations;
        known
            .iter()
            .all(|entry| (entry.ordinal == id.ordinal) == (entry.id == text))
    }

    fn take(&mut self, id: SegmentId, walk: Walk, entry: SegmentEntry) {
        add_incarnation(
            &mut self.manifest,
            &incarnation_entry(id.ordinal, &walk.header),
        );
        events::publish(&mut self.manifest, walk.events);
        self.manifest.segments.push(entry);
        self.changed = true;
    }

    /// A sealed segment that the manifest does not name: all of it was durable.
    fn adopt(&mut self, id: SegmentId, name: &str) -> Result<(), LogError> {
        let file = self.open(name, false)?;
        if self.is_trimmed(&*file)? {
            return self.remove(name);
        }
        let walk = match walk::walk(&*file, id, self.home.group, |_| u64::MAX)? {
            Ok(walk) => walk,
            Err(error) => return self.put_aside(name, 0, error),
        };
        for damage in &walk.damage {
            self.report_damage(name, damage.offset, damage.source.clone());
        }
        let entry = walk
            .entry
            .clone()
            .filter(|entry| self.owns_ordinal(id, &walk.header) && self.follows(id, &walk, entry));
        let Some(entry) = entry else {
            return self.put_aside(name, 0, NOT_NEXT);
        };
        if names::sealed_name(&entry) != name {
            // Frames at its end are damaged beyond recognition.
            self.home
                .directory
                .rename(name, &names::sealed_name(&entry))
                .map_err(LogError::io("renaming a segment"))?;
        }
        self.report.adopted_segments += 1;
        self.take(id, walk, entry);
        Ok(())
    }

    /// An open segment: what was not known durable and is not whole goes, the rest is sealed.
    /// `later_sealed`: a sealed segment follows, so all of this one was durable.
    fn close(&mut self, id: SegmentId, name: &str, later_sealed: bool) -> Result<(), LogError> {
        let file = self.open(name, true)?;
        let file_len = file.len().map_err(LogError::io("reading a segment"))?;
        if self.cut {
            // Behind a cut nothing was durable, and nothing may be kept: it would be a hole.
            self.report.torn_bytes += file_len;
            return self.remove(name);
        }
        let synced = self.synced;
        let mut known = 0;
        let walked = walk::walk(&*file, id, self.home.group, |header| {
            let noted = synced.map_or(0, |note| note.known_len(id, header.incarnation));
            known = if later_sealed { u64::MAX } else { noted };
            known
        })?;
        let walk = match walked {
            Ok(walk) => walk,
            Err(error) => {
                let noted = synced.is_some_and(|note| id <= note.segment);
                if later_sealed || noted {
                    return self.put_aside(name, 0, error);
                }
                // The crash came before the header was durable, so before every frame.
                self.report.torn_bytes += file_len;
                self.cut = true;
                return self.remove(name);
            }
        };
        for damage in &walk.damage {
            self.report_damage(name, damage.offset, damage.source.clone());
        }
        let torn = file_len - walk.valid_len;
        // With damage at the end of what is durable the tail stays: it may be all there is of it.
        let keep_tail = walk.valid_len < known && !walk.damage.is_empty();
        if torn > 0 && !keep_tail {
            self.report.torn_bytes += torn;
            self.cut = true;
        }
        let follows = walk
            .entry
            .as_ref()
            .is_some_and(|entry| self.follows(id, &walk, entry));
        if !follows || !self.owns_ordinal(id, &walk.header) {
            if known > SEGMENT_HEADER_LEN as u64 {
                return self.put_aside(name, 0, NOT_NEXT);
            }
            // No frame, or frames that never were durable behind others that were lost.
            self.report.torn_bytes += walk.valid_len - SEGMENT_HEADER_LEN as u64;
            self.cut |= walk.entry.is_some();
            return self.remove(name);
        }
        let Some(entry) = walk.entry.clone() else {
            return Ok(());
        };
        if torn > 0 && !keep_tail {
            file.set_len(walk.valid_len)
                .map_err(LogError::io("cutting a torn tail"))?;
        }
        file.sync_data()
            .map_err(LogError::io("syncing a segment"))?;
        self.home
            .directory
            .rename(name, &names::sealed_name(&entry))
            .map_err(LogError::io("renaming a segment"))?;
        self.take(id, walk, entry);
        Ok(())
    }

    fn run(&mut self) -> Result<(), LogError> {
        self.load_manifest()?;
        self.synced =
            synced::read(&*self.home.directory).map_err(LogError::io("reading what is durable"))?;
        let files = list_segments(self.home)?;
        let by_id: BTreeMap<_, _> = files.iter().copied().collect();
        self.check_listed(&by_id)?;
        let all = self
            .home
            .directory
            .list()
            .map_err(LogError::io("listing the log"))?;
        let aside = all.iter().filter(|name| name.ends_with(ASIDE));
        self.report
            .damage
            .extend(aside.map(|name| format!("{name}: put aside earlier")));
        let listed: Vec<SegmentId> = self.manifest.segments.iter().map(SegmentId::of).collect();
        let newest_sealed = files
            .iter()
            .filter(|(_, state)| matches!(state, SegmentState::Sealed { .. }))
            .map(|(id, _)| *id)
            .max();
        for (id, state) in files {
            let name = id.file_name(state);
            match state {
                SegmentState::Sealed { .. } if listed.contains(&id) => {}
                SegmentState::Sealed { .. } => self.adopt(id, &name)?,
                SegmentState::Open => {
                    let later_sealed = newest_sealed.is_some_and(|sealed| id < sealed);
                    self.close(id, &name, later_sealed)?;
                }
                SegmentState::Gone { .. } => {}
            }
        }
        Ok(())
    }

    /// Makes the outcome durable, then removes the remains of an interrupted trim.
    fn finish(mut self) -> Result<Recovered, LogError> {
        let mut dirty = false;
        if self.changed {
            self.manifest.group = self.home.group.to_string();
            self.manifest.version += 1;
            self.home
                .directory
                .sync()
                .map_err(LogError::io("syncing the directory"))?;
            let bytes = self.manifest.encode();
            match replace_file(&*self.home.directory, names::MANIFEST, &bytes) {
                // A full disk must not keep the log from being opened: it could never be trimmed.
                Err(error) if is_full(&error) => dirty = true,
                other => other.map_err(LogError::io("replacing the manifest"))?,
            }
        }
        if !dirty {
            for (id, state) in list_segments(self.home)? {
                if matches!(state, SegmentState::Gone { .. }) {
                    self.remove(&id.file_name(state))?;
                }
            }
        }
        let newest = self.newest_header()?;
        Ok(Recovered {
            manifest: self.manifest,
            dirty,
            report: self.report,
            newest,
        })
    }

    fn newest_header(&self) -> Result<Option<SegmentHeader>, LogError> {
        let Some(entry) = self.manifest.segments.last() else {
            return Ok(None);
        };
        match self.home.directory.open(&names::sealed_name(entry), false) {
            Ok(file) => Ok(walk::read_header(&*file, SegmentId::of(entry), self.home.group)?.ok()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(LogError::io("opening a segment")(error)),
        }
    }
}

pub(super) fn incarnation_entry(ordinal: u32, header: &SegmentHeader) -> IncarnationEntry {
    IncarnationEntry {
        ordinal,
        id: header.incarnation.to_string(),
        generation_counter: header.generation.counter,
        generation_site: header.generation.site,
    }
}

/// Recovers the log in `home`. The caller holds its lock.
pub(super) fn recover(home: &Home) -> Result<Recovered, LogError> {
    let mut recovery = Recovery {
        home,
        manifest: Manifest {
            group: home.group.to_string(),
            ..Manifest::default()
        },
        changed: false,
        report: RecoveryReport::default(),
        synced: None,
        cut: false,
    };
    recovery.run()?;
    recovery.finish()
}
