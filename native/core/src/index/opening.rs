//! How a history is opened: manifest, runs, and an index in memory for what has no run.

use std::io;
use std::sync::Arc;

use super::HistoryError;
use super::build::{Indexed, index_segment};
use super::cache::Cache;
use super::event::{Event, EventKind};
use super::history::{Cut, History, Incarnation, READERS_LOCK, Segment};
use super::layout::PAGE_LEN;
use super::names::{self, SegmentKey};
use super::run::{PageCache, Run};
use super::walk::SegmentFile;
use crate::format::FormatError;
use crate::format::frame::Digest;
use crate::format::manifest::{MANIFEST_BODY_MAX, MANIFEST_HEADER_LEN, Manifest, SegmentEntry};
use crate::log::names::{self as log_names, MANIFEST, SegmentState};
use crate::log::{LogEnd, LogError};
use crate::storage::{Directory, read_file};
use crate::types::{FrameNo, Generation, GroupId, Seq, TimeUs, VolumeIndex};

/// Bytes of index pages kept.
const PAGE_CACHE_BYTES: usize = 64 << 20;
/// Open segment files kept.
const OPEN_FILES_MAX: usize = 256;
/// A listing is repeated this often when the writer moved files meanwhile.
const OPEN_ATTEMPTS: u32 = 10;
const _: () = assert!(PAGE_CACHE_BYTES > 64 * PAGE_LEN);

impl History {
    /// Opens runs and indexes the open segment up to `end` (or as far as frames verify).
    #[allow(clippy::needless_pass_by_value)] // a history keeps its directory
    pub fn open(
        directory: Arc<dyn Directory>,
        group: GroupId,
        end: Option<&LogEnd>,
    ) -> Result<Self, HistoryError> {
        let mut attempt = 1;
        loop {
            match Opening::new(Arc::clone(&directory), group, end).and_then(Opening::finish) {
                // A segment was sealed or runs were merged between listing and opening.
                Err(error) if vanished(&error) && attempt < OPEN_ATTEMPTS => attempt += 1,
                outcome => return outcome,
            }
        }
    }
}

fn read_failed(source: io::Error) -> LogError {
    LogError::Io {
        action: "reading a log directory",
        source,
    }
}

fn vanished(error: &HistoryError) -> bool {
    match error {
        HistoryError::Log(LogError::Io { source, .. }) => source.kind() == io::ErrorKind::NotFound,
        _ => false,
    }
}

pub(super) fn open_file(directory: &dyn Directory, name: &str) -> Result<SegmentFile, LogError> {
    let file = directory.open(name, false).map_err(read_failed)?;
    Ok(SegmentFile {
        name: name.to_owned(),
        file,
    })
}

/// Reads a log's manifest; a directory without one is a log without sealed segments.
pub(super) fn read_manifest(
    directory: &dyn Directory,
    group: GroupId,
) -> Result<Manifest, LogError> {
    let limit = (MANIFEST_HEADER_LEN + MANIFEST_BODY_MAX) as u64;
    let bytes = match read_file(directory, MANIFEST, limit) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Manifest::default()),
        Err(error) => return Err(read_failed(error)),
    };
    let manifest = Manifest::parse(&bytes)?;
    let found: GroupId = manifest.group.parse().map_err(|_| FormatError::Field {
        what: "manifest body",
        field: "group",
        reason: "not 32 hex digits",
    })?;
    if found != group {
        return Err(LogError::ForeignGroup {
            expected: group,
            found,
        });
    }
    Ok(manifest)
}

pub(super) fn key_of(entry: &SegmentEntry) -> SegmentKey {
    SegmentKey {
        ordinal: entry.ordinal,
        first_frame: FrameNo(entry.first_frame),
        last_frame: FrameNo(entry.last_frame),
    }
}

/// Whether a run indexes exactly these segments.
pub(super) fn describes(run: &Run, group: GroupId, segments: &[SegmentEntry]) -> bool {
    let members = &run.tail.members;
    run.header.group == group
        && members.len() == segments.len()
        && members.iter().zip(segments).all(|(member, entry)| {
            let key = key_of(entry);
            (member.ordinal, member.first_frame, member.last_frame)
                == (key.ordinal, key.first_frame, key.last_frame)
                && (member.first_seq.0, member.end_seq.0) == (entry.first_seq, entry.end_seq)
                && is_hex_of(&entry.last_digest, &member.last_digest)
        })
}

fn is_hex_of(text: &str, digest: &Digest) -> bool {
    let (digits, _) = text.as_bytes().as_chunks::<2>();
    let byte = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    text.len() == 2 * digest.len() && digits.iter().map(byte).eq(digest.iter().map(|b| Some(*b)))
}

/// What is known of the bytes of a segment before they are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trust {
    /// They were checked when they were appended.
    Full,
    /// Nobody vouches for them. A later segment exists, so they do not end in a torn tail: behind
    /// a bad frame history would have a hole.
    Complete,
    /// The newest of all, without a writer: where they are bad, history just ends.
    Tail,
}

