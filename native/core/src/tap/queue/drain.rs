//! The encoder's end of the queue.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;

use super::{AWAKE, BATCH_RECORDS_MAX, Entry, Mode, Queue, QueueState};
use crate::constants::{BLOCK_SIZE, FRAME_BLOCKS_TARGET};

impl Queue {
    /// Takes the records of the next frame, waiting for them. False: the tap ends.
    pub fn take(&self, batch: &mut Vec<Entry>) -> bool {
        batch.clear();
        let mut misses = 0u32;
        let mut state = self.state.lock();
        loop {
            if state.abandoned {
                return false;
            }
            let Some(first) = state.entries.get(state.taken) else {
                if state.closing {
                    return false;
                }
                state.wake_blocks = 0;
                self.work.wait(&mut state);
                continue;
            };
            let queued = first.queued;
            let due = state.closing
                || state.waiting_blocks >= FRAME_BLOCKS_TARGET as u64
                || state.entries.len() - state.taken >= BATCH_RECORDS_MAX
                || state.urgent >= first.seq
                || first.seq < state.lost_before
                || state.room_waiters > 0;
            if !due {
                let age = self.time.boot_us().saturating_sub(queued);
                let delay = self.limits.frame_delay;
                let left = delay.saturating_sub(Duration::from_micros(age));
                if !left.is_zero() {
                    state.wake_blocks = FRAME_BLOCKS_TARGET as u64;
                    self.work.wait_for(&mut state, left);
                    state.wake_blocks = AWAKE;
                    continue;
                }
            }
            if self.take_ready(&mut state, batch) {
                return true;
            }
            // The first record is being copied into the ring at this moment.
            misses += 1;
            MutexGuard::unlocked(&mut state, || {
                if misses < 100 {
                    std::thread::yield_now();
                } else {
                    std::thread::sleep(Duration::from_micros(100));
                }
            });
        }
    }

    fn take_ready(&self, state: &mut QueueState, batch: &mut Vec<Entry>) -> bool {
        let mut blocks = 0;
        let mut next_seq = None;
        while blocks < FRAME_BLOCKS_TARGET as u64 && batch.len() < BATCH_RECORDS_MAX {
            let position = state.taken;
            let Some(entry) = state.entries.get_mut(position) else {
                break;
            };
            let continues = next_seq.is_none_or(|seq| seq == entry.seq && !entry.begin);
            if !continues || !self.published(entry.index).load(Ordering::Acquire) {
                break;
            }
            let payload = if entry.kind.has_payload() {
                entry.blocks
            } else {
                0
            };
            batch.push(Entry {
                control: entry.control.take(),
                ..*entry
            });
            next_seq = Some(entry.seq + 1);
            blocks += payload;
            state.taken += 1;
            state.waiting_blocks -= payload.max(1);
        }
        !batch.is_empty()
    }

    /// Bytes of a taken record.
    pub fn payload(&self, entry: &Entry) -> &[u8] {
        let blocks = usize::try_from(entry.blocks).expect("invariant: at most a record");
        self.ring.read(entry.offset, blocks * BLOCK_SIZE)
    }

    /// Consecutive bytes of the ring that belong to taken records.
    pub fn bytes(&self, offset: usize, length: usize) -> &[u8] {
        self.ring.read(offset, length)
    }

    /// Whether records from `seq` on were given up.
    pub fn is_lost(&self, seq: u64) -> bool {
        seq < self.state.lock().lost_before
    }

    /// The oldest `count` taken records leave the queue: they are in the spool, or lost.
    pub fn committed(&self, count: usize, in_spool: bool) {
        let mut state = self.state.lock();
        let mut last = None;
        for entry in state.entries.drain(..count) {
            last = Some((entry.seq, entry.ring_end));
        }
        state.taken -= count;
        if let Some((seq, ring_end)) = last {
            state.tail = ring_end;
            if in_spool {
                state.spooled = seq;
            }
        }
        if state.entries.is_empty() {
            state.tail = state.head;
        }
        state.progress = Instant::now();
        let wake_room = state.room_waiters > 0;
        let resume = state.mode == Mode::ExtentsOnly;
        drop(state);
        if wake_room {
            self.room.notify_all();
        }
        self.spooled.notify_all();
        if resume {
            self.housekeeper.ring();
        }
    }
}
