//! Sets of regions that many threads change at once.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::constants::REGION_BYTES;

/// Bits of 1 MiB regions, all operations sequentially consistent: the checkpoint's proof needs it.
#[derive(Debug)]
pub struct AtomicBitmap {
    words: Box<[AtomicU64]>,
    bits: u64,
}

/// Regions of a volume of `size` bytes.
pub fn regions_of(size: u64) -> u64 {
    size.div_ceil(REGION_BYTES)
}

fn word_of(bit: u64) -> usize {
    usize::try_from(bit / 64).expect("invariant: a bitmap fits in memory")
}

/// Words and masks of bits `[first, end)`.
fn masks(first: u64, end: u64) -> impl Iterator<Item = (usize, u64)> {
    let mut bit = first;
    std::iter::from_fn(move || {
        (bit < end).then(|| {
            let low = bit % 64;
            let count = (64 - low).min(end - bit);
            let item = (word_of(bit), (u64::MAX >> (64 - count)) << low);
            bit += count;
            item
        })
    })
}

impl AtomicBitmap {
    pub fn new(bits: u64) -> Self {
        let words = word_of(bits.next_multiple_of(64));
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            bits,
        }
    }

    pub fn bits(&self) -> u64 {
        self.bits
    }

    pub fn words(&self) -> usize {
        self.words.len()
    }

    pub fn get(&self, bit: u64) -> bool {
        self.words[word_of(bit)].load(Ordering::SeqCst) >> (bit % 64) & 1 == 1
    }

    pub fn word(&self, word: usize) -> u64 {
        self.words[word].load(Ordering::SeqCst)
    }

    /// Whether all bits of `[first, end)` are set.
    pub fn all(&self, first: u64, end: u64) -> bool {
        masks(first, end).all(|(word, mask)| self.word(word) & mask == mask)
    }

    /// Sets `[first, end)`; returns how many were not set before. Writes only what changes, so that
    /// the line of a hot region stays shared between the processors.
    pub fn set(&self, first: u64, end: u64) -> u64 {
        let end = end.min(self.bits);
        let mut fresh = 0;
        for (word, mask) in masks(first, end) {
            if self.word(word) & mask != mask {
                let old = self.words[word].fetch_or(mask, Ordering::SeqCst);
                fresh += u64::from((mask & !old).count_ones());
            }
        }
        fresh
    }

    /// Clears `[first, end)`; returns how many were set.
    pub fn clear(&self, first: u64, end: u64) -> u64 {
        let end = end.min(self.bits);
        masks(first, end)
            .map(|(word, mask)| {
                let old = self.words[word].fetch_and(!mask, Ordering::SeqCst);
                u64::from((mask & old).count_ones())
            })
            .sum()
    }

    pub fn set_word(&self, word: usize, mask: u64) {
        self.words[word].fetch_or(mask, Ordering::SeqCst);
    }

    pub fn clear_word(&self, word: usize, mask: u64) {
        self.words[word].fetch_and(!mask, Ordering::SeqCst);
    }

    /// Takes and clears a word.
    pub fn take_word(&self, word: usize) -> u64 {
        self.words[word].swap(0, Ordering::SeqCst)
    }

    pub fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.load(Ordering::SeqCst).count_ones()))
            .sum()
    }

    /// The first set bit at or behind `from`.
    pub fn next_set(&self, from: u64) -> Option<u64> {
        if from >= self.bits {
            return None;
        }
        let mut word = word_of(from);
        let mut bits = self.word(word) & (u64::MAX << (from % 64));
        loop {
            if bits != 0 {
                return Some(word as u64 * 64 + u64::from(bits.trailing_zeros()));
            }
            word += 1;
            if word == self.words.len() {
                return None;
            }
            bits = self.word(word);
        }
    }

    /// Length of the run of set bits at `first`, at most `limit`.
    pub fn run(&self, first: u64, limit: u64) -> u64 {
        let end = self.bits.min(first + limit);
        (first..end).take_while(|bit| self.get(*bit)).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_across_words() {
        let map = AtomicBitmap::new(200);
        assert_eq!(map.set(60, 140), 80);
        assert_eq!(map.set(0, 61), 60);
        assert!(map.all(0, 140) && !map.all(0, 141) && map.get(139) && !map.get(140));
        assert_eq!(map.count(), 140);
        assert_eq!(map.clear(1, 139), 138);
        assert_eq!(map.next_set(0), Some(0));
        assert_eq!(map.next_set(1), Some(139));
        assert_eq!(map.next_set(140), None);
        assert_eq!(map.set(190, 300), 10);
        assert_eq!(map.run(190, 100), 10);
        assert_eq!(map.run(190, 4), 4);
        assert_eq!(regions_of(1), 1);
        assert_eq!(regions_of((1 << 20) + 1), 2);
    }
}
