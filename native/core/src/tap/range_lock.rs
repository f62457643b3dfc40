//! Range lock of one volume: one bit a block, modulo a window of 256 MiB.
//!
//! A writer holds the bits of its blocks from before its seq is taken until its backing write has
//! returned. Without a conflict that is one atomic operation per 64 blocks and no system call.
//! Two ranges 256 MiB apart may share bits: that costs a wait, never correctness.
//!
//! Bits are taken in ascending order, keeping what was got, so waiters cannot deadlock and a long
//! range is not starved by short ones. (An interval tree behind a mutex was rejected: it is one
//! more serial point a write.)

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::{Condvar, Mutex};

/// Bits of the window: 65,536 blocks of 4 KiB.
const WINDOW: u64 = 65_536;
const WORDS: usize = 1024;
/// Looks at a held bit before the thread sleeps: a page-cache write takes about a microsecond.
const SPINS: u32 = 128;

const _: () = assert!(WINDOW == WORDS as u64 * 64);

#[derive(Debug)]
pub struct RangeLock {
    words: Box<[AtomicU64]>,
    /// Threads that sleep or are about to; a releaser that sees none makes no system call.
    waiters: AtomicUsize,
    park: Mutex<()>,
    wake: Condvar,
}

/// Blocks held; dropping it lets them go.
#[derive(Debug)]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    start: u64,
    blocks: u64,
}

impl Default for RangeLock {
    fn default() -> Self {
        Self {
            words: (0..WORDS).map(|_| AtomicU64::new(0)).collect(),
            waiters: AtomicUsize::new(0),
            park: Mutex::new(()),
            wake: Condvar::new(),
        }
    }
}

/// Calls `each(word, mask)` for the words of a range, ascending.
fn for_words(start: u64, blocks: u64, mut each: impl FnMut(usize, u64) -> bool) -> bool {
    let mut run = |from: u64, to: u64| {
        let mut bit = from;
        while bit < to {
            let word = bit / 64;
            let low = bit % 64;
            let count = (64 - low).min(to - bit);
            let mask = (u64::MAX >> (64 - count)) << low;
            let index = usize::try_from(word).expect("invariant: word index below WORDS");
            if !each(index, mask) {
                return false;
            }
            bit += count;
        }
        true
    };
    if blocks >= WINDOW {
        return run(0, WINDOW);
    }
    let first = start % WINDOW;
    let end = first + blocks;
    if end <= WINDOW {
        run(first, end)
    } else {
        run(0, end - WINDOW) && run(first, WINDOW)
    }
}

impl RangeLock {
    /// Takes the blocks, waiting for whoever holds them.
    pub fn lock(&self, start: u64, blocks: u64) -> RangeGuard<'_> {
        for_words(start, blocks, |word, mask| {
            self.take_word(word, mask);
            true
        });
        RangeGuard {
            lock: self,
            start,
            blocks,
        }
    }

    /// Takes the blocks if all are free.
    pub fn try_lock(&self, start: u64, blocks: u64) -> Option<RangeGuard<'_>> {
        let mut taken = 0u64;
        let all = for_words(start, blocks, |index, mask| {
            let word = &self.words[index];
            let free = word
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| {
                    (old & mask == 0).then_some(old | mask)
                })
                .is_ok();
            taken += u64::from(free);
            free
        });
        if all {
            return Some(RangeGuard {
                lock: self,
                start,
                blocks,
            });
        }
        let mut left = taken;
        for_words(start, blocks, |index, mask| {
            if left == 0 {
                return false;
            }
            left -= 1;
            self.words[index].fetch_and(!mask, Ordering::SeqCst);
            true
        });
        self.wake_waiters();
        None
    }

    fn take_word(&self, index: usize, mut want: u64) {
        let word = &self.words[index];
        while want != 0 {
            let old = word.load(Ordering::SeqCst);
            let held = old & want;
            // Bits below the lowest held one: what may be taken without breaking the order.
            let take = if held == 0 {
                want
            } else {
                want & (lowest(held) - 1)
            };
            if take == 0 {
                self.wait_for(word, lowest(held));
            } else if word
                .compare_exchange(old, old | take, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
            {
                want &= !take;
            }
        }
    }

    fn wait_for(&self, word: &AtomicU64, bit: u64) {
        for _ in 0..SPINS {
            if word.load(Ordering::SeqCst) & bit == 0 {
                return;
            }
            std::hint::spin_loop();
        }
        let mut park = self.park.lock();
        // Announced before the last look: the releaser clears the bit before it looks for waiters.
        self.waiters.fetch_add(1, Ordering::SeqCst);
        while word.load(Ordering::SeqCst) & bit != 0 {
            self.wake.wait(&mut park);
        }
        self.waiters.fetch_sub(1, Ordering::SeqCst);
    }

    fn wake_waiters(&self) {
        if self.waiters.load(Ordering::SeqCst) > 0 {
            let _park = self.park.lock();
            self.wake.notify_all();
        }
    }
}

