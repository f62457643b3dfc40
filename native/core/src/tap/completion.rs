//! Contents of blocks that were last written in part: what the next partial write is completed
//! from, without asking the backing. Databases append to their logs in 512-byte steps.
//!
//! Written under the range lock of the block, so an entry is always the newest content. A whole
//! write drops the entry. Direct-mapped and small: 4 MiB a volume at most.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::constants::BLOCK_SIZE;

const SLOTS: u64 = 1024;
const EMPTY: u64 = u64::MAX;

#[derive(Debug)]
struct Slot {
    /// Block held, or EMPTY. Changed only with `content` locked; read without, by holders of the
    /// block's range, who alone could make it their block.
    block: AtomicU64,
    content: Mutex<Option<Box<[u8; BLOCK_SIZE]>>>,
}

#[derive(Debug)]
pub struct CompletionCache {
    slots: Box<[Slot]>,
}

impl Default for CompletionCache {
    fn default() -> Self {
        let slot = |_| Slot {
            block: AtomicU64::new(EMPTY),
            content: Mutex::new(None),
        };
        Self {
            slots: (0..SLOTS).map(slot).collect(),
        }
    }
}

impl CompletionCache {
    fn slot(&self, block: u64) -> &Slot {
        let index = usize::try_from(block % SLOTS).expect("invariant: below SLOTS");
        &self.slots[index]
    }

    /// Copies the block's content into `out` if it is held. The caller holds the block's range.
    pub fn get(&self, block: u64, out: &mut [u8; BLOCK_SIZE]) -> bool {
        let slot = self.slot(block);
        if slot.block.load(Ordering::Acquire) != block {
            return false;
        }
        let content = slot.content.lock();
        match content.as_ref() {
            Some(content) if slot.block.load(Ordering::Acquire) == block => {
                out.copy_from_slice(&content[..]);
                true
            }
            _ => false,
        }
    }

    /// Keeps the block's newest content. The caller holds the block's range.
    pub fn put(&self, block: u64, content: &[u8; BLOCK_SIZE]) {
        let slot = self.slot(block);
        let mut held = slot.content.lock();
        held.get_or_insert_with(|| Box::new([0; BLOCK_SIZE]))
            .copy_from_slice(content);
        slot.block.store(block, Ordering::Release);
    }

    /// Drops blocks `[start, start + blocks)`. The caller holds their range.
    pub fn remove(&self, start: u64, blocks: u64) {
        let range = start..start + blocks;
        let drop_if_inside = |slot: &Slot| {
            if range.contains(&slot.block.load(Ordering::Acquire)) {
                let _content = slot.content.lock();
                if range.contains(&slot.block.load(Ordering::Acquire)) {
                    slot.block.store(EMPTY, Ordering::Release);
                }
            }
        };
        if blocks < SLOTS {
            (start..start + blocks).for_each(|block| drop_if_inside(self.slot(block)));
        } else {
            self.slots.iter().for_each(drop_if_inside);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_the_newest_and_forgets_what_was_overwritten() {
        let cache = CompletionCache::default();
        let mut out = [0; BLOCK_SIZE];
        assert!(!cache.get(5, &mut out));
        cache.put(5, &[7; BLOCK_SIZE]);
        assert!(cache.get(5, &mut out) && out == [7; BLOCK_SIZE]);
        cache.put(5 + SLOTS, &[8; BLOCK_SIZE]);
        assert!(!cache.get(5, &mut out));
        cache.remove(0, SLOTS + 5);
        assert!(cache.get(5 + SLOTS, &mut out));
        cache.remove(0, SLOTS + 6);
        assert!(!cache.get(5 + SLOTS, &mut out));
        cache.put(9, &[1; BLOCK_SIZE]);
        cache.remove(9, 1);
        assert!(!cache.get(9, &mut out));
    }
}
