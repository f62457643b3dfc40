//! Cache of recent contents, in the order of the log. Owned by the assembling encoder thread.
//!
//! Answers one question: does this write store what the block already holds in this incarnation?
//! It is filled by records only and emptied with each incarnation. Eight-way sets, replaced by
//! re-reference intervals (RRIP): a block enters as "seldom used" and must be written again to
//! become "often used", so that one long sequential write does not push out what is rewritten.

use crate::constants::BLOCK_SIZE;
use crate::types::VolumeIndex;

const WAYS: usize = 8;
/// Re-reference values: 0 soon again .. 3 replace first.
const RRPV_NEW: u8 = 2;
const RRPV_OLD: u8 = 3;
/// Tag of an empty way; no volume and block make it (blocks have 38 bits).
const EMPTY: u64 = u64::MAX;

#[derive(Debug)]
pub struct ContentCache {
    tags: Vec<u64>,
    rrpv: Vec<u8>,
    /// Grows to its limit with use; untouched pages cost nothing.
    data: Vec<u8>,
    sets: usize,
    used: usize,
}

fn tag_of(volume: VolumeIndex, block: u64) -> u64 {
    u64::from(volume.0) << 48 | block
}

impl ContentCache {
    /// At most `bytes` of contents, rounded down to whole sets, at least one set.
    pub fn new(bytes: usize) -> Self {
        let sets = (bytes / (WAYS * BLOCK_SIZE)).max(1);
        Self {
            tags: vec![EMPTY; sets * WAYS],
            rrpv: vec![RRPV_OLD; sets * WAYS],
            data: vec![0; sets * WAYS * BLOCK_SIZE],
            sets,
            used: 0,
        }
    }

    fn set_of(&self, tag: u64) -> usize {
        let hash = tag.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // The high half times the number of sets: uniform without a division.
        usize::try_from(((hash >> 32) * self.sets as u64) >> 32)
            .expect("invariant: below the number of sets")
            * WAYS
    }

    fn find(&self, tag: u64) -> Option<usize> {
        let set = self.set_of(tag);
        let ways = &self.tags[set..set + WAYS];
        ways.iter()
            .position(|found| *found == tag)
            .map(|way| set + way)
    }

    /// Stores a block's newest content. Returns whether it is what the cache held for it.
    pub fn put(&mut self, volume: VolumeIndex, block: u64, content: &[u8]) -> bool {
        let tag = tag_of(volume, block);
        if let Some(way) = self.find(tag) {
            self.rrpv[way] = 0;
            let held = &mut self.data[way * BLOCK_SIZE..(way + 1) * BLOCK_SIZE];
            if held == content {
                return true;
            }
            held.copy_from_slice(content);
            return false;
        }
        let way = self.victim(self.set_of(tag));
        self.used += usize::from(self.tags[way] == EMPTY);
        self.tags[way] = tag;
        self.rrpv[way] = RRPV_NEW;
        self.data[way * BLOCK_SIZE..(way + 1) * BLOCK_SIZE].copy_from_slice(content);
        false
    }

    fn victim(&mut self, set: usize) -> usize {
        if let Some(way) = self.tags[set..set + WAYS]
            .iter()
            .position(|tag| *tag == EMPTY)
        {
            return set + way;
        }
        let ages = &mut self.rrpv[set..set + WAYS];
        let oldest = ages.iter().copied().max().unwrap_or(RRPV_OLD);
        let older_by = RRPV_OLD - oldest;
        for age in ages.iter_mut() {
            *age += older_by;
        }
        set + ages
            .iter()
            .position(|age| *age == RRPV_OLD)
            .expect("invariant: one was made oldest")
    }

    fn remove_way(&mut self, way: usize) {
        self.tags[way] = EMPTY;
        self.rrpv[way] = RRPV_OLD;
        self.used -= 1;
    }

    /// Forgets blocks `[start, start + blocks)`: they became zero.
    pub fn remove(&mut self, volume: VolumeIndex, start: u64, blocks: u64) {
        if self.used == 0 {
            return;
        }
        if blocks <= self.tags.len() as u64 {
            for block in start..start + blocks {
                if let Some(way) = self.find(tag_of(volume, block)) {
                    self.remove_way(way);
                }
            }
            return;
        }
        let range = tag_of(volume, start)..tag_of(volume, start + blocks);
        for way in 0..self.tags.len() {
            if range.contains(&self.tags[way]) {
                self.remove_way(way);
            }
        }
    }

    /// Forgets everything: a new incarnation begins.
    pub fn clear(&mut self) {
        if self.used > 0 {
            self.tags.fill(EMPTY);
            self.rrpv.fill(RRPV_OLD);
            self.used = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V: VolumeIndex = VolumeIndex(3);

    fn content(value: u64) -> Vec<u8> {
        value.to_le_bytes().repeat(BLOCK_SIZE / 8)
    }

    #[test]
    fn tells_same_from_different() {
        let mut cache = ContentCache::new(1 << 20);
        assert!(!cache.put(V, 7, &content(1)));
        assert!(cache.put(V, 7, &content(1)));
        assert!(!cache.put(VolumeIndex(4), 7, &content(1)));
        assert!(!cache.put(V, 7, &content(2)));
        assert!(!cache.put(V, 7, &content(1)));
        let mut last_byte = content(1);
        last_byte[BLOCK_SIZE - 1] ^= 1;
        assert!(!cache.put(V, 7, &last_byte));
    }

    #[test]
    fn removed_and_cleared_blocks_are_forgotten() {
        let mut cache = ContentCache::new(1 << 20);
        for block in 0..100 {
            cache.put(V, block, &content(block));
        }
        cache.remove(V, 10, 5);
        assert!(!cache.put(V, 10, &content(10)));
        assert!(cache.put(V, 15, &content(15)));
        cache.remove(V, 0, 1 << 38);
        assert_eq!(cache.used, 0);
        assert!(!cache.put(V, 50, &content(50)));
        cache.clear();
        assert!(!cache.put(V, 50, &content(50)));
    }

    #[test]
    fn stays_within_its_bound_and_never_lies() {
        let mut cache = ContentCache::new(64 * BLOCK_SIZE);
        let mut model = std::collections::HashMap::new();
        let mut random = 1u64;
        for _ in 0..20_000 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let (block, value) = ((random >> 40) % 500, (random >> 33) % 3);
            let same = cache.put(V, block, &content(value));
            assert!(!same || model.get(&block) == Some(&value));
            model.insert(block, value);
        }
        assert!(cache.used <= 64);
        assert_eq!(cache.data.len(), 64 * BLOCK_SIZE);
    }

    #[test]
    fn a_scan_does_not_push_out_what_is_rewritten() {
        let mut cache = ContentCache::new(512 * BLOCK_SIZE);
        for _ in 0..3 {
            for block in 0..128 {
                cache.put(V, block, &content(block));
            }
        }
        for block in 10_000..10_700 {
            cache.put(V, block, &content(block));
        }
        let kept = (0..128)
            .filter(|block| cache.put(V, *block, &content(*block)))
            .count();
        assert!(
            kept > 96,
            "{kept} of 128 survived a scan larger than the cache"
        );
    }
}
