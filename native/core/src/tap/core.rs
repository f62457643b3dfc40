//! What the parts of a running tap share, and the duties that need several of them: flush,
//! checkpoint, reserving numbers, resuming after a gap.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::backing::Backing;
use super::bell::Bell;
use super::clock::TimeSource;
use super::grace::Grace;
use super::pipeline::Pipeline;
use super::queue::{Kind, Mode, Placed, Queue, QueueState, Want, regions};
use super::state::{StateFile, TapState};
use super::volume::Volume;
use super::{TapError, volume};
use crate::constants::{BLOCK_SIZE, REGION_BYTES, SEQ_RESERVE};
use crate::device::DeviceError;
use crate::format::record::{Cause, RecordBody};
use crate::log::{LogError, LogOptions, LogWriter, RecoveryReport};
use crate::storage::Directory;
use crate::types::{Generation, GroupId, Seq, TimeUs};

/// Time that may be used before the state file must be written again.
const TIME_RESERVE_US: u64 = 60_000_000;
/// How long a control request waits for the spool's writer.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// The state file and what only it knows.
#[derive(Debug)]
pub struct Keeper {
    pub file: StateFile,
    /// A span was begun whose end is not known to be durable.
    pub span: Option<Cause>,
    /// Whether the file says that a gap is open.
    pub gap_stored: bool,
    /// See `TapState::intent_lost`.
    pub intent_lost: bool,
}

#[derive(Debug)]
pub struct TapCore {
    pub group: GroupId,
    pub generation: Generation,
    pub has_key: bool,
    pub volumes: Vec<Volume>,
    pub queue: Queue,
    pub pipeline: Pipeline,
    pub grace: Grace,
    pub keeper: Mutex<Keeper>,
    /// Held from noting a span in the state file to its SPAN_BEGIN, and while forgetting one.
    pub span_turn: Mutex<()>,
    pub spool: Arc<dyn Directory>,
    /// The spool is the history itself: nobody releases it.
    pub kept: bool,
    pub time: Arc<dyn TimeSource>,
    pub housekeeper: Arc<Bell>,
    pub copier: Bell,
    /// The copier waits for room in the spool; its other waits no release must end.
    pub wants_room: AtomicBool,
    pub checkpointer: Bell,
    pub stopping: AtomicBool,
    /// The keeper's own end; it comes after the last request.
    pub keeper_ends: AtomicBool,
    pub notices: Mutex<Vec<String>>,
    pub reads: AtomicU64,
    pub read_bytes: AtomicU64,
    pub flushes: AtomicU64,
    pub copy_bytes_per_s: AtomicU64,
    /// Last seq that a checkpoint covered.
    pub checkpointed: AtomicU64,
}

impl TapCore {
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Asked again inside the grace section: `stop` waits for the sections after it set the flag.
    pub fn check_running(&self) -> Result<(), DeviceError> {
        if self.is_stopping() {
            Err(DeviceError::Shutdown)
        } else {
            Ok(())
        }
    }

    pub fn notice(&self, text: String) {
        let mut notices = self.notices.lock();
        if notices.len() < 64 && !notices.contains(&text) {
            notices.push(text);
        }
    }

    /// Backing durable and every record up to `seq` written to the spool, both at the same time.
    pub fn make_durable(&self, volume: &Volume, seq: Seq) -> Result<(), DeviceError> {
        self.queue.urge(seq);
        let synced = volume.sync();
        // Without room for history the answer does not wait for it: the gap is named.
        self.queue.wait_spooled(seq)?;
        synced
    }

    /// A region's bit is not durable after all. If the bitmap cannot be written any more, the state
    /// file says so before the write goes on; without even that, local I/O goes on all the same.
    #[cold]
    pub fn intent_missing(&self, volume: &Volume) {
        if !volume.intent.failed() || self.keeper.lock().intent_lost {
            return;
        }
        let name = &volume.config.name;
        self.notice(format!(
            "volume {name}: its write-intent bitmap cannot be written"
        ));
        let mark = |keeper: &mut Keeper| keeper.intent_lost = true;
        if self.store_state(false, (Seq(0), TimeUs(0)), mark).is_err() {
            self.notice("the state file cannot be written".to_owned());
        }
    }

