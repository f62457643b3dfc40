//! The readable history of a group: the runs, and the segments that have none indexed in memory.

use std::sync::Arc;

use super::cache::Cache;
use super::entry::Content;
use super::event::Event;
use super::names::SegmentKey;
use super::opening::open_file;
use super::points::Span;
use super::run::{Patience, Run};
use super::walk::SegmentFile;
use super::{HistoryError, Version};
use crate::format::FormatError;
use crate::format::segment::SegmentHeader;
use crate::log::LogError;
use crate::storage::Directory;
use crate::types::{
    BlockIndex, FrameNo, Generation, GroupId, IncarnationId, Seq, TimeUs, VolumeIndex,
};

/// Held, shared, by whoever reads segments; a writer that wants to remove some asks for it alone.
pub const READERS_LOCK: &str = "readers";

/// The readable history of a group up to a committed end. Does not follow the writer: whoever wants
/// newer records opens it anew.
#[derive(Debug)]
pub struct History {
    pub(super) group: GroupId,
    pub(super) directory: Arc<dyn Directory>,
    /// Oldest first; their seqs do not overlap.
    pub(super) runs: Vec<Run>,
    pub(super) segments: Vec<Segment>,
    pub(super) files: Cache<usize, SegmentFile>,
    /// By seq.
    pub(super) events: Vec<Event>,
    /// Stretches without recovery points, oldest first; they do not overlap.
    pub(super) spans: Vec<Span>,
    /// Volumes whose records retention has taken: they were there before history begins.
    pub(super) older_volumes: Vec<(VolumeIndex, String, u64)>,
    pub(super) incarnations: Vec<Incarnation>,
    pub(super) horizon_seq: Seq,
    pub(super) findings: Vec<String>,
    pub(super) cut: Option<Cut>,
    /// Keeps the files from being removed by retention.
    pub(super) _lock: Box<dyn Send + Sync + std::fmt::Debug>,
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
    pub(super) run: usize,
    pub(super) first_slot: u32,
    /// Files that may be renamed while history is open.
    pub(super) held: Option<SegmentFile>,
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
pub(super) struct Cut {
    pub(super) segment: String,
    pub(super) offset: u64,
    pub(super) source: FormatError,
}

impl History {
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
