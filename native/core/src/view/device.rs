//! The block device of one volume of a view.

use std::sync::Arc;

use super::cells::CellReader;
use super::overlay::Overlay;
use super::presence::State;
use crate::constants::BLOCK_SIZE;
use crate::device::{Allocation, BlockDevice, DeviceError, DeviceInfo, RequestFlags};
use crate::index::Version;
use crate::types::{BlockIndex, Seq, VolumeIndex};

const BLOCK: u64 = BLOCK_SIZE as u64;

#[derive(Debug)]
pub struct ViewDevice {
    cells: Arc<CellReader>,
    volume: VolumeIndex,
    /// Bytes; the last block may be partial.
    size: u64,
    seq: Seq,
    overlay: Option<Overlay>,
}

impl ViewDevice {
    pub fn new(
        cells: Arc<CellReader>,
        volume: VolumeIndex,
        size: u64,
        seq: Seq,
        overlay: Option<Overlay>,
    ) -> Self {
        Self {
            cells,
            volume,
            size,
            seq,
            overlay,
        }
    }

    /// Checks a range and returns the byte behind it.
    fn range(&self, offset: u64, length: u64) -> Result<u64, DeviceError> {
        let end = offset.checked_add(length).filter(|end| *end <= self.size);
        end.ok_or(DeviceError::OutOfRange)
    }

    /// What follows may take a disk's time or wait for another request.
    fn may_wait(flags: RequestFlags) -> Result<(), DeviceError> {
        if flags.nowait {
            Err(DeviceError::WouldBlock)
        } else {
            Ok(())
        }
    }

    fn layer(&self) -> Result<&Overlay, DeviceError> {
        self.overlay.as_ref().ok_or(DeviceError::ReadOnly)
    }

    /// What the overlay has of the blocks from `block` on.
    fn state(&self, block: u64, max: u64) -> (State, u64) {
        self.overlay
            .as_ref()
            .map_or((State::Below, max), |overlay| overlay.run(block, max))
    }

    fn read_blocks(
        &self,
        block: BlockIndex,
        buffer: &mut [u8],
        nowait: bool,
    ) -> Result<(), DeviceError> {
        if !nowait {
            return self.cells.read(self.volume, block, self.seq, buffer);
        }
        let done = self.cells.read_cached(self.volume, block, self.seq, buffer);
        if done {
            Ok(())
        } else {
            Err(DeviceError::WouldBlock)
        }
    }

    /// Reads from history, at any alignment.
    fn read_below(&self, buffer: &mut [u8], offset: u64, nowait: bool) -> Result<(), DeviceError> {
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let (block, skip) = (BlockIndex(at / BLOCK), to_usize(at % BLOCK));
            let filled = if skip == 0 && rest.len() >= BLOCK_SIZE {
                let whole = rest.len() / BLOCK_SIZE * BLOCK_SIZE;
                self.read_blocks(block, &mut rest[..whole], nowait)?;
                whole
            } else {
                let mut bounce = [0u8; BLOCK_SIZE];
                self.read_blocks(block, &mut bounce, nowait)?;
                let count = rest.len().min(BLOCK_SIZE - skip);
                rest[..count].copy_from_slice(&bounce[skip..skip + count]);
                count
            };
            at += filled as u64;
            rest = &mut rest[filled..];
        }
        Ok(())
    }

    /// Zeroes a range: partial blocks by writing, whole ones by their state.
    fn clear(&self, offset: u64, length: u64, state: State) -> Result<(), DeviceError> {
        let end = self.range(offset, length)?;
        let overlay = self.layer()?;
        let first = offset.div_ceil(BLOCK);
        // The volume's last block is whole when everything that exists of it is in the range.
        let behind = if end == self.size {
            end.div_ceil(BLOCK)
        } else {
            end / BLOCK
        };
        if first >= behind {
            let piece = vec![0u8; to_usize(length)];
            return self.write_to(overlay, &piece, offset);
        }
        let zeroes = [0u8; BLOCK_SIZE];
        self.write_to(overlay, &zeroes[..to_usize(first * BLOCK - offset)], offset)?;
        overlay.clear(first, behind - first, state)?;
        let tail = end.saturating_sub(behind * BLOCK);
        self.write_to(overlay, &zeroes[..to_usize(tail)], behind * BLOCK)
    }

    fn write_to(&self, overlay: &Overlay, data: &[u8], offset: u64) -> Result<(), DeviceError> {
        overlay.write(data, offset, &mut |block, buffer| {
            self.read_block(block, buffer)
        })
    }

    fn read_block(&self, block: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        self.read_blocks(BlockIndex(block), buffer, false)
    }

    fn finish(&self, flags: RequestFlags) -> Result<(), DeviceError> {
        if flags.fua {
            self.layer()?.flush()
        } else {
            Ok(())
        }
    }
}