/// History in the making.
struct Opening<'a> {
    directory: Arc<dyn Directory>,
    group: GroupId,
    end: Option<&'a LogEnd>,
    manifest: Manifest,
    names: Vec<String>,
    cache: Arc<PageCache>,
    runs: Vec<Run>,
    segments: Vec<Segment>,
    events: Vec<Event>,
    findings: Vec<String>,
    cut: Option<Cut>,
    lock: Box<dyn Send + Sync + std::fmt::Debug>,
}

impl<'a> Opening<'a> {
    fn new(
        directory: Arc<dyn Directory>,
        group: GroupId,
        end: Option<&'a LogEnd>,
    ) -> Result<Self, HistoryError> {
        let lock = directory.lock(READERS_LOCK, false).map_err(read_failed)?;
        // The listing is the older of the two: a segment sealed in between is then missing from
        // neither, and its vanished old name repeats the attempt.
        let names = directory.list().map_err(read_failed)?;
        let manifest = read_manifest(directory.as_ref(), group)?;
        Ok(Self {
            directory,
            group,
            end,
            manifest,
            names,
            cache: Arc::new(Cache::new(PAGE_CACHE_BYTES)),
            runs: Vec::new(),
            segments: Vec::new(),
            events: Vec::new(),
            findings: Vec::new(),
            cut: None,
            lock,
        })
    }

    fn finish(mut self) -> Result<History, HistoryError> {
        let manifest = std::mem::take(&mut self.manifest);
        self.events = manifest
            .events
            .iter()
            .filter_map(Event::from_manifest)
            .collect();
        self.sealed(&manifest.segments)?;
        if self.cut.is_none() {
            self.unsealed(manifest.segments.last())?;
        }
        self.events.sort_by_key(|event| event.seq);
        let mut history = History {
            group: self.group,
            directory: self.directory,
            runs: self.runs,
            segments: self.segments,
            files: Cache::new(OPEN_FILES_MAX),
            older_volumes: older_volumes(&manifest, &self.events),
            events: self.events,
            spans: Vec::new(),
            incarnations: Vec::new(),
            horizon_seq: Seq(manifest.horizon_seq),
            findings: self.findings,
            cut: self.cut,
            _lock: self.lock,
        };
        history.spans = history.find_spans();
        history.incarnations = name_incarnations(&history, &manifest)?;
        Ok(history)
    }

    /// The segments that the manifest names: by their runs, else by their tables.
    fn sealed(&mut self, entries: &[SegmentEntry]) -> Result<(), HistoryError> {
        let keys: Vec<SegmentKey> = entries.iter().map(key_of).collect();
        for cover in names::cover(&keys, &self.names) {
            let covered = &entries[cover.segments.clone()];
            if let Some(name) = &cover.run
                && self.take_run(name, covered)?
            {
                continue;
            }
            for entry in covered {
                if self.cut.is_some() {
                    return Ok(());
                }
                let key = key_of(entry);
                let segment = open_file(self.directory.as_ref(), &key.file_name())?;
                // The manifest has the events of sealed segments.
                let indexed = self.index(key.ordinal, &segment, entry.bytes, Trust::Full)?;
                if let Some(indexed) = indexed {
                    self.take(indexed, segment, false);
                }
            }
        }
        Ok(())
    }

