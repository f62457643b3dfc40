//! The ordering point and the queue behind it.
//!
//! Under one short lock a record gets its seq, its time and its place in the encoder's queue; its
//! bytes are copied into the ring after the lock is gone and published by a flag. The entries are
//! in seq order and without holes but where a gap was; those that are not yet committed stay, so
//! that a failing spool can turn all of them into regions to copy.
//!
//! Full policy: writers wait while the encoder moves; after `stuck` without a commit, or when the
//! spool is full or failed, recording stops (a gap) and extents are remembered in the to-copy sets.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::bell::Bell;
use super::bitmap::AtomicBitmap;
use super::clock::{Clock, TimeSource};
use super::ring::Ring;
use crate::constants::{BLOCK_SIZE, REGION_BYTES, SEQ_RESERVE};
use crate::format::record::{Cause, RecordBody};
use crate::types::{Seq, TimeUs, VolumeIndex};

mod control;
mod drain;
mod state;

pub use state::QueueState;

/// Records that may wait.
pub const ENTRIES_MAX: usize = 32_768;
/// Of these, places kept for control records, which never wait.
const ENTRIES_CONTROL: usize = 4096;
/// Gaps whose lost records are told from one another; the oldest two become one.
const LOST_RANGES_MAX: usize = 64;
/// Records of one frame: its table stays far below the frame's limit.
const BATCH_RECORDS_MAX: usize = 8192;
/// `wake_blocks` while no encoder thread sleeps.
const AWAKE: u64 = u64::MAX;

/// What a record of data does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Write,
    Resync,
    Zero,
    Discard,
    Control,
}

impl Kind {
    pub fn has_payload(self) -> bool {
        matches!(self, Self::Write | Self::Resync)
    }
}

/// One record in the queue.
#[derive(Debug)]
pub struct Entry {
    pub seq: u64,
    pub time: u64,
    /// Boot clock when it was placed.
    queued: u64,
    pub kind: Kind,
    /// Position of the volume in the tap's list, not its index.
    pub slot: u16,
    pub start: u64,
    pub blocks: u64,
    /// Where its bytes are in the ring.
    pub offset: usize,
    /// Ring position behind its bytes; what is before is free once it is committed.
    ring_end: u64,
    index: u64,
    /// A new incarnation begins with this record.
    pub begin: bool,
    pub control: Option<Box<RecordBody>>,
}

/// A record that a caller wants to place.
#[derive(Debug, Clone, Copy)]
pub struct Want {
    pub kind: Kind,
    pub slot: u16,
    pub start: u64,
    pub blocks: u64,
    /// Regions that are no longer to be copied once this record is placed.
    pub copied: Option<(u64, u64)>,
}

/// Where a caller's records are.
#[derive(Debug)]
pub enum Placed<'a> {
    /// In the queue: copy the bytes, then publish.
    Recorded(Reservation<'a>),
    /// Only the extents were noted: a gap is open.
    ExtentsOnly,
}

/// Ring space of one or more consecutive records. Published when dropped, at the latest.
#[derive(Debug)]
pub struct Reservation<'a> {
    queue: &'a Queue,
    offset: usize,
    length: usize,
    filled: usize,
    first_index: u64,
    count: u64,
}

impl Reservation<'_> {
    /// Appends bytes to the part of the ring.
    pub fn write(&mut self, data: &[u8]) {
        assert!(
            self.filled + data.len() <= self.length,
            "a record is longer than its place"
        );
        self.queue.ring.write(self.offset + self.filled, data);
        self.filled += data.len();
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        // The place holds what was in the ring before: that must not become history.
        if std::thread::panicking() {
            std::process::abort();
        }
        for index in self.first_index..self.first_index + self.count {
            self.queue.published(index).store(true, Ordering::Release);
        }
    }
}

/// What stands between a write and history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Recording,
    ExtentsOnly,
}

/// A volume as the queue knows it.
#[derive(Debug)]
pub struct QueueVolume {
    pub index: VolumeIndex,
    pub name: String,
    pub size: u64,
    /// Regions whose content history does not have. Set and cleared under the queue's lock.
    pub to_copy: AtomicBitmap,
}

/// Limits that tests make smaller.
#[derive(Debug, Clone, Copy)]
pub struct QueueLimits {
    pub bytes: usize,
    pub frame_delay: Duration,
    pub stuck: Duration,
}

#[derive(Debug)]
pub struct Queue {
    state: Mutex<QueueState>,
    /// Encoder threads wait here for records,
    work: Condvar,
    /// writers for room or reserved numbers,
    room: Condvar,
    /// and flushes for the spool.
    spooled: Condvar,
    ring: Ring,
    published: Box<[AtomicBool]>,
    limits: QueueLimits,
    time: Arc<dyn TimeSource>,
    volumes: Arc<[QueueVolume]>,
    housekeeper: Arc<Bell>,
}

/// The request would have had to wait, or the tap has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    WouldBlock,
    Ended,
}

