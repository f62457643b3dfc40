//! A tapped volume as front ends see it.
//!
//! A change: grace section -> region bits durable -> range lock -> contents completed -> ordering
//! point (seq, time, place) -> bytes into the ring -> backing write -> range released.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::core::TapCore;
use super::queue::{Kind, Placed, Refused, Want, regions};
use super::range_lock::RangeGuard;
use super::volume::{Volume, device_error};
use crate::constants::{BLOCK_SIZE, RECORD_BLOCKS_MAX};
use crate::device::{Allocation, BlockDevice, DeviceError, DeviceInfo, RequestFlags};

const BLOCK: u64 = BLOCK_SIZE as u64;
const RECORD_BYTES_MAX: u64 = RECORD_BLOCKS_MAX as u64 * BLOCK;
static ZERO_BLOCK: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];

#[derive(Debug)]
pub struct TapDevice {
    core: Arc<TapCore>,
    slot: usize,
}

/// A partly written block: its number, its whole new content.
type Partial = (u64, [u8; BLOCK_SIZE]);

impl From<Refused> for DeviceError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::WouldBlock => Self::WouldBlock,
            Refused::Ended => Self::Shutdown,
        }
    }
}

impl TapDevice {
    pub fn new(core: Arc<TapCore>, slot: usize) -> Self {
        Self { core, slot }
    }

    fn volume(&self) -> &Volume {
        &self.core.volumes[self.slot]
    }

    fn check(&self, offset: u64, length: u64) -> Result<u64, DeviceError> {
        let end = offset.checked_add(length).ok_or(DeviceError::OutOfRange)?;
        if end > self.volume().size {
            return Err(DeviceError::OutOfRange);
        }
        if self.core.is_stopping() {
            return Err(DeviceError::Shutdown);
        }
        Ok(end)
    }