    /// A write to the backing failed and may have changed any part of its range: records what is
    /// there now. The range is held.
    pub fn backing_failed(&self, volume: &Volume, start: u64, blocks: u64) {
        volume.completion.remove(start, blocks);
        if self.read_back(volume, start, blocks).is_none() {
            let (first, end) = regions(start, blocks);
            let mut state = self.queue.lock();
            self.queue
                .mark_regions(&mut state, usize::from(volume.slot), first, end);
            drop(state);
            // It opens the span that says so.
            self.housekeeper.ring();
        }
        self.notice(format!(
            "volume {}: a write to the backing failed",
            volume.config.name
        ));
    }

    fn read_back(&self, volume: &Volume, start: u64, blocks: u64) -> Option<()> {
        let end = start + blocks;
        let mut at = start;
        while at < end {
            let count = (end - at).min(256);
            let content = read_blocks(&*volume.backing, at, count).ok()?;
            let slot = volume.slot;
            let want = Want {
                kind: Kind::Resync,
                slot,
                start: at,
                blocks: count,
                copied: None,
            };
            match self.queue.place(&[want], 0, false).ok()? {
                Placed::Recorded(mut place) => place.write(&content),
                // The range is to be copied when recording goes on.
                Placed::ExtentsOnly => {}
            }
            at += count;
        }
        Some(())
    }

    /// Writes the state file; afterwards more numbers may be used. `above` raises both first.
    pub fn store_state(
        &self,
        clean: bool,
        above: (Seq, TimeUs),
        change: impl FnOnce(&mut Keeper),
    ) -> std::io::Result<()> {
        let mut keeper = self.keeper.lock();
        change(&mut keeper);
        let boot_us = self.time.boot_us();
        let (next_seq, time, gap) = {
            let state = self.queue.lock();
            let time = state.clock.at(boot_us).max(state.last_time).max(above.1.0);
            (state.next_seq.max(above.0.0 + 1), time, state.gap)
        };
        let (seq_end, time_end) = if clean {
            (next_seq, time + 1)
        } else {
            (next_seq + SEQ_RESERVE, time + TIME_RESERVE_US)
        };
        let state = TapState {
            group: self.group,
            clean,
            intent_lost: keeper.intent_lost,
            seq_end: Seq(seq_end),
            time_end: TimeUs(time_end),
            time: TimeUs(time),
            boot_us,
            boot_id: self.time.boot_id(),
            span: keeper.span,
            gap,
        };
        keeper.file.store(&state)?;
        keeper.gap_stored = gap.is_some();
        // Still under the keeper's lock: limits never go back to an older state's.
        self.queue.set_limits(Seq(seq_end), TimeUs(time_end));
        Ok(())
    }

    /// Reserves more numbers when half of what was reserved is used.
    pub fn renew_limits(&self) {
        let gap_stored = self.keeper.lock().gap_stored;
        let due = {
            let state = self.queue.lock();
            let now = state.clock.at(self.time.boot_us()).max(state.last_time);
            let used = state.last_time + TIME_RESERVE_US > state.time_limit;
            state.wants_numbers
                || state.gap.is_some() != gap_stored
                || state.next_seq + SEQ_RESERVE / 2 >= state.seq_limit
                || (used && now + TIME_RESERVE_US / 2 >= state.time_limit)
        };
        if due
            && self
                .store_state(false, (Seq(0), TimeUs(0)), |_| {})
                .is_err()
        {
            self.notice("the state file cannot be written".to_owned());
        }
    }

    /// Makes sure that control records can be numbered: after an idle minute nothing is reserved.
    pub fn ensure_numbers(&self) {
        if !self.queue.has_numbers(16)
            && self
                .store_state(false, (Seq(0), TimeUs(0)), |_| {})
                .is_err()
        {
            self.notice("the state file cannot be written".to_owned());
        }
    }

    /// Follows the wall clock; a step becomes a record.
    pub fn correct_clock(&self) {
        let (boot, wall) = (self.time.boot_us(), self.time.wall_us());
        let step = {
            let mut state = self.queue.lock();
            let step = state.clock.correct(boot, wall);
            if step.is_some_and(|us| us > 0) {
                // Times beyond the last state must not be used before the state knows them.
                state.time_limit = 0;
            }
            step
        };
        if let Some(us) = step {
            self.notice(format!("the clock of this host was stepped by {us} us"));
            if self.store_state(false, (Seq(0), TimeUs(0)), |_| {}).is_ok() {
                self.queue.place_control(RecordBody::ClockStep { us });
            }
        }
    }