impl Queue {
    pub fn new(
        limits: QueueLimits,
        time: Arc<dyn TimeSource>,
        volumes: Arc<[QueueVolume]>,
        housekeeper: Arc<Bell>,
        clock: Clock,
        (next_seq, last_time): (Seq, TimeUs),
    ) -> Self {
        let copy_left = volumes.iter().map(|volume| volume.to_copy.count()).sum();
        let state = QueueState {
            next_seq: next_seq.0.max(1),
            last_time: last_time.0,
            clock,
            seq_limit: 0,
            time_limit: 0,
            entries: VecDeque::with_capacity(ENTRIES_MAX),
            taken: 0,
            next_index: 0,
            head: 0,
            tail: 0,
            waiting_blocks: 0,
            wake_blocks: AWAKE,
            urgent: 0,
            spooled: next_seq.0.max(1) - 1,
            lost: VecDeque::new(),
            lost_before: 0,
            mode: Mode::Recording,
            gap: None,
            in_span: None,
            span_seq: 0,
            span_time: 0,
            wants_numbers: false,
            copy_left,
            copy_total: copy_left,
            room_waiters: 0,
            progress: Instant::now(),
            barrier_due: false,
            rollover_due: false,
            closing: false,
            abandoned: false,
            writes: 0,
            write_bytes: 0,
            slowed: 0,
        };
        Self {
            state: Mutex::new(state),
            work: Condvar::new(),
            room: Condvar::new(),
            spooled: Condvar::new(),
            ring: Ring::new(limits.bytes),
            published: (0..ENTRIES_MAX).map(|_| AtomicBool::new(false)).collect(),
            limits,
            time,
            volumes,
            housekeeper,
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock()
    }

    pub fn volumes(&self) -> &Arc<[QueueVolume]> {
        &self.volumes
    }

    fn published(&self, index: u64) -> &AtomicBool {
        let place = usize::try_from(index % ENTRIES_MAX as u64).expect("invariant: below");
        &self.published[place]
    }

    /// Bytes of the ring in use.
    pub fn used_bytes(&self) -> u64 {
        let state = self.state.lock();
        state.head - state.tail
    }

    pub fn capacity(&self) -> u64 {
        self.ring.len() as u64
    }

    /// The ordering point. Gives consecutive seqs and times to `wants` and room for their payload
    /// in one step; the caller holds their ranges. Waits for room unless `nowait`.
    pub fn place(&self, wants: &[Want], bytes: u64, nowait: bool) -> Result<Placed<'_>, Refused> {
        let boot = self.time.boot_us();
        let blocks: u64 = wants
            .iter()
            .filter(|want| want.kind.has_payload())
            .map(|w| w.blocks)
            .sum();
        let length = usize::try_from(blocks).expect("invariant: at most a record") * BLOCK_SIZE;
        let mut state = self.state.lock();
        let mut waited = false;
        loop {
            if state.abandoned {
                return Err(Refused::Ended);
            }
            if state.mode == Mode::ExtentsOnly {
                self.note_extents(&mut state, wants, boot, bytes);
                return Ok(Placed::ExtentsOnly);
            }
            let reserved = state.reserved(wants.len() as u64, boot);
            if reserved && state.has_room(wants.len(), length, self.ring.len()) {
                break;
            }
            state.wants_numbers |= !reserved;
            if nowait {
                if !reserved {
                    drop(state);
                    self.housekeeper.ring();
                }
                return Err(Refused::WouldBlock);
            }
            state.slowed += u64::from(!waited);
            waited = true;
            self.wait_for_room(&mut state, reserved);
        }
        let left_before = state.seq_limit - state.next_seq;
        let skip = state.skip(length, self.ring.len());
        state.head += skip;
        let offset =
            usize::try_from(state.head % self.ring.len() as u64).expect("invariant: below");
        let first_index = state.next_index;
        let mut at = offset;
        for want in wants {
            let payload = if want.kind.has_payload() {
                want.blocks
            } else {
                0
            };
            let payload_bytes = payload * BLOCK_SIZE as u64;
            state.head += payload_bytes;
            let index = state.next_index;
            self.published(index).store(false, Ordering::Relaxed);
            state.push(want, boot, at, false, None);
            at += usize::try_from(payload_bytes).expect("invariant: at most a record");
            state.waiting_blocks += payload.max(1);
            if let Some((first, end)) = want.copied {
                let cleared = self.volumes[usize::from(want.slot)]
                    .to_copy
                    .clear(first, end);
                state.copy_left -= cleared;
            }
            if want.kind != Kind::Resync && want.copied.is_none() {
                state.writes += 1;
                state.barrier_due = true;
            }
        }
        state.write_bytes += bytes;
        let left = state.seq_limit - state.next_seq;
        let near_limit = left_before > SEQ_RESERVE / 2 && left <= SEQ_RESERVE / 2;
        let wake = state.wakes_encoder();
        drop(state);
        if wake {
            self.work.notify_one();
        }
        if near_limit {
            self.housekeeper.ring();
        }
        let count = wants.len() as u64;
        Ok(Placed::Recorded(Reservation {
            queue: self,
            offset,
            length,
            filled: 0,
            first_index,
            count,
        }))
    }

