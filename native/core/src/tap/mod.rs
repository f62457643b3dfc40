//! Tap: where writes are intercepted. See `docs/architecture.md`, "How a write travels".
//!
//! `device` takes requests to the ordering point in `queue`; encoder threads (`pipeline`) make
//! frames and append them to the spool; `intent` remembers durably which regions history may not
//! know, `copier` emits them; `start` decides after a stop what these are; `core` holds what they
//! share. Locks are taken in this order: span turn, keeper, commit, queue; range locks come before
//! all of them, bitmap writes before all but the span turn.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

mod backing;
mod backing_disk;
mod bell;
mod bitmap;
mod cache;
mod clock;
mod completion;
mod copier;
mod core;
mod device;
mod grace;
pub mod intent;
mod pipeline;
mod placement;
mod queue;
mod range_lock;
mod ring;
mod start;
pub mod state;
mod unreadable;
mod volume;

#[cfg(test)]
mod tests;

pub use backing::{Backing, Run, StorageBacking};
pub use backing_disk::DiskBacking;
pub use clock::{SystemTimeSource, TimeSource};
pub use intent::Identity;
pub use pipeline::IncarnationLimits;
pub use start::TapParts;

use self::core::TapCore;
use self::device::TapDevice;
use self::queue::Mode;
use crate::constants::LABEL_BYTES_MAX;
use crate::crypto::{GroupKey, Suite};
use crate::device::BlockDevice;
use crate::format::record::{Cause, RecordBody};
use crate::log::{LogEnd, LogError, LogPosition};
use crate::types::{Generation, GroupId, Seq, TimeUs, VolumeIndex};

/// Everything a tap needs to know; built from the launcher's message.
#[derive(Debug, Clone)]
pub struct TapConfig {
    pub group: GroupId,
    pub generation: Generation,
    pub suite: Suite,
    /// None: not unlocked yet; the tap serves and records extents only.
    pub key: Option<GroupKey>,
    pub volumes: Vec<VolumeConfig>,
    /// Directory of the spool log.
    pub spool: PathBuf,
    /// Directory of high-water mark, write-intent bitmaps and clean marker.
    pub state: PathBuf,
    pub spool_bytes_max: u64,
    pub cache_bytes: usize,
    pub frame_delay_ms: u64,
    /// The group has no target: its spool is its history, which nobody releases.
    pub kept: bool,
}

#[derive(Debug, Clone)]
pub struct VolumeConfig {
    pub index: VolumeIndex,
    pub name: String,
    pub backing: PathBuf,
}

/// What `status` shows of a tap.
#[derive(Debug, Clone, Default)]
pub struct TapStatus {
    pub last_seq: Seq,
    pub last_time: TimeUs,
    /// Records whose frames are in the spool.
    pub spooled_seq: Seq,
    pub writes: u64,
    pub write_bytes: u64,
    pub reads: u64,
    pub read_bytes: u64,
    pub flushes: u64,
    pub frame_bytes: u64,
    pub queue_bytes: u64,
    pub spool_bytes: u64,
    pub dirty_regions: u64,
    /// Regions that a first copy or recovery has still to emit, and their total when it began.
    pub copy_regions_left: u64,
    pub copy_regions_total: u64,
    pub in_span: bool,
    /// "recording" | "extents-only"
    pub mode: &'static str,
    pub gap_cause: Option<&'static str>,
    pub copy_bytes_per_s: u64,
    /// Writes that had to wait for room in the queue.
    pub slowed_writes: u64,
    /// What start and run found, for people.
    pub notices: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    #[error("{path}: {action} failed: {source}")]
    Io {
        path: PathBuf,
        action: &'static str,
        source: std::io::Error,
    },
    #[error("{path} is in use: another tap or program holds it")]
    InUse { path: PathBuf },
    #[error(
        "{path} shrank from {recorded} to {found} bytes; history of a smaller volume is refused"
    )]
    Shrunk {
        path: PathBuf,
        recorded: u64,
        found: u64,
    },
    #[error("spool or state lies on the protected volume {path}")]
    SpoolOnVolume { path: PathBuf },
    #[error(transparent)]
    Log(#[from] crate::log::LogError),
    #[error("{0}")]
    State(String),
}