    /// Regions to copy without a span, after an error of the backing: opens one.
    pub fn open_missing_span(&self) {
        let missing = |state: &super::queue::QueueState| {
            state.mode == Mode::Recording && state.copy_left > 0 && state.in_span.is_none()
        };
        if !missing(&self.queue.lock()) {
            return;
        }
        let _turn = self.span_turn.lock();
        let cause = Cause::BackingError;
        if self
            .store_state(false, (Seq(0), TimeUs(0)), |keeper| {
                keeper.span = Some(cause);
            })
            .is_ok()
        {
            let mut state = self.queue.lock();
            if missing(&state) {
                self.queue.begin_span(&mut state, cause);
            }
        }
        self.copier.ring();
    }

    /// After a gap: when the queue is empty and the spool takes frames again, records again.
    pub fn try_resume(&self) {
        let gap = {
            let state = self.queue.lock();
            if state.mode == Mode::Recording || !state.is_idle() {
                return;
            }
            state.gap
        };
        if !self.has_key || !self.spool_ready() {
            return;
        }
        let _turn = self.span_turn.lock();
        let cause = gap.map_or(Cause::SpoolFailed, |gap| gap.cause);
        if self
            .store_state(false, (Seq(0), TimeUs(0)), |keeper| {
                keeper.span = Some(cause);
            })
            .is_err()
        {
            return;
        }
        let mut state = self.queue.lock();
        let resumed = state.mode == Mode::ExtentsOnly && self.queue.resume(&mut state);
        drop(state);
        if resumed {
            self.copier.ring();
        }
    }

    /// What the spool holds at most: its limit, or less if its disk is smaller.
    fn spool_limit(&self, used: u64) -> u64 {
        let free = self.spool.free_bytes().unwrap_or(0);
        self.pipeline.bytes_max().min(used.saturating_add(free))
    }

    /// Whether the copier may go on: a quarter of the spool stays free for what is written
    /// meanwhile, or the copy would overflow the spool that it mends. Targets make room again, for
    /// all but the newest two segments, of an eighth each. Without a target nobody does, and to
    /// wait would be for ever.
    pub fn has_room_to_copy(&self) -> bool {
        if self.kept {
            return true;
        }
        let used = self.pipeline.end().total_bytes;
        let limit = self.spool_limit(used);
        used + self.queue.used_bytes() + REGION_BYTES <= limit - limit / 4
    }

    /// Whether the spool would take frames; opens it again after a failure.
    fn spool_ready(&self) -> bool {
        if self.pipeline.writer_failed() {
            let (group, generation) = (self.group, self.generation);
            let opened = self.pipeline.replace_writer(PATIENCE, || {
                let (mut writer, report) =
                    open_writer(&self.spool, group, self.pipeline.bytes_max())?;
                writer.promise(generation);
                for damage in report.damage {
                    self.notice(format!("spool: {damage}"));
                }
                Ok::<_, LogError>(Some(writer))
            });
            if !matches!(opened, Some(Ok(()))) {
                return false;
            }
        }
        let used = self.pipeline.end().total_bytes;
        let free = self.spool.free_bytes().unwrap_or(0);
        let limit = self.spool_limit(used);
        let room = limit / 4;
        used <= limit - room && free >= room.min(64 << 20)
    }

    /// Makes spool and backings durable and clears the region bits that nobody wrote to since.
    /// Returns whether it came to its end.
    pub fn checkpoint(&self) -> bool {
        for volume in &self.volumes {
            volume.intent.begin_checkpoint();
        }
        // Sections that began before: their writes are counted in no later checkpoint.
        if !self.grace.wait(|| self.queue.is_abandoned()) {
            return false;
        }
        let (seq, span_ended) = {
            let state = self.queue.lock();
            (
                Seq(state.next_seq - 1),
                state.in_span.is_none() && state.copy_left == 0,
            )
        };
        if !matches!(self.queue.wait_spooled(seq), Ok(true)) {
            return false;
        }
        let handle = self
            .pipeline
            .with_writer(PATIENCE, |writer| writer.sync_handle());
        let synced = match handle {
            Some(Ok(handle)) => handle.sync().is_ok(),
            Some(Err(_)) => false,
            None => return false,
        };
        if !synced {
            self.spool_lost();
            return false;
        }
        if self.volumes.iter().any(|volume| volume.sync().is_err()) {
            self.notice("a backing could not be made durable".to_owned());
            return false;
        }
        // A copy in preparation has its bits set and is not marked yet: it has the turn.
        let turn = self.span_turn.lock();
        for (volume, queued) in self.volumes.iter().zip(self.queue.volumes().iter()) {
            let kept = volume
                .intent
                .end_checkpoint(|word| queued.to_copy.word(word) | volume.unreadable.word(word));
            if kept.is_err() {
                self.notice(format!(
                    "volume {}: the bitmap cannot be written",
                    volume.config.name
                ));
                return false;
            }
        }
        drop(turn);
        self.checkpointed.store(seq.0, Ordering::SeqCst);
        !span_ended || self.span_is_over(seq)
    }