    /// Numbers a write that is not recorded and remembers its regions.
    fn note_extents(&self, state: &mut QueueState, wants: &[Want], boot: u64, bytes: u64) {
        for want in wants {
            // A copy that was not recorded leaves its regions to be copied: nothing is cleared.
            if want.copied.is_some() {
                continue;
            }
            state.mark(&self.volumes, want.slot, want.start, want.blocks);
            // What a failed write left on the backing: the write itself may be in history.
            if want.kind == Kind::Resync {
                continue;
            }
            state.next_seq += 1;
            state.last_time = state.clock.at(boot).max(state.last_time + 1);
            state.writes += 1;
        }
        state.write_bytes += bytes;
        if let Some(gap) = &mut state.gap {
            gap.bytes += bytes;
        }
    }

    fn wait_for_room(&self, state: &mut MutexGuard<'_, QueueState>, reserved: bool) {
        if !reserved {
            self.housekeeper.ring();
        }
        if state.wake_blocks != AWAKE {
            state.wake_blocks = AWAKE;
            self.work.notify_one();
        }
        let since = state.progress;
        let deadline = if reserved { since } else { Instant::now() } + self.limits.stuck;
        state.room_waiters += 1;
        let timeout = self.room.wait_until(state, deadline);
        state.room_waiters -= 1;
        if timeout.timed_out() && state.mode == Mode::Recording && state.progress == since {
            let cause = if reserved {
                Cause::EncoderStuck
            } else {
                Cause::SpoolFailed
            };
            self.open_gap(state, cause);
        }
    }

    pub fn last_seq(&self) -> Seq {
        Seq(self.state.lock().next_seq - 1)
    }

    /// Whether every record is in the spool and no write came since the last barrier.
    pub fn is_flushed(&self) -> bool {
        let state = self.state.lock();
        !state.barrier_due && (state.spooled + 1 >= state.next_seq || state.mode != Mode::Recording)
    }

    pub fn is_abandoned(&self) -> bool {
        self.state.lock().abandoned
    }

    /// Whether `count` more records may be numbered now.
    pub fn has_numbers(&self, count: u64) -> bool {
        let state = self.state.lock();
        state.reserved(count, self.time.boot_us())
    }

    /// Has the frame with `seq` closed at once.
    fn hurry(&self, state: &mut QueueState, seq: Seq) {
        state.urgent = state.urgent.max(seq.0);
        if state.wake_blocks != AWAKE {
            state.wake_blocks = AWAKE;
            self.work.notify_one();
        }
    }

    pub fn urge(&self, seq: Seq) {
        let mut state = self.state.lock();
        if state.spooled < seq.0 {
            self.hurry(&mut state, seq);
        }
    }

    /// Waits until every record up to `seq` is in the spool. `Ok(false)`: it is not and will not
    /// be waited for, a gap is open or has taken it.
    pub fn wait_spooled(&self, seq: Seq) -> Result<bool, Refused> {
        let mut state = self.state.lock();
        if state.spooled < seq.0 {
            self.hurry(&mut state, seq);
        }
        loop {
            if state.has_lost(seq.0) {
                return Ok(false);
            }
            if state.spooled >= seq.0 {
                return Ok(true);
            }
            if state.abandoned {
                return Err(Refused::Ended);
            }
            if state.mode == Mode::ExtentsOnly {
                return Ok(false);
            }
            let since = state.progress;
            // The encoder may have been idle: at least half the time counts from now.
            let half = self.limits.stuck / 2;
            let deadline = (since + self.limits.stuck).max(Instant::now() + half);
            let timeout = self.spooled.wait_until(&mut state, deadline);
            if timeout.timed_out() && state.progress == since && state.mode == Mode::Recording {
                self.open_gap(&mut state, Cause::EncoderStuck);
            }
        }
    }

    /// Numbers below these are durable now.
    pub fn set_limits(&self, seq_end: Seq, time_end: TimeUs) {
        let mut state = self.state.lock();
        state.seq_limit = seq_end.0;
        state.time_limit = time_end.0;
        state.wants_numbers = false;
        drop(state);
        self.room.notify_all();
    }

    /// No more records will come: the encoder threads empty the queue and end.
    pub fn close(&self) {
        self.state.lock().closing = true;
        self.work.notify_all();
    }

    /// Ends at once, leaving what is queued.
    pub fn abandon(&self) {
        self.state.lock().abandoned = true;
        self.work.notify_all();
        self.room.notify_all();
        self.spooled.notify_all();
    }
}

/// Regions that blocks `[start, start + blocks)` touch.
pub fn regions(start: u64, blocks: u64) -> (u64, u64) {
    let per_region = REGION_BYTES / BLOCK_SIZE as u64;
    (start / per_region, (start + blocks).div_ceil(per_region))
}
