//! Frames for tests, without codec and keys: everything that needs no key to be checked is right.

use crate::constants::{BLOCK_SIZE, CELL_BLOCKS};
use crate::format::digest::sha256;
use crate::format::frame::{
    CELL_OVERHEAD, Digest, FRAME_HEADER_LEN, FrameFlags, FrameHeader, frame_digest,
};
use crate::format::record::{
    BlockPayload, CellEncoding, CellEntry, Payload, Record, RecordBody, TableWriter,
    write_directory,
};
use crate::format::segment::{Parent, SegmentHeader};
use crate::types::{
    BlockIndex, Extent, FrameNo, Generation, GroupId, IncarnationId, Seq, TimeUs, VolumeIndex,
};

pub(crate) const GROUP: GroupId = GroupId([7; 16]);

/// Makes the frames of one incarnation, in order.
#[derive(Debug, Clone)]
pub(crate) struct FrameMaker {
    pub header: SegmentHeader,
    pub next_frame: u32,
    pub prev: Digest,
    pub next_seq: u64,
    pub next_time: u64,
}

impl FrameMaker {
    /// First incarnation of a group.
    pub(crate) fn new() -> Self {
        let header = SegmentHeader {
            group: GROUP,
            generation: Generation {
                counter: 3,
                site: 1,
            },
            incarnation: IncarnationId([1; 16]),
            salt: [1; 32],
            suite: 2,
            first_frame: FrameNo(0),
            created: TimeUs(1_000_000),
            first_seq: Seq(1),
            parent: None,
        };
        Self {
            header,
            next_frame: 0,
            prev: Digest::default(),
            next_seq: 1,
            next_time: 1_000_000,
        }
    }

    /// The incarnation that follows this one, known to have continued it.
    pub(crate) fn next_incarnation(&self) -> Self {
        let last = self.header.incarnation.0[0] + 1;
        let parent = (self.next_frame > 0).then(|| Parent {
            incarnation: self.header.incarnation,
            frame_no: FrameNo(self.next_frame - 1),
            digest: self.prev,
        });
        let header = SegmentHeader {
            incarnation: IncarnationId([last; 16]),
            salt: [last; 32],
            first_frame: FrameNo(0),
            created: TimeUs(self.next_time),
            first_seq: Seq(self.next_seq),
            parent,
            ..self.header.clone()
        };
        Self {
            header,
            next_frame: 0,
            prev: Digest::default(),
            ..self.clone()
        }
    }

    /// One frame that holds these records.
    pub(crate) fn frame(&mut self, bodies: &[RecordBody]) -> Vec<u8> {
        let mut table = TableWriter::default();
        for body in bodies {
            let record = Record {
                seq: Seq(self.next_seq),
                time: TimeUs(self.next_time),
                body: body.clone(),
            };
            table.push(&record).unwrap();
            self.next_seq += 1;
            self.next_time += 10;
        }
        let blocks = table.payload_blocks();
        let mut cells = Vec::new();
        let mut directory = Vec::new();
        let mut left = blocks;
        while left > 0 {
            let raw = left.min(CELL_BLOCKS) * BLOCK_SIZE;
            let sealed_len = u32::try_from(CELL_OVERHEAD + raw).unwrap();
            cells.push(CellEntry {
                sealed_len,
                encoding: CellEncoding::Raw,
                references: vec![],
            });
            left -= left.min(CELL_BLOCKS);
        }
        write_directory(&cells, &mut directory);
        let cells_len: u32 = cells.iter().map(|cell| cell.sealed_len).sum();
        let mut body = [table.bytes(), &directory].concat();
        let table_digest = sha256(&body);
        let fill = (0..cells_len).map(|i| (i ^ self.next_frame.wrapping_mul(37)).to_le_bytes()[0]);
        body.extend(fill);
        let events = if table.has_events() {
            FrameFlags::EVENTS
        } else {
            0
        };
        let header = FrameHeader {
            flags: FrameFlags(events),
            group: self.header.group,
            generation: self.header.generation,
            incarnation: self.header.incarnation,
            frame_no: FrameNo(self.next_frame),
            suite: self.header.suite,
            first_seq: table.first_seq(),
            first_time: table.first_time(),
            last_time: table.last_time(),
            record_count: u32::try_from(bodies.len()).unwrap(),
            payload_blocks: u32::try_from(blocks).unwrap(),
            table_len: u32::try_from(table.bytes().len()).unwrap(),
            directory_len: u32::try_from(directory.len()).unwrap(),
            cells_len,
            ref_floor: FrameNo(self.next_frame),
            table_digest,
            header_tag: [9; 16],
            body_digest: sha256(&body),
            prev: self.prev,
            nonce_random: 5,
        };
        header.check().unwrap();
        let bytes = header.encode();
        self.prev = frame_digest(&bytes);
        self.next_frame += 1;
        [&bytes[..], &body].concat()
    }

    /// One frame with one write of `blocks` stored blocks; with none, a record of zeroes.
    pub(crate) fn data(&mut self, blocks: u64) -> Vec<u8> {
        let start = BlockIndex(self.next_seq % 1000);
        let extent = Extent {
            volume: VolumeIndex(0),
            start,
            blocks: blocks.max(1),
        };
        self.frame(&[if blocks == 0 {
            RecordBody::Zero { extent }
        } else {
            RecordBody::Write {
                extent,
                payload: Payload::All(BlockPayload::Stored),
            }
        }])
    }

    /// One frame with a bookmark.
    pub(crate) fn bookmark(&mut self, label: &str) -> Vec<u8> {
        self.frame(&[RecordBody::Bookmark {
            label: label.to_owned(),
        }])
    }
}

/// A frame with another header, its checksum right again.
pub(crate) fn edited(frame: &[u8], edit: impl FnOnce(&mut FrameHeader)) -> Vec<u8> {
    let mut header = FrameHeader::parse(frame).unwrap();
    edit(&mut header);
    [&header.encode()[..], &frame[FRAME_HEADER_LEN..]].concat()
}

/// Splits frames that lie back to back.
pub(crate) fn split(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let (frame, rest) = bytes.split_at(FrameHeader::parse(bytes).unwrap().frame_len());
        frames.push(frame.to_vec());
        bytes = rest;
    }
    frames
}
