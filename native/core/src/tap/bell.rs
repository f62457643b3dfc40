//! Wakes one background thread; rings before the wait are not lost.

use std::time::Duration;

use parking_lot::{Condvar, Mutex};

#[derive(Debug, Default)]
pub struct Bell {
    rung: Mutex<bool>,
    wake: Condvar,
}

impl Bell {
    pub fn ring(&self) {
        *self.rung.lock() = true;
        self.wake.notify_one();
    }

    /// Waits for a ring, at most this long. Returns whether it rang.
    pub fn wait(&self, timeout: Duration) -> bool {
        let mut rung = self.rung.lock();
        if !*rung {
            self.wake.wait_for(&mut rung, timeout);
        }
        std::mem::take(&mut *rung)
    }
}