fn lowest(bits: u64) -> u64 {
    bits & bits.wrapping_neg()
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        for_words(self.start, self.blocks, |index, mask| {
            self.lock.words[index].fetch_and(!mask, Ordering::SeqCst);
            true
        });
        self.lock.wake_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    use super::*;

    #[test]
    fn overlapping_ranges_exclude_and_others_do_not() {
        let lock = RangeLock::default();
        let held = lock.lock(10, 100);
        assert!(lock.try_lock(109, 1).is_none());
        assert!(lock.try_lock(0, 11).is_none());
        let beside = lock.try_lock(110, 500).expect("free");
        let before = lock.try_lock(0, 10).expect("free");
        drop((held, beside, before));
        assert!(lock.try_lock(0, WINDOW).is_some());
        assert!(
            lock.words
                .iter()
                .all(|word| word.load(Ordering::SeqCst) == 0)
        );
    }

    #[test]
    fn failed_try_leaves_nothing_held() {
        let lock = RangeLock::default();
        let held = lock.lock(1000, 1);
        assert!(lock.try_lock(0, 2000).is_none());
        drop(held);
        assert!(
            lock.words
                .iter()
                .all(|word| word.load(Ordering::SeqCst) == 0)
        );
    }

    #[test]
    fn window_wraps_and_whole_volume_takes_all() {
        let lock = RangeLock::default();
        let held = lock.lock(WINDOW - 1, 2);
        assert!(lock.try_lock(0, 1).is_none());
        assert!(lock.try_lock(WINDOW - 1, 1).is_none());
        assert!(lock.try_lock(1, 1).is_some());
        drop(held);
        let all = lock.lock(77, 1 << 40);
        assert!(lock.try_lock(5, 1).is_none());
        drop(all);
    }

    #[test]
    fn waiter_sleeps_until_release() {
        let lock = RangeLock::default();
        let held = lock.lock(0, 4);
        let got = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _guard = lock.lock(3, 64);
                got.store(true, Ordering::SeqCst);
            });
            std::thread::sleep(Duration::from_millis(30));
            assert!(!got.load(Ordering::SeqCst));
            drop(held);
        });
        assert!(got.load(Ordering::SeqCst));
    }

    #[test]
    fn ranges_that_cross_do_not_deadlock_and_exclude() {
        let lock = RangeLock::default();
        let owners: Vec<AtomicUsize> = (0..256).map(|_| AtomicUsize::new(0)).collect();
        std::thread::scope(|scope| {
            for thread in 1..=4usize {
                let (lock, owners) = (&lock, &owners);
                scope.spawn(move || {
                    let mut random = thread as u64 * 7919;
                    for _ in 0..3000 {
                        random = random
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1);
                        let start = (random >> 33) % 200;
                        let blocks = (random >> 50) % 56 + 1;
                        let _guard = lock.lock(start, blocks);
                        let whole = |block| usize::try_from(block).unwrap();
                        let range = whole(start)..whole(start + blocks);
                        for owner in &owners[range.clone()] {
                            assert_eq!(owner.swap(thread, Ordering::SeqCst), 0);
                        }
                        for owner in &owners[range] {
                            assert_eq!(owner.swap(0, Ordering::SeqCst), thread);
                        }
                    }
                });
            }
        });
    }
}
