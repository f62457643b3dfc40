//! Control records: incarnations, gaps, spans, barriers. They never wait for room.

use crate::constants::BLOCK_SIZE;
use crate::format::record::{Cause, RecordBody};
use crate::types::{Seq, TimeUs};

use std::sync::atomic::Ordering;

use super::{ENTRIES_MAX, Kind, Mode, Queue, QueueState, Want, regions};
use crate::tap::state::OpenGap;

impl Queue {
    /// Stops recording from the next seq on; what is queued may still reach the spool.
    pub fn open_gap(&self, state: &mut QueueState, cause: Cause) {
        if state.gap.is_none() {
            state.gap = Some(OpenGap {
                cause,
                first_seq: Seq(state.next_seq),
                first_time: TimeUs(state.clock.at(self.time.boot_us()).max(state.last_time + 1)),
                bytes: 0,
            });
        }
        state.mode = Mode::ExtentsOnly;
        self.room.notify_all();
        self.spooled.notify_all();
        self.housekeeper.ring();
    }

    /// The spool takes no more: everything that is not committed becomes regions to copy, and a
    /// gap begins with it.
    pub fn give_up(&self, cause: Cause) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let first = state.entries.front().map(|entry| (entry.seq, entry.time));
        self.open_gap(state, cause);
        if let (Some(gap), Some((seq, time))) = (&mut state.gap, first)
            && seq < gap.first_seq.0
        {
            gap.first_seq = Seq(seq);
            gap.first_time = TimeUs(time);
        }
        let mut lost_bytes = 0;
        for entry in &state.entries {
            if entry.kind == Kind::Control {
                continue;
            }
            let volume = &self.volumes[usize::from(entry.slot)];
            let (first, end) = regions(entry.start, entry.blocks);
            let fresh = volume.to_copy.set(first, end);
            state.copy_left += fresh;
            state.copy_total += fresh;
            if entry.kind != Kind::Resync {
                lost_bytes += entry.blocks * BLOCK_SIZE as u64;
            }
        }
        if let Some(gap) = &mut state.gap {
            gap.bytes += lost_bytes;
        }
        let from = first.map_or(state.next_seq, |(seq, _)| seq);
        state.lose(from, state.next_seq);
        self.work.notify_all();
    }

    /// Marks regions of a volume to be copied.
    pub fn mark_regions(&self, state: &mut QueueState, slot: usize, first: u64, end: u64) {
        let fresh = self.volumes[slot].to_copy.set(first, end);
        state.copy_left += fresh;
        state.copy_total += fresh;
    }

    /// Appends a control record now; it never waits. `None` if extents only are recorded or no
    /// number or place is left.
    pub fn place_control(&self, body: RecordBody) -> Option<(Seq, TimeUs)> {
        let mut state = self.state.lock();
        self.push_control(&mut state, body, false)
    }

    fn push_control(
        &self,
        state: &mut QueueState,
        body: RecordBody,
        begin: bool,
    ) -> Option<(Seq, TimeUs)> {
        let boot = self.time.boot_us();
        let full = state.entries.len() >= ENTRIES_MAX;
        if state.mode != Mode::Recording || full || !state.reserved(1, boot) {
            return None;
        }
        self.published(state.next_index)
            .store(true, Ordering::Release);
        let want = Want {
            kind: Kind::Control,
            slot: 0,
            start: 0,
            blocks: 0,
            copied: None,
        };
        let placed = state.push(&want, boot, 0, begin, Some(Box::new(body)));
        state.waiting_blocks += 1;
        if state.wakes_encoder() {
            self.work.notify_one();
        }
        Some(placed)
    }

    /// A FLUSH arrived: places a BARRIER if writes came since the last one, and returns the seq
    /// that must be in the spool before the answer.
    pub fn barrier(&self) -> Seq {
        let mut state = self.state.lock();
        if state.barrier_due
            && self
                .push_control(&mut state, RecordBody::Barrier, false)
                .is_some()
        {
            state.barrier_due = false;
        }
        Seq(state.next_seq - 1)
    }

    /// Places the head of a new incarnation: its VOLUME records.
    pub fn begin_incarnation(&self, state: &mut QueueState) -> bool {
        let boot = self.time.boot_us();
        // With room for the gap and the span that may follow: without them nobody could tell that
        // the incarnation does not continue what was before.
        let count = self.volumes.len() + 2;
        let fits = state.entries.len() + count < ENTRIES_MAX && state.reserved(count as u64, boot);
        if state.mode != Mode::Recording || !fits {
            return false;
        }
        for (position, volume) in self.volumes.iter().enumerate() {
            let (volume, size, name) = (volume.index, volume.size, volume.name.clone());
            self.push_control(
                state,
                RecordBody::Volume { volume, size, name },
                position == 0,
            );
        }
        state.rollover_due = false;
        true
    }

    /// The incarnation is long enough: begin the next, once.
    pub fn roll_over(&self) {
        let mut state = self.state.lock();
        if !state.rollover_due {
            state.rollover_due = true;
            if !self.begin_incarnation(&mut state) {
                state.rollover_due = false;
            }
        }
    }

    /// Recording again: new incarnation, the GAP, and a span in which the copier makes good.
    /// Does nothing and returns false if numbers are not reserved.
    pub fn resume(&self, state: &mut QueueState) -> bool {
        state.mode = Mode::Recording;
        let end_seq = Seq(state.next_seq);
        if !self.begin_incarnation(state) {
            state.mode = Mode::ExtentsOnly;
            return false;
        }
        if let Some(gap) = state.gap.take() {
            let OpenGap {
                cause,
                first_seq,
                first_time,
                bytes,
            } = gap;
            let record = RecordBody::Gap {
                cause,
                first_seq,
                end_seq,
                first_time,
                bytes,
            };
            self.push_control(state, record, false);
            self.begin_span(state, cause);
        }
        self.room.notify_all();
        true
    }

    /// Returns whether the span's begin could be placed.
    pub fn begin_span(&self, state: &mut QueueState, cause: Cause) -> bool {
        let placed = self.push_control(state, RecordBody::SpanBegin { cause }, false);
        if let Some((seq, time)) = placed {
            state.in_span = Some(cause);
            (state.span_seq, state.span_time) = (seq.0, time.0);
        }
        placed.is_some()
    }

    /// Ends the span if nothing is left to copy. `missing`: bytes that the copier could not read; a
    /// GAP names them, for which no number was given.
    pub fn end_span(&self, missing: u64) -> Option<Seq> {
        let mut state = self.state.lock();
        if state.in_span.is_none() || state.copy_left > 0 {
            return None;
        }
        if missing > 0 {
            let own = Seq(state.next_seq);
            let gap = RecordBody::Gap {
                cause: Cause::BackingError,
                first_seq: own,
                end_seq: own,
                first_time: TimeUs(state.span_time),
                bytes: missing,
            };
            self.push_control(&mut state, gap, false)?;
        }
        let (seq, _) = self.push_control(&mut state, RecordBody::SpanEnd, false)?;
        state.in_span = None;
        state.span_seq = seq.0;
        state.copy_total = 0;
        self.hurry(&mut state, seq);
        Some(seq)
    }
}
