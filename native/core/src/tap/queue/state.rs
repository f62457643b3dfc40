//! What the queue's lock protects.

use std::collections::VecDeque;
use std::time::Instant;

use super::{
    AWAKE, ENTRIES_CONTROL, ENTRIES_MAX, Entry, LOST_RANGES_MAX, Mode, QueueVolume, Want, regions,
};
use crate::format::record::{Cause, RecordBody};
use crate::tap::clock::Clock;
use crate::tap::state::OpenGap;
use crate::types::{Seq, TimeUs};

#[derive(Debug)]
#[allow(clippy::struct_excessive_bools)] // Independent flags, no state machine in disguise.
pub struct QueueState {
    pub next_seq: u64,
    pub last_time: u64,
    pub clock: Clock,
    /// Seq and time may be used below these: what is durable in the state file.
    pub seq_limit: u64,
    pub time_limit: u64,
    pub(super) entries: VecDeque<Entry>,
    /// Entries at the front that an encoder thread has taken.
    pub(super) taken: usize,
    pub(super) next_index: u64,
    pub(super) head: u64,
    pub(super) tail: u64,
    pub(super) waiting_blocks: u64,
    /// An encoder thread sleeps until this many blocks wait.
    pub(super) wake_blocks: u64,
    pub(super) urgent: u64,
    pub spooled: u64,
    /// Records `[from, before)` that were given up, oldest first. A waiter may sleep through
    /// several gaps and must still learn that its record is in one of them.
    pub(super) lost: VecDeque<(u64, u64)>,
    /// End of the newest of them.
    pub(super) lost_before: u64,
    pub mode: Mode,
    pub gap: Option<OpenGap>,
    pub in_span: Option<Cause>,
    /// Seq of the newest SPAN_BEGIN or SPAN_END.
    pub span_seq: u64,
    /// Time of the newest SPAN_BEGIN.
    pub(super) span_time: u64,
    /// Somebody waits for the state file to reserve more.
    pub wants_numbers: bool,
    pub copy_left: u64,
    pub copy_total: u64,
    pub(super) room_waiters: usize,
    pub(super) progress: Instant,
    pub(super) barrier_due: bool,
    pub(super) rollover_due: bool,
    pub(super) closing: bool,
    pub(super) abandoned: bool,
    pub writes: u64,
    pub write_bytes: u64,
    pub slowed: u64,
}

impl QueueState {
    /// Raises seq and time above what a target holds. The state file knows of it already.
    pub fn raise(&mut self, seq: Seq, time: TimeUs) {
        self.next_seq = self.next_seq.max(seq.0 + 1);
        self.last_time = self.last_time.max(time.0);
    }

    /// Whether `count` numbers may be used at this moment.
    pub(super) fn reserved(&self, count: u64, boot: u64) -> bool {
        let time = self.clock.at(boot).max(self.last_time + 1) + count;
        self.next_seq + count <= self.seq_limit && time < self.time_limit
    }

    /// Bytes left unused at the ring's end, so that a record's bytes lie in one piece.
    pub(super) fn skip(&self, length: usize, capacity: usize) -> u64 {
        let position = self.head % capacity as u64;
        let left = capacity as u64 - position;
        if (length as u64) > left { left } else { 0 }
    }

    pub(super) fn has_room(&self, records: usize, length: usize, capacity: usize) -> bool {
        self.entries.len() + records <= ENTRIES_MAX - ENTRIES_CONTROL
            && self.head + self.skip(length, capacity) + length as u64 - self.tail
                <= capacity as u64
    }

    pub(super) fn push(
        &mut self,
        want: &Want,
        boot: u64,
        offset: usize,
        begin: bool,
        control: Option<Box<RecordBody>>,
    ) -> (Seq, TimeUs) {
        let (seq, time) = (self.next_seq, self.clock.at(boot).max(self.last_time + 1));
        self.next_seq += 1;
        self.last_time = time;
        if self.entries.is_empty() {
            self.progress = Instant::now();
        }
        self.entries.push_back(Entry {
            seq,
            time,
            queued: boot,
            kind: want.kind,
            slot: want.slot,
            start: want.start,
            blocks: want.blocks,
            offset,
            ring_end: self.head,
            index: self.next_index,
            begin,
            control,
        });
        self.next_index += 1;
        (Seq(seq), TimeUs(time))
    }

    pub(super) fn mark(&mut self, volumes: &[QueueVolume], slot: u16, start: u64, blocks: u64) {
        let (first, end) = regions(start, blocks);
        let fresh = volumes[usize::from(slot)].to_copy.set(first, end);
        self.copy_left += fresh;
        self.copy_total += fresh;
    }

    /// Notes that records were given up.
    pub(super) fn lose(&mut self, from: u64, before: u64) {
        self.lost_before = before;
        match self.lost.back_mut() {
            Some((_, last)) if from <= *last => *last = before,
            _ => self.lost.push_back((from, before)),
        }
        if self.lost.len() > LOST_RANGES_MAX
            && let Some((oldest, _)) = self.lost.pop_front()
            && let Some((next, _)) = self.lost.front_mut()
        {
            // Between the two lay records that were kept: whoever waits for one of them for so
            // long is told that it is lost, which is never believed too much.
            *next = oldest;
        }
    }

    /// Whether a record was given up.
    pub(super) fn has_lost(&self, seq: u64) -> bool {
        let mut ranges = self.lost.iter();
        ranges.any(|(from, before)| (*from..*before).contains(&seq))
    }

    pub(super) fn wakes_encoder(&mut self) -> bool {
        let wakes = self.waiting_blocks >= self.wake_blocks && self.wake_blocks != AWAKE;
        if wakes {
            self.wake_blocks = AWAKE;
        }
        wakes
    }

    pub fn is_idle(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn queue_bytes(&self) -> u64 {
        self.head - self.tail
    }
}
