//! Grace period: lets the checkpoint wait until every request begun before it has ended.
//!
//! Requests count themselves in one of two counters, chosen by the parity of the epoch; the
//! checkpoint moves the epoch on and waits for the old counter to reach zero.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

/// A counter with a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counter(AtomicUsize);

#[derive(Debug, Default)]
pub struct Grace {
    epoch: AtomicUsize,
    active: [Counter; 2],
    one_at_a_time: Mutex<()>,
}

/// A request under way.
#[derive(Debug)]
pub struct GraceGuard<'a>(&'a AtomicUsize);

impl Grace {
    pub fn enter(&self) -> GraceGuard<'_> {
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let counter = &self.active[epoch & 1].0;
            counter.fetch_add(1, Ordering::SeqCst);
            // The epoch may have moved in between; then nobody waits for this counter any more.
            if self.epoch.load(Ordering::SeqCst) & 1 == epoch & 1 {
                return GraceGuard(counter);
            }
            counter.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Waits until every request that entered before the call has ended, or `give_up` says so.
    /// Returns whether they all have.
    pub fn wait(&self, mut give_up: impl FnMut() -> bool) -> bool {
        let _turn = self.one_at_a_time.lock();
        // A wait that was given up may have left requests in the other counter: it goes first.
        for _ in 0..2 {
            let old = self.epoch.fetch_add(1, Ordering::SeqCst) & 1;
            while self.active[old].0.load(Ordering::SeqCst) != 0 {
                if give_up() {
                    return false;
                }
                std::thread::sleep(Duration::from_micros(500));
            }
        }
        true
    }
}

impl Drop for GraceGuard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn waits_for_those_before_and_not_for_those_after() {
        let grace = Grace::default();
        let before = grace.enter();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert!(grace.wait(|| false));
                done.store(true, Ordering::SeqCst);
            });
            std::thread::sleep(Duration::from_millis(20));
            assert!(!done.load(Ordering::SeqCst));
            drop(before);
        });
        assert!(done.load(Ordering::SeqCst));
    }

    #[test]
    fn given_up_wait_is_not_forgotten() {
        let grace = Grace::default();
        let before = grace.enter();
        assert!(!grace.wait(|| true));
        assert!(!grace.wait(|| true));
        drop(before);
        assert!(grace.wait(|| false));
    }
}