/// A running tap of one group: sequencer, encoder threads, spool, bitmap, copier.
#[derive(Debug)]
pub struct Tap {
    core: Arc<TapCore>,
    /// Copier and checkpointer.
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Outlives them: requests under way may wait for what it does.
    keeper: Mutex<Option<JoinHandle<()>>>,
    encoders: Mutex<Vec<JoinHandle<()>>>,
    /// Given up by `stop`, so that the next tap can open what this one held.
    stopped: Mutex<bool>,
}

/// How long `stop` waits for an encoder that does not move.
const STOP_PATIENCE: Duration = Duration::from_secs(30);

/// Stable word for a cause, as `status` shows it.
pub fn cause_word(cause: Cause) -> &'static str {
    match cause {
        Cause::FirstCopy => "first-copy",
        Cause::UncleanStop => "unclean-stop",
        Cause::SpoolFull => "spool-full",
        Cause::SpoolFailed => "spool-failed",
        Cause::EncoderStuck => "encoder-stuck",
        Cause::BackingChanged => "backing-changed",
        Cause::BackingError => "backing-error",
        Cause::NoKey => "no-key",
        Cause::Requested => "requested",
    }
}

/// Ends the process if its thread panics: a tap without one of its threads would go on serving and
/// never record again. The agent starts it anew, and what was under way is found dirty.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, TapError> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let _guard = AbortOnPanic;
            run();
        })
        .map_err(|error| TapError::State(format!("no thread can be started: {error}")))
}

impl Tap {
    /// Recovers state and spool, opens the backings exclusively, starts the threads and, where
    /// regions are dirty or were never copied, the copier. Serves at once.
    pub fn start(config: TapConfig) -> Result<Arc<Self>, TapError> {
        let parts = TapParts::real(&config)?;
        Self::start_with(config, parts)
    }

    /// As `start`, over media that the caller has opened.
    #[allow(clippy::needless_pass_by_value)]
    pub fn start_with(config: TapConfig, parts: TapParts) -> Result<Arc<Self>, TapError> {
        let core = Arc::new(start::open(&config, &parts)?);
        let tap = Arc::new(Self {
            core: Arc::clone(&core),
            threads: Mutex::default(),
            keeper: Mutex::default(),
            encoders: Mutex::default(),
            stopped: Mutex::new(false),
        });
        for number in 0..parts.encoder_threads.max(1) {
            let core = Arc::clone(&core);
            let run = move || core.pipeline.run(&core.queue);
            tap.encoders
                .lock()
                .push(spawn(&format!("tap-encode-{number}"), run)?);
        }
        let keeper = Arc::clone(&core);
        *tap.keeper.lock() = Some(spawn("tap-keeper", move || keep(&keeper))?);
        let interval = parts.checkpoint_interval;
        let checkpointer = Arc::clone(&core);
        let run = move || checkpoint_loop(&checkpointer, interval);
        tap.threads.lock().push(spawn("tap-checkpoint", run)?);
        tap.threads
            .lock()
            .push(spawn("tap-copy", move || copier::run(&core))?);
        Ok(tap)
    }

    pub fn device(&self, volume: VolumeIndex) -> Option<Arc<dyn BlockDevice>> {
        let slot = self
            .core
            .volumes
            .iter()
            .position(|known| known.config.index == volume)?;
        Some(Arc::new(TapDevice::new(Arc::clone(&self.core), slot)))
    }

    pub fn status(&self) -> TapStatus {
        let core = &self.core;
        let dirty = core
            .volumes
            .iter()
            .map(|volume| volume.intent.durable().count())
            .sum();
        let end = core.pipeline.end();
        let state = core.queue.lock();
        TapStatus {
            last_seq: Seq(state.next_seq - 1),
            last_time: TimeUs(state.last_time),
            spooled_seq: Seq(state.spooled),
            writes: state.writes,
            write_bytes: state.write_bytes,
            reads: core.reads.load(Ordering::Relaxed),
            read_bytes: core.read_bytes.load(Ordering::Relaxed),
            flushes: core.flushes.load(Ordering::Relaxed),
            frame_bytes: core.pipeline.frame_bytes(),
            queue_bytes: state.queue_bytes(),
            spool_bytes: end.total_bytes,
            dirty_regions: dirty,
            copy_regions_left: state.copy_left,
            copy_regions_total: state.copy_total,
            in_span: state.in_span.is_some(),
            mode: match state.mode {
                Mode::Recording => "recording",
                Mode::ExtentsOnly => "extents-only",
            },
            gap_cause: state.gap.map(|gap| cause_word(gap.cause)),
            copy_bytes_per_s: core.copy_bytes_per_s.load(Ordering::Relaxed),
            slowed_writes: state.slowed,
            notices: core.notices.lock().clone(),
        }
    }

