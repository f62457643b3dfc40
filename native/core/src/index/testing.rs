//! A journal written by hand, and the plain model that says what it must show.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::journal::Journal;
use crate::codec::{Effort, FrameContext, FrameEncoder};
use crate::constants::BLOCK_SIZE;
use crate::crypto::{GroupKey, IncarnationKey, Suite};
use crate::format::frame::Digest;
use crate::format::record::{BlockPayload, Cause, Payload, Record, RecordBody};
use crate::format::segment::{Parent, SegmentHeader};
use crate::log::LogOptions;
use crate::storage::Directory;
use crate::types::{
    BlockIndex, Extent, FrameNo, Generation, GroupId, IncarnationId, Seq, TimeUs, VolumeIndex,
};

pub const GROUP: GroupId = GroupId([7; 16]);
pub const GENERATION: Generation = Generation {
    counter: 1,
    site: 5,
};

pub fn key() -> GroupKey {
    GroupKey([3; 32])
}

/// Content of a block: 0 is zeroes, any other number its own pattern.
pub fn content(tag: u32) -> Vec<u8> {
    let mut block = vec![0u8; BLOCK_SIZE];
    if tag != 0 {
        for (place, word) in block.chunks_exact_mut(8).enumerate() {
            let mixed = if tag.is_multiple_of(3) {
                (place as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
            } else {
                0
            };
            word.copy_from_slice(&(mixed ^ u64::from(tag) << 32 | u64::from(tag)).to_le_bytes());
        }
    }
    block
}

/// One change of volume content.
#[derive(Debug, Clone)]
pub struct Change {
    pub seq: Seq,
    pub time: TimeUs,
    pub extent: Extent,
    /// One a block; empty for a range of zeroes.
    pub tags: Vec<u32>,
}

/// All that ever happened, in order.
#[derive(Debug, Default, Clone)]
pub struct Model {
    pub changes: Vec<Change>,
}

impl Model {
    /// Tag of every block of a volume as of `seq`.
    pub fn state(&self, volume: VolumeIndex, blocks: u64, seq: Seq) -> Vec<u32> {
        let mut state = vec![0; blocks as usize];
        for change in self.changes.iter().take_while(|change| change.seq <= seq) {
            if change.extent.volume != volume {
                continue;
            }
            for offset in 0..change.extent.blocks {
                let place = (change.extent.start.0 + offset) as usize;
                if let Some(tag) = state.get_mut(place) {
                    *tag = change.tags.get(offset as usize).copied().unwrap_or(0);
                }
            }
        }
        state
    }
}

/// Writes frames into a journal and the same into a model.
pub struct Recorder {
    pub journal: Journal,
    pub model: Model,
    pub directory: Arc<dyn Directory>,
    pub seq: Seq,
    pub time: TimeUs,
    suite: Suite,
    context: Option<FrameContext>,
    encoder: FrameEncoder,
    frame_no: FrameNo,
    prev: Digest,
    records: Vec<Record>,
    payload: Vec<u8>,
    incarnations: u8,
}

pub fn options(records: u64) -> LogOptions {
    LogOptions {
        segment_records_max: records,
        ..LogOptions::default()
    }
}

impl Recorder {
    /// `volumes` are sizes in bytes, of volumes 0, 1, ...
    pub fn new(directory: Arc<dyn Directory>, suite: Suite, options: LogOptions) -> Self {
        let opened = Journal::open_with(Arc::clone(&directory), GROUP, options);
        let (journal, _) = opened.unwrap();
        Self {
            journal,
            model: Model::default(),
            directory,
            seq: Seq(0),
            time: TimeUs(1_000_000),
            suite,
            context: None,
            encoder: FrameEncoder::default(),
            frame_no: FrameNo(0),
            prev: Digest::default(),
            records: Vec::new(),
            payload: Vec::new(),
            incarnations: 0,
        }
    }

    /// Begins the next incarnation; its seqs begin above a gap, as after an unclean stop.
    pub fn incarnation(&mut self, volumes: &[u64]) {
        self.close();
        let parent = self.context.as_ref().map(|context| Parent {
            incarnation: context.incarnation,
            frame_no: FrameNo(self.frame_no.0 - 1),
            digest: self.prev,
        });
        self.incarnations += 1;
        let incarnation = IncarnationId([self.incarnations; 16]);
        let salt = [self.incarnations; 32];
        if parent.is_some() {
            self.seq.0 += 1000;
        }
        let header = SegmentHeader {
            group: GROUP,
            generation: GENERATION,
            incarnation,
            salt,
            suite: self.suite as u16,
            first_frame: FrameNo(0),
            created: self.time,
            first_seq: Seq(self.seq.0 + 1),
            parent,
        };
        self.journal.begin(&header).unwrap();
        self.context = Some(FrameContext {
            group: GROUP,
            generation: GENERATION,
            incarnation,
            suite: self.suite as u16,
            key: IncarnationKey::derive(self.suite, &key(), GROUP, incarnation, &salt),
        });
        self.frame_no = FrameNo(0);
        self.prev = Digest::default();
        for (index, size) in (0u16..).zip(volumes) {
            let (volume, name) = (VolumeIndex(index), format!("volume{index}"));
            self.event(RecordBody::Volume {
                volume,
                size: *size,
                name,
            });
        }
    }

    fn push(&mut self, body: RecordBody) -> (Seq, TimeUs) {
        self.seq.0 += 1;
        // Times are not evenly spaced, so that a mix-up with seqs shows.
        self.time.0 += 1 + self.seq.0 % 7;
        self.records.push(Record {
            seq: self.seq,
            time: self.time,
            body,
        });
        (self.seq, self.time)
    }

    pub fn event(&mut self, body: RecordBody) -> (Seq, TimeUs) {
        self.push(body)
    }

    pub fn span_begin(&mut self, cause: Cause) -> (Seq, TimeUs) {
        self.push(RecordBody::SpanBegin { cause })
    }

    /// A write, or a resync copy, of blocks; tag 0 is recorded as zeroes, what is there already as
    /// the same.
    pub fn write(&mut self, volume: u16, start: u64, tags: &[u32], resync: bool) -> (Seq, TimeUs) {
        let extent = Extent {
            volume: VolumeIndex(volume),
            start: BlockIndex(start),
            blocks: tags.len() as u64,
        };
        let end = start + tags.len() as u64;
        let before = self.model.state(extent.volume, end, Seq(u64::MAX));
        let mut kinds = Vec::new();
        for (tag, old) in tags.iter().zip(&before[start as usize..]) {
            kinds.push(match tag {
                0 => BlockPayload::Zero,
                tag if tag == old => BlockPayload::Same,
                _ => BlockPayload::Stored,
            });
            if kinds.last() == Some(&BlockPayload::Stored) {
                self.payload.extend_from_slice(&content(*tag));
            }
        }
        let payload = if kinds.iter().all(|kind| *kind == kinds[0]) {
            Payload::All(kinds[0])
        } else {
            Payload::Map(kinds)
        };
        let (seq, time) = self.push(if resync {
            RecordBody::Resync { extent, payload }
        } else {
            RecordBody::Write { extent, payload }
        });
        self.model.changes.push(Change {
            seq,
            time,
            extent,
            tags: tags.to_vec(),
        });
        if self.payload.len() >= 256 * BLOCK_SIZE {
            self.close();
        }
        (seq, time)
    }

    pub fn clear(&mut self, volume: u16, start: u64, blocks: u64, discard: bool) -> (Seq, TimeUs) {
        let extent = Extent {
            volume: VolumeIndex(volume),
            start: BlockIndex(start),
            blocks,
        };
        let (seq, time) = self.push(if discard {
            RecordBody::Discard { extent }
        } else {
            RecordBody::Zero { extent }
        });
        self.model.changes.push(Change {
            seq,
            time,
            extent,
            tags: Vec::new(),
        });
        (seq, time)
    }

    /// Closes the frame.
    pub fn close(&mut self) {
        if self.records.is_empty() {
            return;
        }
        let effort = if self.frame_no.0.is_multiple_of(2) {
            Effort::Lz4
        } else {
            Effort::Raw
        };
        let context = self.context.as_ref().unwrap();
        let frame = self
            .encoder
            .encode(
                context,
                self.frame_no,
                0,
                &self.records,
                &[&self.payload],
                effort,
            )
            .unwrap();
        let (_, bytes, digest) = frame.link(self.prev);
        self.journal.append(&bytes).unwrap();
        self.prev = digest;
        self.frame_no.0 += 1;
        self.records.clear();
        self.payload.clear();
    }

    /// Waits until the segments that are full are sealed and indexed.
    pub fn settle(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.files(".open").len() > 1 {
            assert!(Instant::now() < deadline, "segments are not sealed");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(
            self.journal.wait_indexed(Duration::from_secs(20)),
            "{:?}",
            self.journal.index_error()
        );
    }

    /// Names of the files with an extension.
    pub fn files(&self, extension: &str) -> Vec<String> {
        let names = self.directory.list().unwrap();
        names
            .into_iter()
            .filter(|name| name.ends_with(extension))
            .collect()
    }
}

/// Counts what a mapping holds, for messages of tests.
pub fn differences(found: &[u32], expected: &[u32]) -> BTreeMap<usize, (u32, u32)> {
    let pairs = found.iter().zip(expected).enumerate();
    pairs
        .filter(|(_, (a, b))| a != b)
        .map(|(place, (a, b))| (place, (*a, *b)))
        .collect()
}
