//! The readable history of a group: the runs, and the segments that have none indexed in memory.

use std::io;
use std::sync::Arc;

use super::build::{Indexed, index_segment};
use super::cache::Cache;
use super::entry::Content;
use super::event::{Event, EventKind};
use super::layout::PAGE_LEN;
use super::names::{self, SegmentKey};
use super::run::{PageCache, Patience, Run};
use super::walk::SegmentFile;
use super::{HistoryError, Version};
use crate::format::FormatError;
use crate::format::frame::Digest;
use crate::format::manifest::{MANIFEST_BODY_MAX, MANIFEST_HEADER_LEN, Manifest, SegmentEntry};
use crate::format::segment::SegmentHeader;
use crate::log::{LogEnd, LogError};
use crate::storage::{Directory, read_file};
use crate::types::{
    BlockIndex, FrameNo, Generation, GroupId, IncarnationId, Seq, TimeUs, VolumeIndex,
};

/// Held, shared, by whoever reads segments; a writer that wants to remove some asks for it alone.
pub const READERS_LOCK: &str = "readers";
const MANIFEST: &str = "MANIFEST";
/// Bytes of index pages kept.
const PAGE_CACHE_BYTES: usize = 64 << 20;
/// Open segment files kept.
const OPEN_FILES_MAX: usize = 256;
/// A listing is repeated this often when the writer moved files meanwhile.
const OPEN_ATTEMPTS: u32 = 10;

/// The readable history of a group up to a committed end. Does not follow the writer: whoever wants
/// newer records opens it anew.
#[derive(Debug)]
pub struct History {
    group: GroupId,
    directory: Arc<dyn Directory>,
    /// Oldest first; their seqs do not overlap.
    runs: Vec<Run>,
    pub(super) segments: Vec<Segment>,
    files: Cache<usize, SegmentFile>,
    /// By seq.
    pub(super) events: Vec<Event>,
    /// Volumes whose records retention has taken: they were there before history begins.
    pub(super) older_volumes: Vec<(VolumeIndex, String, u64)>,
    incarnations: Vec<Incarnation>,
    horizon_seq: Seq,
    findings: Vec<String>,
    cut: Option<Cut>,
    /// Keeps the files from being removed by retention.
    _lock: Box<dyn Send + Sync + std::fmt::Debug>,
}

/// A segment that history reads.
#[derive(Debug)]
pub(super) struct Segment {
    pub name: String,
    pub key: SegmentKey,
    pub first_seq: Seq,
    pub end_seq: Seq,
    pub first_time: TimeUs,
    pub last_time: TimeUs,
    pub bytes: u64,
    pub records: u64,
    run: usize,
    first_slot: u32,
    /// Files that may be renamed while history is open.
    held: Option<SegmentFile>,
}

/// One incarnation of which frames are held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incarnation {
    /// Position in this log.
    pub ordinal: u32,
    pub id: IncarnationId,
    pub generation: Generation,
}

/// Where a frame lies.
#[derive(Debug)]
pub struct FramePlace {
    pub segment: Arc<SegmentFile>,
    /// Of the frame in the segment file.
    pub offset: u64,
}

/// History ends before its newest segment does: damage in a table that no run replaces.
#[derive(Debug)]
struct Cut {
    segment: String,
    offset: u64,
    source: FormatError,
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

impl History {
    /// Opens runs and indexes the open segment up to `end` (or as far as frames verify).
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

    pub fn group(&self) -> GroupId {
        self.group
    }

    pub fn directory(&self) -> &Arc<dyn Directory> {
        &self.directory
    }

    /// Newest version of a block at or before `seq`, and for how many blocks from here on the
    /// answer has the same form (same zero range; consecutive payload blocks of one frame). The
    /// number is a lower bound of at least 1.
    pub fn lookup(
        &self,
        volume: VolumeIndex,
        block: BlockIndex,
        seq: Seq,
    ) -> Result<(Version, u64), HistoryError> {
        Ok(self.lookup_within(volume, block, seq, u64::MAX - block.0)?)
    }