    /// State of the spool's newest end.
    pub fn log_end(&self) -> LogEnd {
        self.core.pipeline.end()
    }

    /// Waits until the log's end differs from `seen` or the time is over, and returns it.
    pub fn wait_log_end(&self, seen: &LogEnd, timeout_ms: u64) -> LogEnd {
        self.core
            .pipeline
            .wait_end(seen, Duration::from_millis(timeout_ms))
    }

    /// Records a bookmark; returns its position. It is in the spool when this returns.
    pub fn bookmark(&self, label: &str) -> Result<(Seq, TimeUs), TapError> {
        if label.is_empty() || label.len() > LABEL_BYTES_MAX {
            let text = format!("a label has 1 to {LABEL_BYTES_MAX} bytes");
            return Err(TapError::State(text));
        }
        self.core.ensure_numbers();
        let not_recording = "history is not being recorded; no bookmark can be placed";
        let body = RecordBody::Bookmark {
            label: label.to_owned(),
        };
        let (seq, time) = self
            .core
            .queue
            .place_control(body)
            .ok_or_else(|| TapError::State(not_recording.to_owned()))?;
        match self.core.queue.wait_spooled(seq) {
            Ok(true) => Ok((seq, time)),
            _ => Err(TapError::State(not_recording.to_owned())),
        }
    }

    /// Everything of the spool before `position` is durable at every target. Returns the bytes
    /// given back.
    pub fn release(&self, position: &LogPosition) -> Result<u64, TapError> {
        let gap = self.core.queue.lock().mode == Mode::ExtentsOnly;
        let trimmed = self.core.pipeline.with_writer(core::PATIENCE, |writer| {
            // Only sealed segments are trimmed, and a full spool opens no new one by itself.
            if gap {
                // No room for the manifest is no reason not to make room.
                match writer.seal() {
                    Err(LogError::NoSpace) => {}
                    other => other?,
                }
            }
            writer.trim(position)
        });
        self.core.housekeeper.ring();
        if self.core.wants_room.load(Ordering::SeqCst) {
            self.core.copier.ring();
        }
        match trimmed {
            Some(outcome) => Ok(outcome?),
            None => Err(TapError::State(
                "the spool is busy or has failed".to_owned(),
            )),
        }
    }

    /// Starts a new incarnation whose seqs and times lie above what a target reports. It is in the
    /// spool when this returns. `copy`: nothing lies between its begin and that of a span in which
    /// all volumes are copied, so that no point of it needs what came before.
    pub fn new_incarnation(
        &self,
        above_seq: Seq,
        above_time: TimeUs,
        copy: bool,
    ) -> Result<(), TapError> {
        let core = &self.core;
        let (slots, cause) = if copy {
            (0..core.volumes.len(), Some(Cause::FirstCopy))
        } else {
            (0..0, None)
        };
        let seq = {
            let _turn = core.span_turn.lock();
            core.prepare_copy(slots.clone(), (above_seq, above_time), cause)
                .map_err(|error| state_failed(&error))?;
            let mut state = core.queue.lock();
            state.raise(above_seq, above_time);
            core.mark_volumes(&mut state, slots);
            if state.mode == Mode::ExtentsOnly {
                // Recording resumes with a new incarnation in any case.
                return Ok(());
            }
            let begun = core.queue.begin_incarnation(&mut state)
                && cause.is_none_or(|cause| core.queue.begin_span(&mut state, cause));
            if !begun {
                return Err(TapError::State("the queue is full".to_owned()));
            }
            Seq(state.next_seq - 1)
        };
        core.copier.ring();
        match core.queue.wait_spooled(seq) {
            Ok(true) => Ok(()),
            _ => Err(TapError::State("history is not being recorded".to_owned())),
        }
    }

    /// Stops: drains, makes durable, leaves the clean marker. Further requests fail.
    pub fn stop(&self) -> Result<(), TapError> {
        let mut stopped = self.stopped.lock();
        if *stopped {
            return Ok(());
        }
        *stopped = true;
        let outcome = self.stop_cleanly();
        self.end();
        outcome
    }