    /// Takes a run file over; false if it cannot be used.
    fn take_run(&mut self, name: &str, entries: &[SegmentEntry]) -> Result<bool, HistoryError> {
        let id = u32::try_from(self.runs.len()).expect("invariant: fewer runs than segments");
        match Run::open(self.directory.as_ref(), name, &self.cache, id) {
            Ok(run) if describes(&run, self.group, entries) => {
                for (entry, member) in entries.iter().zip(&run.tail.members) {
                    let key = key_of(entry);
                    self.segments.push(Segment {
                        name: key.file_name(),
                        key,
                        first_seq: Seq(entry.first_seq),
                        end_seq: Seq(entry.end_seq),
                        first_time: TimeUs(entry.first_time_us),
                        last_time: TimeUs(entry.last_time_us),
                        bytes: entry.bytes,
                        records: entry.records,
                        run: self.runs.len(),
                        first_slot: member.first_slot,
                        held: None,
                    });
                }
                self.runs.push(run);
                Ok(true)
            }
            Ok(_) => {
                self.findings.push(format!(
                    "{name} does not describe the segments it is named by"
                ));
                Ok(false)
            }
            Err(error @ (LogError::Damaged { .. } | LogError::Format(_))) => {
                self.findings.push(format!("index run not used: {error}"));
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Segments that no manifest names yet: sealed a moment ago, waiting to be, or growing.
    fn unsealed(&mut self, newest_sealed: Option<&SegmentEntry>) -> Result<(), HistoryError> {
        let behind = newest_sealed.map(|entry| (entry.ordinal, FrameNo(entry.last_frame)));
        let mut found: Vec<(u32, FrameNo, String)> = Vec::new();
        for name in &self.names {
            let Some((id, state)) = log_names::parse(name) else {
                continue;
            };
            if !matches!(state, SegmentState::Gone { .. }) {
                found.push((id.ordinal, id.first_frame, name.clone()));
            }
        }
        found.retain(|(ordinal, first, _)| behind.is_none_or(|behind| (*ordinal, *first) > behind));
        found.sort_unstable();
        let newest_file = found.last().map(|(ordinal, first, _)| (*ordinal, *first));
        for (ordinal, first_frame, name) in found {
            let segment = open_file(self.directory.as_ref(), &name)?;
            let file_len = segment.file.len().map_err(read_failed)?;
            let published = self.end.and_then(|end| Some((end, end.open_first_frame?)));
            let newest = published.map(|(end, first)| (end.ordinal, first));
            let place = Some((ordinal, first_frame));
            // What lies before the published end was checked when it was appended; what lies
            // behind it, or has no writer that vouches for it, is checked here. The end may be
            // older than the list of files: a segment that another follows is complete.
            let (limit, trust) = match published {
                Some((end, _)) if place == newest && place == newest_file => {
                    (end.committed_len.min(file_len), Trust::Full)
                }
                Some(_) if place < newest => (file_len, Trust::Full),
                _ if place == newest_file => (file_len, Trust::Tail),
                _ => (file_len, Trust::Complete),
            };
            let indexed = self.index(ordinal, &segment, limit, trust)?;
            if let Some(indexed) = indexed {
                self.take(indexed, segment, true);
            }
            if self.cut.is_some() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn index(
        &mut self,
        ordinal: u32,
        segment: &SegmentFile,
        limit: u64,
        trust: Trust,
    ) -> Result<Option<Indexed>, HistoryError> {
        let whole = trust != Trust::Full;
        let stopped = match index_segment(self.group, ordinal, segment, limit, whole) {
            Ok(indexed) => return Ok(indexed),
            Err(stopped) => *stopped,
        };
        let LogError::Damaged { offset, source, .. } = stopped.error else {
            return Err(stopped.error.into());
        };
        let name = &segment.name;
        let torn = trust == Trust::Tail;
        let tail = if torn { "a torn tail" } else { "damage" };
        self.findings.push(format!(
            "history ends at {tail}: {name} at byte {offset}: {source}"
        ));
        if !torn {
            self.cut = Some(Cut {
                segment: name.clone(),
                offset,
                source,
            });
        }
        Ok(stopped.so_far)
    }

    fn take(&mut self, indexed: Indexed, segment: SegmentFile, unsealed: bool) {
        let Indexed { run, events, bytes } = indexed;
        if unsealed {
            self.events.extend(events);
        }
        let (header, member) = (&run.header, &run.tail.members[0]);
        self.segments.push(Segment {
            name: segment.name.clone(),
            key: SegmentKey {
                ordinal: member.ordinal,
                first_frame: member.first_frame,
                last_frame: member.last_frame,
            },
            first_seq: header.base_seq,
            end_seq: header.end_seq,
            first_time: header.first_time,
            last_time: header.last_time,
            bytes,
            records: header.records,
            run: self.runs.len(),
            first_slot: 0,
            held: unsealed.then_some(segment),
        });
        self.runs.push(run);
    }
}

fn older_volumes(manifest: &Manifest, events: &[Event]) -> Vec<(VolumeIndex, String, u64)> {
    let told = |wanted: u16| {
        events.iter().any(|event| match &event.kind {
            EventKind::Volume { index, .. } => index.0 == wanted,
            _ => false,
        })
    };
    let older = manifest.volumes.iter().filter(|volume| !told(volume.index));
    older
        .map(|volume| (VolumeIndex(volume.index), volume.name.clone(), volume.size))
        .collect()
}

/// Incarnations in log order: from the manifest, or for a new one from its segment's header.
fn name_incarnations(
    history: &History,
    manifest: &Manifest,
) -> Result<Vec<Incarnation>, HistoryError> {
    let mut incarnations: Vec<Incarnation> = Vec::new();
    for segment in &history.segments {
        let ordinal = segment.key.ordinal;
        if incarnations
            .last()
            .is_some_and(|last| last.ordinal == ordinal)
        {
            continue;
        }
        let listed = manifest
            .incarnations
            .iter()
            .find(|entry| entry.ordinal == ordinal);
        let listed = listed.and_then(|entry| {
            let generation = Generation {
                counter: entry.generation_counter,
                site: entry.generation_site,
            };
            Some(Incarnation {
                ordinal,
                id: entry.id.parse().ok()?,
                generation,
            })
        });
        incarnations.extend(match listed {
            Some(listed) => Some(listed),
            None => history
                .incarnation_header(ordinal)?
                .map(|header| Incarnation {
                    ordinal,
                    id: header.incarnation,
                    generation: header.generation,
                }),
        });
    }
    Ok(incarnations)
}