    /// Region bits and range lock of a change.
    fn claim(&self, offset: u64, end: u64, nowait: bool) -> Result<RangeGuard<'_>, DeviceError> {
        let volume = self.volume();
        let (start, blocks) = (offset / BLOCK, end.div_ceil(BLOCK) - offset / BLOCK);
        let (first, last) = regions(start, blocks);
        if !volume.intent.touch(first, last, nowait) {
            return Err(DeviceError::WouldBlock);
        }
        if !volume.intent.durable().all(first, last) {
            self.core.intent_missing(volume);
        }
        if nowait {
            volume
                .ranges
                .try_lock(start, blocks)
                .ok_or(DeviceError::WouldBlock)
        } else {
            Ok(volume.ranges.lock(start, blocks))
        }
    }

    fn want(&self, kind: Kind, start: u64, blocks: u64) -> Want {
        Want {
            kind,
            slot: self.volume().slot,
            start,
            blocks,
            copied: None,
        }
    }

    /// Writes at most one record's bytes. The range is held.
    fn write_record(&self, data: &[u8], offset: u64, nowait: bool) -> Result<(), DeviceError> {
        let end = offset + data.len() as u64;
        let whole_end = end.is_multiple_of(BLOCK) || end == self.volume().size;
        if offset.is_multiple_of(BLOCK) && whole_end {
            self.write_whole(data, offset, nowait)
        } else {
            self.write_partial(data, offset, nowait)
        }
    }

    fn write_whole(&self, data: &[u8], offset: u64, nowait: bool) -> Result<(), DeviceError> {
        let volume = self.volume();
        let start = offset / BLOCK;
        let blocks = (data.len() as u64).div_ceil(BLOCK);
        let want = self.want(Kind::Write, start, blocks);
        match self.core.queue.place(&[want], data.len() as u64, nowait)? {
            Placed::Recorded(mut place) => {
                place.write(data);
                place.write(&ZERO_BLOCK[..padding(data.len())]);
            }
            Placed::ExtentsOnly => {}
        }
        volume.completion.remove(start, blocks);
        let outcome = volume.backing.write(data, offset);
        self.finish(outcome, start, blocks)
    }

    /// Completes first and last block from what they hold.
    fn write_partial(&self, data: &[u8], offset: u64, nowait: bool) -> Result<(), DeviceError> {
        let volume = self.volume();
        let end = offset + data.len() as u64;
        let (start, blocks) = (offset / BLOCK, end.div_ceil(BLOCK) - offset / BLOCK);
        let head = self.complete(start, data, offset, nowait)?;
        let tail = if blocks > 1 {
            self.complete(start + blocks - 1, data, offset, nowait)?
        } else {
            None
        };
        let want = self.want(Kind::Write, start, blocks);
        match self.core.queue.place(&[want], data.len() as u64, nowait)? {
            Placed::Recorded(mut place) => {
                let middle_from = if head.is_some() {
                    index((start + 1) * BLOCK - offset)
                } else {
                    0
                };
                let middle_to = if tail.is_some() {
                    index((start + blocks - 1) * BLOCK - offset)
                } else {
                    data.len()
                };
                if let Some((_, content)) = &head {
                    place.write(&content[..]);
                }
                if blocks > 1 || head.is_none() {
                    let middle = &data[middle_from..middle_to];
                    place.write(middle);
                    place.write(&ZERO_BLOCK[..padding(middle.len())]);
                }
                if let Some((_, content)) = &tail {
                    place.write(&content[..]);
                }
            }
            Placed::ExtentsOnly => {}
        }
        volume.completion.remove(start, blocks);
        let outcome = volume.backing.write(data, offset);
        if outcome.is_ok() {
            for (block, content) in head.iter().chain(&tail) {
                volume.completion.put(*block, content);
            }
        }
        self.finish(outcome, start, blocks)
    }

    /// The new content of a block that `data` at `offset` covers in part; `None` if wholly.
    fn complete(
        &self,
        block: u64,
        data: &[u8],
        offset: u64,
        nowait: bool,
    ) -> Result<Option<Partial>, DeviceError> {
        let volume = self.volume();
        let from = offset.max(block * BLOCK);
        let to = (offset + data.len() as u64).min((block + 1) * BLOCK);
        if from == block * BLOCK && (to == (block + 1) * BLOCK || to == volume.size) {
            return Ok(None);
        }
        let mut content = [0; BLOCK_SIZE];
        volume
            .read_block(block, &mut content, nowait)
            .map_err(|error| device_error(&error))?;
        let within = index(from - block * BLOCK)..index(to - block * BLOCK);
        content[within].copy_from_slice(&data[index(from - offset)..index(to - offset)]);
        Ok(Some((block, content)))
    }

    /// Makes a range zero: partial blocks at its ends as writes, the rest as one range record.
    fn clear(
        &self,
        offset: u64,
        length: u64,
        kind: Kind,
        hole: bool,
        flags: RequestFlags,
    ) -> Result<(), DeviceError> {
        let end = self.check(offset, length)?;
        if flags.nowait {
            return Err(DeviceError::WouldBlock);
        }
        if length > 0 {
            let _request = self.core.grace.enter();
            self.core.check_running()?;
            let _range = self.claim(offset, end, false)?;
            self.clear_held(offset, end, kind, hole)?;
        }
        self.flush_if(flags.fua)
    }

    fn clear_held(&self, offset: u64, end: u64, kind: Kind, hole: bool) -> Result<(), DeviceError> {
        let volume = self.volume();
        let whole_start = offset.div_ceil(BLOCK);
        let whole_end = if end == volume.size {
            end.div_ceil(BLOCK)
        } else {
            end / BLOCK
        };
        if whole_start >= whole_end {
            // No whole block: at most two partial ones.
            let zeroes = vec![0; index(end - offset)];
            return self.write_record(&zeroes, offset, false);
        }
        let head = index(whole_start * BLOCK - offset);
        if head > 0 {
            self.write_record(&ZERO_BLOCK[..head], offset, false)?;
        }
        let blocks = whole_end - whole_start;
        let (from, to) = (whole_start * BLOCK, (whole_end * BLOCK).min(end));
        self.core
            .queue
            .place(&[self.want(kind, whole_start, blocks)], to - from, false)?;
        volume.completion.remove(whole_start, blocks);
        let outcome = volume.backing.zero(from, to - from, hole);
        self.finish(outcome, whole_start, blocks)?;
        let tail = index(end - to);
        if tail > 0 {
            self.write_record(&ZERO_BLOCK[..tail], to, false)?;
        }
        Ok(())
    }

    /// After the backing has answered, the range still being held.
    fn finish(
        &self,
        outcome: std::io::Result<()>,
        start: u64,
        blocks: u64,
    ) -> Result<(), DeviceError> {
        self.volume().changed();
        outcome.map_err(|error| {
            self.core.backing_failed(self.volume(), start, blocks);
            device_error(&error)
        })
    }

    fn flush_if(&self, wanted: bool) -> Result<(), DeviceError> {
        if wanted {
            let seq = self.core.queue.last_seq();
            self.core.make_durable(self.volume(), seq)?;
        }
        Ok(())
    }
}