    fn stop_cleanly(&self) -> Result<(), TapError> {
        let core = &self.core;
        core.stopping.store(true, Ordering::SeqCst);
        core.copier.ring();
        core.checkpointer.ring();
        let threads: Vec<_> = self.threads.lock().drain(..).collect();
        threads.into_iter().try_for_each(join)?;
        // Requests under way may need numbers, or recording to go on: the keeper ends after them.
        core.grace.wait(|| false);
        core.keeper_ends.store(true, Ordering::SeqCst);
        core.housekeeper.ring();
        let keeper = self.keeper.lock().take();
        keeper.map_or(Ok(()), join)?;
        core.ensure_numbers();
        let durable = core.checkpoint();
        core.queue.close();
        if !self.join_encoders() {
            return Err(TapError::State("the encoder does not move".to_owned()));
        }
        let sealed = core
            .pipeline
            .with_writer(core::PATIENCE, crate::log::LogWriter::seal);
        if let Some(Err(error)) = sealed {
            return Err(error.into());
        }
        if !durable {
            // Local data must be durable all the same; what history misses is marked dirty.
            for volume in &core.volumes {
                if volume.sync().is_err() {
                    return Err(TapError::State(
                        "a backing could not be made durable".to_owned(),
                    ));
                }
            }
        }
        self.leave_clean_marker(durable)
    }

    fn leave_clean_marker(&self, durable: bool) -> Result<(), TapError> {
        let core = &self.core;
        if !durable && core.queue.lock().mode == Mode::Recording {
            return Err(TapError::State(
                "the spool could not be made durable".to_owned(),
            ));
        }
        for volume in &core.volumes {
            if volume.intent.failed() {
                return Err(TapError::State(
                    "a write-intent bitmap has failed".to_owned(),
                ));
            }
            let identity = volume
                .backing
                .identity()
                .map_err(|error| state_failed(&error))?;
            volume
                .intent
                .update_header(|header| {
                    header.clean = true;
                    header.identity = identity;
                })
                .map_err(|error| state_failed(&error))?;
        }
        core.store_state(true, (Seq(0), TimeUs(0)), |_| {})
            .map_err(|error| state_failed(&error))
    }

    fn join_encoders(&self) -> bool {
        let deadline = Instant::now() + STOP_PATIENCE;
        let mut encoders = self.encoders.lock();
        while encoders.iter().any(|thread| !thread.is_finished()) {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        encoders.drain(..).all(|thread| thread.join().is_ok())
    }

    /// Ends all threads and lets go of the spool; what was not done stays undone, as in a crash.
    fn end(&self) {
        let core = &self.core;
        core.stopping.store(true, Ordering::SeqCst);
        core.keeper_ends.store(true, Ordering::SeqCst);
        core.queue.abandon();
        core.pipeline.wake();
        core.housekeeper.ring();
        core.copier.ring();
        core.checkpointer.ring();
        let deadline = Instant::now() + Duration::from_secs(2);
        let mut threads: Vec<_> = self.threads.lock().drain(..).collect();
        threads.extend(self.keeper.lock().take());
        threads.append(&mut self.encoders.lock());
        for thread in threads {
            // One that hangs in the kernel is left behind: it finds the queue abandoned.
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            if thread.is_finished() && thread.join().is_err() {
                core.notice("a thread of the tap had failed".to_owned());
            }
        }
        let none = || Ok::<_, std::convert::Infallible>(None);
        core.pipeline.replace_writer(Duration::from_secs(1), none);
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if !*self.stopped.lock() {
            self.end();
        }
    }
}

fn join(thread: JoinHandle<()>) -> Result<(), TapError> {
    let failed = |_| TapError::State("a thread of the tap had failed".to_owned());
    thread.join().map_err(failed)
}

fn state_failed(source: &std::io::Error) -> TapError {
    TapError::State(format!("the tap's state could not be written: {source}"))
}

/// Keeps clock, reserved numbers and recording going.
fn keep(core: &TapCore) {
    let ends = || core.keeper_ends.load(Ordering::SeqCst);
    while !ends() {
        let recording = core.queue.lock().mode == Mode::Recording;
        core.housekeeper
            .wait(Duration::from_millis(if recording { 1000 } else { 200 }));
        if ends() {
            return;
        }
        core.correct_clock();
        core.renew_limits();
        core.try_resume();
        core.open_missing_span();
    }
}

fn checkpoint_loop(core: &TapCore, interval: Duration) {
    while !core.is_stopping() {
        core.checkpointer.wait(interval);
        let due = core.queue.last_seq().0 != core.checkpointed.load(Ordering::SeqCst);
        if due && !core.is_stopping() {
            core.checkpoint();
        }
    }
}
