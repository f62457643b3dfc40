//! What the tests of the codec share: frames in memory, contents that shrink and that do not.

mod frames;
mod references;
mod segments;

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use super::*;
use crate::constants::BLOCK_SIZE;
use crate::crypto::{GroupKey, Suite};
use crate::format::record::{BlockPayload, Payload, Record, RecordBody};
use crate::types::{BlockIndex, Extent, Seq, TimeUs, VolumeIndex};

const SUITES: [Suite; 2] = [Suite::Sm4Gcm, Suite::Aes256Gcm];

fn context(suite: Suite) -> FrameContext {
    let (group, incarnation) = (GroupId([2; 16]), IncarnationId([3; 16]));
    FrameContext {
        group,
        generation: Generation {
            counter: 1,
            site: 9,
        },
        incarnation,
        suite: suite as u16,
        key: IncarnationKey::derive(suite, &GroupKey([1; 32]), group, incarnation, &[4; 32]),
    }
}

/// Frames in memory; counts what is read.
#[derive(Default)]
struct Frames {
    frames: HashMap<u32, Vec<u8>>,
    cells_read: RefCell<usize>,
}

impl FrameSource for Frames {
    fn map(&self, frame_no: FrameNo) -> Result<Arc<FrameMap>, CodecError> {
        let frame = self.frames.get(&frame_no.0);
        let frame = frame.ok_or_else(|| CodecError::Source("no such frame".into()))?;
        Ok(Arc::new(FrameMap::parse(frame)?))
    }

    fn sealed(&self, frame: &FrameMap, cell: u32, out: &mut Vec<u8>) -> Result<(), CodecError> {
        let bytes = &self.frames[&frame.header.frame_no.0];
        let from = frame.cell_offsets[cell as usize] as usize;
        let len = frame.directory[cell as usize].sealed_len as usize;
        out.clear();
        out.extend_from_slice(&bytes[from..from + len]);
        *self.cells_read.borrow_mut() += 1;
        Ok(())
    }
}

fn one(frame_no: u32, bytes: Vec<u8>) -> Frames {
    Frames {
        frames: HashMap::from([(frame_no, bytes)]),
        ..Frames::default()
    }
}

/// All raw blocks of a frame.
fn open_all(key: &IncarnationKey, frames: &Frames, frame_no: u32) -> Result<Vec<u8>, CodecError> {
    let map = frames.map(FrameNo(frame_no))?;
    map.authenticate(key)?;
    let mut all = Vec::new();
    let mut raw = vec![0xaa; 5];
    for cell in 0..map.header.cell_count() {
        let cell = u32::try_from(cell).unwrap();
        open_cell(key, frames, FrameNo(frame_no), cell, &mut raw)?;
        all.extend_from_slice(&raw);
    }
    Ok(all)
}

fn write(at: u64, blocks: u64) -> Record {
    Record {
        seq: Seq(at + 1),
        time: TimeUs(1000 + at * 7),
        body: RecordBody::Write {
            extent: Extent {
                volume: VolumeIndex(0),
                start: BlockIndex(at * 3),
                blocks,
            },
            payload: Payload::All(BlockPayload::Stored),
        },
    }
}

/// Records that store so many blocks.
fn writes(blocks: usize) -> Vec<Record> {
    let mut left = blocks as u64;
    let mut records = Vec::new();
    while left > 0 {
        let taken = left.min(200);
        records.push(write(records.len() as u64, taken));
        left -= taken;
    }
    records
}

/// xorshift64: bytes that nothing compresses.
fn noise(blocks: usize, seed: u64) -> Vec<u8> {
    let mut state = seed * 2 + 1;
    let words = (0..blocks * BLOCK_SIZE / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.collect()
}

/// Pages that LZ4 shrinks: half text-like rows, half free space.
fn pages(blocks: usize, seed: u64) -> Vec<u8> {
    let mut bytes = noise(blocks, seed);
    for (at, byte) in bytes.iter_mut().enumerate() {
        if at % BLOCK_SIZE > 1500 {
            *byte = 0;
        } else if at % 16 < 12 {
            *byte = b"row of text "[at % 16 % 12];
        }
    }
    bytes
}

fn encode(suite: Suite, records: &[Record], payload: &[&[u8]], effort: Effort) -> UnlinkedFrame {
    FrameEncoder::default()
        .encode(&context(suite), FrameNo(5), 0, records, payload, effort)
        .unwrap()
}