    /// As `lookup`, for at most `blocks` blocks; cheaper for one.
    pub fn lookup_within(
        &self,
        volume: VolumeIndex,
        block: BlockIndex,
        seq: Seq,
        blocks: u64,
    ) -> Result<(Version, u64), LogError> {
        self.search(volume, block, seq, blocks, Patience::Wait)
    }

    /// As `lookup_within`, from memory alone; None if that does not suffice.
    pub fn lookup_cached(
        &self,
        volume: VolumeIndex,
        block: BlockIndex,
        seq: Seq,
        blocks: u64,
    ) -> Option<(Version, u64)> {
        self.search(volume, block, seq, blocks, Patience::CachedOnly)
            .ok()
    }

    fn search(
        &self,
        volume: VolumeIndex,
        block: BlockIndex,
        seq: Seq,
        blocks: u64,
        patience: Patience,
    ) -> Result<(Version, u64), LogError> {
        let mut count = blocks;
        let newest = self.runs.partition_point(|run| run.header.base_seq <= seq);
        for run in self.runs[..newest].iter().rev() {
            let (hit, next) = run.lookup(volume, block, seq, blocks == 1, patience)?;
            count = count.min(next - block.0);
            let Some(hit) = hit else { continue };
            count = count.min(hit.piece.end - block.0);
            let seq = hit.seq;
            let version = match hit.content {
                Content::Zero => Version::Zero { seq },
                Content::Discarded => Version::Discarded { seq },
                Content::Stored { payload_block } => {
                    let offset = u32::try_from(block.0 - hit.piece.start);
                    let offset = offset.expect("invariant: a stored piece is one record's");
                    let (ordinal, frame_no) = frame_of(run, hit.slot);
                    let payload_block = payload_block + offset;
                    Version::Stored {
                        seq,
                        ordinal,
                        frame_no,
                        payload_block,
                    }
                }
            };
            return Ok((version, count));
        }
        Ok((Version::Zero { seq: Seq(0) }, count))
    }

    /// Where a frame lies, or None if it is not held.
    pub fn locate(&self, ordinal: u32, frame_no: FrameNo) -> Result<Option<FramePlace>, LogError> {
        let behind = self
            .segments
            .partition_point(|s| (s.key.ordinal, s.key.first_frame) <= (ordinal, frame_no));
        let Some(number) = behind.checked_sub(1) else {
            return Ok(None);
        };
        let segment = &self.segments[number];
        if segment.key.ordinal != ordinal || segment.key.last_frame < frame_no {
            return Ok(None);
        }
        let offset = self.frame_offset(segment, frame_no)?;
        Ok(Some(FramePlace {
            segment: self.file(number)?,
            offset,
        }))
    }

    pub(super) fn frame_offset(&self, segment: &Segment, frame: FrameNo) -> Result<u64, LogError> {
        let slot = segment.first_slot + (frame.0 - segment.key.first_frame.0);
        self.runs[segment.run].frame_offset(slot)
    }

    /// Header of an incarnation's oldest segment that is held: salt, suite, identity.
    pub fn incarnation_header(&self, ordinal: u32) -> Result<Option<SegmentHeader>, LogError> {
        let number = self
            .segments
            .partition_point(|segment| segment.key.ordinal < ordinal);
        match self.segments.get(number) {
            Some(segment) if segment.key.ordinal == ordinal => {
                self.file(number)?.header().map(Some)
            }
            _ => Ok(None),
        }
    }

    pub(super) fn file(&self, number: usize) -> Result<Arc<SegmentFile>, LogError> {
        self.files.get_or_load(number, || {
            let segment = &self.segments[number];
            if let Some(held) = &segment.held {
                return Ok((held.clone(), 1));
            }
            Ok((open_file(self.directory.as_ref(), &segment.name)?, 1))
        })
    }

    pub fn incarnations(&self) -> &[Incarnation] {
        &self.incarnations
    }

    pub(super) fn horizon_seq(&self) -> Seq {
        self.horizon_seq
    }

    /// First record that writes, zeroes, discards or copies.
    pub(super) fn first_data_seq(&self) -> Option<Seq> {
        self.runs
            .iter()
            .map(|run| run.header.first_data_seq)
            .find(|seq| *seq != Seq(0))
    }

