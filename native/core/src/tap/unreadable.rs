//! Regions of a backing that cannot be read whole.
//!
//! The copier takes what it can get of them, block by block, names the rest and goes on: one bad
//! sector must not keep all later recovery points away. Such a region stays dirty, so that the next
//! start copies it again, and is tried again while the tap runs.
//!
//! What the end of a span then means: history equals the backing wherever the backing can be read.
//! In the named blocks, which the source itself cannot read, it shows what it last knew, or zeroes.
//! A GAP record just before the SPAN_END says how many bytes that are. More than a few bad places
//! are a device that fails: then the span stays open.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use super::bitmap::{AtomicBitmap, regions_of};
use super::core::{TapCore, read_blocks};
use super::queue::{Kind, Placed, Want};
use super::volume::Volume;
use crate::constants::{BLOCK_SIZE, CELL_BLOCKS, REGION_BYTES, UNREADABLE_REGIONS_MAX};

const REGION_BLOCKS: u64 = REGION_BYTES / BLOCK_SIZE as u64;

/// The regions of one volume that the last copy did not get whole.
#[derive(Debug)]
pub struct Unreadable {
    regions: AtomicBitmap,
    /// Bytes that are missing, by region.
    missing: Mutex<BTreeMap<u64, u64>>,
}

impl Unreadable {
    pub fn new(size: u64) -> Self {
        Self {
            regions: AtomicBitmap::new(regions_of(size)),
            missing: Mutex::default(),
        }
    }

    /// Regions that a checkpoint must leave dirty.
    pub fn word(&self, word: usize) -> u64 {
        self.regions.word(word)
    }

    pub fn bytes(&self) -> u64 {
        self.missing.lock().values().sum()
    }

    /// Whether the copier may pass over one more region.
    pub fn has_room(&self, region: u64) -> bool {
        self.regions.get(region) || self.regions.count() < UNREADABLE_REGIONS_MAX
    }

    /// Regions `[first, end)` were copied whole.
    pub fn forget(&self, first: u64, end: u64) {
        if self.regions.clear(first, end) > 0 {
            self.missing
                .lock()
                .retain(|region, _| !(first..end).contains(region));
        }
    }
}

/// Emits what can be read of a region that cannot be read in one piece. False: recording stopped
/// meanwhile, and the region is still to be copied.
pub fn copy_around(core: &TapCore, volume: &Volume, region: u64) -> bool {
    let slot = usize::from(volume.slot);
    // First, for it keeps a checkpoint from clearing the region; then the mark of the copier goes,
    // so that one that is set meanwhile stays.
    volume.unreadable.regions.set(region, region + 1);
    unmark(core, slot, region);
    let start = region * REGION_BLOCKS;
    let end = (start + REGION_BLOCKS).min(volume.blocks());
    let mut missing: Vec<(u64, u64)> = Vec::new();
    let mut at = start;
    while at < end {
        let blocks = (end - at).min(CELL_BLOCKS as u64);
        if !copy_piece(core, volume, at, blocks, &mut missing) {
            let mut state = core.queue.lock();
            core.queue
                .mark_regions(&mut state, slot, region, region + 1);
            return false;
        }
        at += blocks;
    }
    if missing.is_empty() {
        volume.unreadable.forget(region, region + 1);
        return true;
    }
    for (start, blocks) in &missing {
        let (name, block) = (&volume.config.name, BLOCK_SIZE as u64);
        core.notice(format!(
            "volume {name}: {} bytes at {} cannot be read; history does not have them",
            blocks * block,
            start * block
        ));
    }
    let blocks: u64 = missing.iter().map(|(_, blocks)| blocks).sum();
    let bytes = blocks * BLOCK_SIZE as u64;
    volume.unreadable.missing.lock().insert(region, bytes);
    true
}

fn unmark(core: &TapCore, slot: usize, region: u64) {
    let mut state = core.queue.lock();
    let cleared = core.queue.volumes()[slot].to_copy.clear(region, region + 1);
    state.copy_left -= cleared;
}

/// Emits blocks under their range lock; adds those that cannot be read to `missing`.
fn copy_piece(
    core: &TapCore,
    volume: &Volume,
    start: u64,
    blocks: u64,
    missing: &mut Vec<(u64, u64)>,
) -> bool {
    let _section = core.grace.enter();
    if core.is_stopping() {
        return false;
    }
    let region = start / REGION_BLOCKS;
    volume.intent.touch(region, region + 1, false);
    let _range = volume.ranges.lock(start, blocks);
    if let Ok(content) = read_blocks(&*volume.backing, start, blocks) {
        return place(core, volume, start, &content);
    }
    for block in start..start + blocks {
        if let Ok(content) = read_blocks(&*volume.backing, block, 1) {
            if !place(core, volume, block, &content) {
                return false;
            }
            continue;
        }
        match missing.last_mut() {
            Some((first, count)) if *first + *count == block => *count += 1,
            _ => missing.push((block, 1)),
        }
    }
    true
}

fn place(core: &TapCore, volume: &Volume, start: u64, content: &[u8]) -> bool {
    let zero = content.iter().all(|byte| *byte == 0);
    let region = start / REGION_BLOCKS;
    let want = Want {
        kind: if zero { Kind::Zero } else { Kind::Resync },
        slot: volume.slot,
        start,
        blocks: (content.len() / BLOCK_SIZE) as u64,
        // Part of a copy; the region's mark went before.
        copied: Some((region, region)),
    };
    match core.queue.place(&[want], 0, false) {
        Ok(Placed::Recorded(mut place)) => {
            if !zero {
                place.write(content);
            }
            true
        }
        Ok(Placed::ExtentsOnly) | Err(_) => false,
    }
}

/// Has regions copied that can be read whole again; whether there are any. Without a span: one is
/// opened for them.
pub fn try_again(core: &TapCore) -> bool {
    let mut any = false;
    for volume in &core.volumes {
        let mut from = 0;
        while let Some(region) = volume.unreadable.regions.next_set(from) {
            from = region + 1;
            let start = region * REGION_BLOCKS;
            let blocks = REGION_BLOCKS.min(volume.blocks() - start);
            if core.is_stopping() || read_blocks(&*volume.backing, start, blocks).is_err() {
                continue;
            }
            core.notice(format!(
                "volume {}: {blocks} blocks at {} can be read again; they are copied",
                volume.config.name,
                start * BLOCK_SIZE as u64
            ));
            let mut state = core.queue.lock();
            let slot = usize::from(volume.slot);
            core.queue.mark_regions(&mut state, slot, region, from);
            drop(state);
            core.housekeeper.ring();
            any = true;
        }
    }
    any
}