fn index(value: u64) -> usize {
    usize::try_from(value).expect("invariant: at most one request")
}

/// Bytes that are missing to a whole block.
fn padding(length: usize) -> usize {
    length.next_multiple_of(BLOCK_SIZE) - length
}

impl BlockDevice for TapDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            size: self.volume().size,
            read_only: false,
            multi_conn: true,
        }
    }

    fn read(&self, buffer: &mut [u8], offset: u64, flags: RequestFlags) -> Result<(), DeviceError> {
        self.check(offset, buffer.len() as u64)?;
        let outcome = self.volume().backing.read(buffer, offset, flags.nowait);
        outcome.map_err(|error| device_error(&error))?;
        self.core.reads.fetch_add(1, Ordering::Relaxed);
        self.core
            .read_bytes
            .fetch_add(buffer.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64, flags: RequestFlags) -> Result<(), DeviceError> {
        let end = self.check(offset, data.len() as u64)?;
        // What needs more than one step could not be undone after the first.
        if flags.nowait && (flags.fua || data.len() as u64 > RECORD_BYTES_MAX - BLOCK) {
            return Err(DeviceError::WouldBlock);
        }
        if !data.is_empty() {
            let _request = self.core.grace.enter();
            self.core.check_running()?;
            let _range = self.claim(offset, end, flags.nowait)?;
            let mut done = 0;
            while done < data.len() {
                let at = offset + done as u64;
                let record_end = (at / BLOCK * BLOCK + RECORD_BYTES_MAX).min(end);
                let part = &data[done..done + index(record_end - at)];
                self.write_record(part, at, flags.nowait)?;
                done += part.len();
            }
        }
        self.flush_if(flags.fua)
    }

    fn flush(&self, flags: RequestFlags) -> Result<(), DeviceError> {
        self.check(0, 0)?;
        if flags.nowait {
            let idle = self.volume().is_synced() && self.core.queue.is_flushed();
            return if idle {
                Ok(())
            } else {
                Err(DeviceError::WouldBlock)
            };
        }
        let seq = self.core.queue.barrier();
        self.core.make_durable(self.volume(), seq)?;
        self.core.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64, flags: RequestFlags) -> Result<(), DeviceError> {
        self.clear(offset, length, Kind::Discard, true, flags)
    }

    fn zero(&self, offset: u64, length: u64, flags: RequestFlags) -> Result<(), DeviceError> {
        self.clear(offset, length, Kind::Zero, !flags.no_hole, flags)
    }

    fn allocation(
        &self,
        offset: u64,
        length: u64,
        each: &mut dyn FnMut(Allocation) -> bool,
    ) -> Result<(), DeviceError> {
        let end = self.check(offset, length)?;
        let mut at = offset;
        while at < end {
            let run = self
                .volume()
                .backing
                .run(at)
                .map_err(|error| device_error(&error))?;
            let length = run.length.min(end - at);
            if length == 0
                || !each(Allocation {
                    length,
                    hole: run.hole,
                    zero: run.hole,
                })
            {
                break;
            }
            at += length;
        }
        Ok(())
    }
}