    /// Runs consulted by a lookup of the newest point: shown by diagnostics and tests.
    pub fn run_count(&self) -> usize {
        self.runs.len()
    }

    /// Runs that could not be used and what stood in for them; damage at the newest end.
    pub fn findings(&self) -> &[String] {
        &self.findings
    }

    /// The damage that hides everything newer than what history shows.
    pub(super) fn cut(&self) -> Option<LogError> {
        self.cut.as_ref().map(|cut| LogError::Damaged {
            segment: cut.segment.clone(),
            offset: cut.offset,
            source: cut.source.clone(),
        })
    }
}

/// The frame that a slot of a run stands for.
fn frame_of(run: &Run, slot: u32) -> (u32, FrameNo) {
    let members = &run.tail.members;
    let behind = members.partition_point(|member| member.first_slot <= slot);
    let member = &members[behind.saturating_sub(1)];
    (
        member.ordinal,
        FrameNo(member.first_frame.0 + (slot - member.first_slot)),
    )
}

fn open_file(directory: &dyn Directory, name: &str) -> Result<SegmentFile, LogError> {
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
            incarnations: Vec::new(),
            horizon_seq: Seq(manifest.horizon_seq),
            findings: self.findings,
            cut: self.cut,
            _lock: self.lock,
        };
        history.incarnations = name_incarnations(&history, &manifest)?;
        Ok(history)
    }

    /// The segments that the manifest names: by their runs, else by their tables.
    fn sealed(&mut self, entries: &[SegmentEntry]) -> Result<(), HistoryError> {
        let keys: Vec<SegmentKey> = entries.iter().map(key_of).collect();
        for cover in names::cover(&keys, &self.names) {
            let covered = &entries[cover.segments.clone()];
            if let Some(name) = &cover.run {
                if self.take_run(name, covered)? {
                    continue;
                }
            }
            for entry in covered {
                if self.cut.is_some() {
                    return Ok(());
                }
                let key = key_of(entry);
                let segment = open_file(self.directory.as_ref(), &key.file_name())?;
                // The manifest has the events of sealed segments.
                let indexed = self.index(key.ordinal, &segment, entry.bytes, false)?;
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
            let sealed = names::sealed_segment(name).map(|key| (key.ordinal, key.first_frame));
            let place = sealed.or_else(|| names::open_segment(name));
            found.extend(place.map(|(ordinal, first)| (ordinal, first, name.clone())));
        }
        found.retain(|(ordinal, first, _)| behind.is_none_or(|behind| (*ordinal, *first) > behind));
        found.sort_unstable();
        for (ordinal, first_frame, name) in found {
            let segment = open_file(self.directory.as_ref(), &name)?;
            let file_len = segment.file.len().map_err(read_failed)?;
            let published = self.end.and_then(|end| Some((end, end.open_first_frame?)));
            let newest = published.map(|(end, first)| (end.ordinal, first));
            let place = Some((ordinal, first_frame));
            // What lies before the published end was checked when it was appended; what lies
            // behind it, or has no writer that vouches for it, is checked here.
            let (limit, whole) = match published {
                Some((end, _)) if place == newest => (end.committed_len.min(file_len), false),
                _ => (file_len, place > newest || newest.is_none()),
            };
            let indexed = self.index(ordinal, &segment, limit, whole)?;
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
        whole: bool,
    ) -> Result<Option<Indexed>, HistoryError> {
        let stopped = match index_segment(self.group, ordinal, segment, limit, whole) {
            Ok(indexed) => return Ok(indexed),
            Err(stopped) => *stopped,
        };
        let LogError::Damaged { offset, source, .. } = stopped.error else {
            return Err(stopped.error.into());
        };
        let name = &segment.name;
        let tail = if whole { "a torn tail" } else { "damage" };
        self.findings.push(format!(
            "history ends at {tail}: {name} at byte {offset}: {source}"
        ));
        if !whole {
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

const _: () = assert!(PAGE_CACHE_BYTES > 64 * PAGE_LEN);