    /// Makes durable that these volumes are to be copied in a span of that cause, and raises the
    /// numbers. The caller has the span turn and keeps it until the volumes are marked.
    pub fn prepare_copy(
        &self,
        slots: Range<usize>,
        above: (Seq, TimeUs),
        cause: Option<Cause>,
    ) -> std::io::Result<()> {
        for volume in &self.volumes[slots] {
            volume.intent.dirty_all()?;
        }
        self.store_state(false, above, |keeper| {
            // Only a first copy stands for all before it: it is what a restart goes on as.
            if keeper.span.is_none() || cause == Some(Cause::FirstCopy) {
                keeper.span = cause;
            }
        })
    }

    pub fn mark_volumes(&self, state: &mut QueueState, slots: Range<usize>) {
        for slot in slots {
            let regions = self.volumes[slot].intent.durable().bits();
            self.queue.mark_regions(state, slot, 0, regions);
        }
    }

    /// Forgets a span whose end is durable; whole volumes have then been copied once.
    fn span_is_over(&self, seq: Seq) -> bool {
        let _turn = self.span_turn.lock();
        let stored = self.store_state(false, (Seq(0), TimeUs(0)), |keeper| {
            let state = self.queue.lock();
            // A span that began after `seq` keeps its mark.
            if state.in_span.is_none() && state.span_seq <= seq.0 {
                keeper.span = None;
            }
        });
        stored.is_ok()
            && self
                .volumes
                .iter()
                .all(|volume| volume.intent.set_copied().is_ok())
    }

    /// A sync of the spool failed: whatever was not known durable may be gone. Everything dirty is
    /// to be copied again.
    fn spool_lost(&self) {
        // Marked first: from `give_up` on recording may go on, in a span that ends when nothing is.
        let mut state = self.queue.lock();
        for (slot, volume) in self.volumes.iter().enumerate() {
            let durable = volume.intent.durable();
            let mut from = 0;
            while let Some(first) = durable.next_set(from) {
                let end = first + durable.run(first, u64::MAX - first);
                self.queue.mark_regions(&mut state, slot, first, end);
                from = end;
            }
        }
        drop(state);
        self.pipeline.fail_writer();
        self.queue.give_up(Cause::SpoolFailed);
    }

    pub fn state_error(reason: &str) -> TapError {
        TapError::State(reason.to_owned())
    }
}

/// Opens the spool. Its newest sealed segment is never trimmed: segments are kept small against
/// its limit, or a full spool could not be emptied far enough to record again.
pub fn open_writer(
    spool: &Arc<dyn Directory>,
    group: GroupId,
    bytes_max: u64,
) -> Result<(LogWriter, RecoveryReport), LogError> {
    let default = LogOptions::default();
    // The newest segment is never trimmed: it must not be what fills the spool or its disk.
    let by_disk = (spool.free_bytes().unwrap_or(u64::MAX) / 8).max(4 << 20);
    let segment_bytes_max = default.segment_bytes_max.min(bytes_max / 8).min(by_disk);
    LogWriter::open_with(
        Arc::clone(spool),
        group,
        LogOptions {
            segment_bytes_max,
            ..default
        },
    )
}

/// Reads whole blocks, zero-padded behind the end of the backing.
pub fn read_blocks(backing: &dyn Backing, start: u64, blocks: u64) -> std::io::Result<Vec<u8>> {
    let offset = start * BLOCK_SIZE as u64;
    let length = blocks * BLOCK_SIZE as u64;
    let present = length.min(backing.size() - offset);
    let size = |bytes: u64| usize::try_from(bytes).map_err(|_| volume::too_large());
    let mut content = vec![0; size(length)?];
    backing.read(&mut content[..size(present)?], offset, false)?;
    Ok(content)
}