impl BlockDevice for ViewDevice {
    fn info(&self) -> DeviceInfo {
        // One overlay serves all connections.
        DeviceInfo {
            size: self.size,
            read_only: self.overlay.is_none(),
            multi_conn: true,
        }
    }

    fn read(&self, buffer: &mut [u8], offset: u64, flags: RequestFlags) -> Result<(), DeviceError> {
        let end = self.range(offset, buffer.len() as u64)?;
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let block = at / BLOCK;
            let (state, run) = self.state(block, end.div_ceil(BLOCK) - block);
            let run_end = ((block + run) * BLOCK).min(end);
            let (part, behind) = rest.split_at_mut(to_usize(run_end - at));
            match (state, &self.overlay) {
                (State::Data, Some(overlay)) => {
                    Self::may_wait(flags)?;
                    overlay.read_data(part, at)?;
                }
                (State::Zero | State::Discarded, _) => part.fill(0),
                (State::Below | State::Data, _) => self.read_below(part, at, flags.nowait)?,
            }
            rest = behind;
            at = run_end;
        }
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64, flags: RequestFlags) -> Result<(), DeviceError> {
        let overlay = self.layer()?;
        self.range(offset, data.len() as u64)?;
        Self::may_wait(flags)?;
        self.write_to(overlay, data, offset)?;
        self.finish(flags)
    }

    fn flush(&self, flags: RequestFlags) -> Result<(), DeviceError> {
        let Some(overlay) = &self.overlay else {
            return Ok(());
        };
        Self::may_wait(flags)?;
        overlay.flush()
    }

    fn trim(&self, offset: u64, length: u64, flags: RequestFlags) -> Result<(), DeviceError> {
        self.layer()?;
        Self::may_wait(flags)?;
        self.clear(offset, length, State::Discarded)?;
        self.finish(flags)
    }

    fn zero(&self, offset: u64, length: u64, flags: RequestFlags) -> Result<(), DeviceError> {
        let overlay = self.layer()?;
        self.range(offset, length)?;
        Self::may_wait(flags)?;
        if flags.no_hole {
            let complete = &mut |block: u64, buffer: &mut [u8]| self.read_block(block, buffer);
            overlay.write_zeroes(offset, length, complete)?;
        } else {
            self.clear(offset, length, State::Zero)?;
        }
        self.finish(flags)
    }

    fn allocation(
        &self,
        offset: u64,
        length: u64,
        each: &mut dyn FnMut(Allocation) -> bool,
    ) -> Result<(), DeviceError> {
        let end = self.range(offset, length)?;
        let mut at = offset;
        while at < end {
            let block = at / BLOCK;
            let (state, run) = self.state(block, end.div_ceil(BLOCK) - block);
            let (hole, zero, blocks) = match state {
                State::Data => (false, false, run),
                State::Zero => (false, true, run),
                State::Discarded => (true, true, run),
                State::Below => {
                    let index = BlockIndex(block);
                    let (version, alike) = self.cells.version(self.volume, index, self.seq, run)?;
                    match version {
                        Version::Stored { .. } => (false, false, alike),
                        Version::Zero { seq: Seq(0) } | Version::Discarded { .. } => {
                            (true, true, alike)
                        }
                        Version::Zero { .. } => (false, true, alike),
                    }
                }
            };
            let run_end = ((block + blocks) * BLOCK).min(end);
            if !each(Allocation {
                length: run_end - at,
                hole,
                zero,
            }) {
                return Ok(());
            }
            at = run_end;
        }
        Ok(())
    }
}

fn to_usize(number: u64) -> usize {
    usize::try_from(number).expect("invariant: 64-bit host")
}
