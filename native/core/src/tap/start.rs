//! Start of a tap: what state, bitmaps, backings and spool say about the last stop, and what must
//! therefore be copied. Serves at once; the copier works behind.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::backing::Backing;
use super::backing_disk::DiskBacking;
use super::bell::Bell;
use super::bitmap::AtomicBitmap;
use super::clock::{Clock, SystemTimeSource, TimeSource};
use super::core::{Keeper, TapCore, open_writer};
use super::grace::Grace;
use super::intent::{IntentBitmap, IntentHeader};
use super::pipeline::{Identity, IncarnationLimits, Pipeline};
use super::placement;
use super::queue::{Mode, Queue, QueueLimits, QueueVolume};
use super::state::{StateFile, TapState};
use super::volume::Volume;
use super::{TapConfig, TapError, VolumeConfig};
use crate::constants::{
    CHECKPOINT_INTERVAL_S, ENCODER_QUEUE_BYTES, ENCODER_STUCK_MS, VOLUME_BYTES_MAX, VOLUMES_MAX,
};
use crate::format::record::Cause;
use crate::log::{LogError, LogWriter};
use crate::storage::{Directory, DiskDirectory};
use crate::types::{Seq, TimeUs};

/// What a tap stands on. `real` opens what the configuration names; tests bring their own.
#[derive(Debug)]
pub struct TapParts {
    pub spool: Arc<dyn Directory>,
    pub state: Arc<dyn Directory>,
    /// One a volume, in the order of the configuration, opened exclusively.
    pub backings: Vec<Arc<dyn Backing>>,
    pub time: Arc<dyn TimeSource>,
    pub queue_bytes: usize,
    pub stuck: Duration,
    pub checkpoint_interval: Duration,
    pub encoder_threads: usize,
    pub incarnation: IncarnationLimits,
}

impl TapParts {
    /// Limits of the product around the given media.
    pub fn with(
        spool: Arc<dyn Directory>,
        state: Arc<dyn Directory>,
        backings: Vec<Arc<dyn Backing>>,
    ) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            spool,
            state,
            backings,
            time: Arc::new(SystemTimeSource),
            queue_bytes: ENCODER_QUEUE_BYTES,
            stuck: Duration::from_millis(ENCODER_STUCK_MS),
            checkpoint_interval: Duration::from_secs(CHECKPOINT_INTERVAL_S),
            encoder_threads: threads.clamp(1, 2),
            incarnation: IncarnationLimits::default(),
        }
    }

    /// Opens the backings for this tap alone, then the directories, which must lie elsewhere.
    pub fn real(config: &TapConfig) -> Result<Self, TapError> {
        // First: a volume that carries the spool is mounted, so that it cannot be opened either.
        for directory in [&config.spool, &config.state] {
            placement::check(directory, &config.volumes)?;
        }
        let mut backings: Vec<Arc<dyn Backing>> = Vec::new();
        for volume in &config.volumes {
            let path = &volume.backing;
            let backing = DiskBacking::open(path).map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => TapError::InUse { path: path.clone() },
                _ => io_error(path, "open")(error),
            })?;
            backings.push(Arc::new(backing));
        }
        let open = |path: &Path| -> Result<Arc<dyn Directory>, TapError> {
            let directory = DiskDirectory::open(path).map_err(io_error(path, "open"))?;
            Ok(Arc::new(directory))
        };
        Ok(Self::with(
            open(&config.spool)?,
            open(&config.state)?,
            backings,
        ))
    }
}

fn io_error(path: &Path, action: &'static str) -> impl Fn(io::Error) -> TapError {
    let path = path.to_owned();
    move |source| TapError::Io {
        path: path.clone(),
        action,
        source,
    }
}

/// One volume's findings.
struct Opened {
    intent: IntentBitmap,
    /// Why its dirty regions are dirty.
    cause: Cause,
}

/// Builds the shared core: everything durable that must be before the first request is served.
pub fn open(config: &TapConfig, parts: &TapParts) -> Result<TapCore, TapError> {
    check_config(config, parts)?;
    let mut notices = Vec::new();
    let (state_file, old) =
        StateFile::open(&*parts.state).map_err(io_error(&config.state, "read state"))?;
    if let Some(old) = &old
        && old.group != config.group
    {
        let text = format!("the state directory belongs to group {}", old.group);
        return Err(TapError::State(text));
    }
    let (writer, spool_cause) = open_spool(config, parts, &mut notices)?;
    let clean = old.as_ref().is_some_and(|state| state.clean);
    let intent_lost = old.as_ref().is_some_and(|state| state.intent_lost);

    let old_gap = old.as_ref().and_then(|state| state.gap);
    let mut cause = old
        .as_ref()
        .and_then(|state| state.span)
        .or(old_gap.map(|gap| gap.cause));
    let mut volumes = Vec::new();
    let mut queued = Vec::new();
    for (slot, volume) in config.volumes.iter().enumerate() {
        let backing = Arc::clone(&parts.backings[slot]);
        let opened = open_volume(config, parts, volume, &*backing, clean, &mut notices)?;
        if intent_lost {
            let fail = io_error(&config.state, "write-intent bitmap");
            opened.intent.dirty_all().map_err(fail)?;
        }
        let size = backing.size();
        let to_copy = AtomicBitmap::new(opened.intent.durable().bits());
        for word in 0..to_copy.words() {
            to_copy.set_word(word, opened.intent.durable().word(word));
        }
        if to_copy.count() > 0 {
            cause = cause.or(Some(opened.cause));
        }
        queued.push(QueueVolume {
            index: volume.index,
            name: volume.name.clone(),
            size,
            to_copy,
        });
        let slot = u16::try_from(slot).expect("invariant: at most VOLUMES_MAX volumes");
        volumes.push(Volume::new(slot, volume.clone(), backing, opened.intent));
    }

    let end = writer.as_ref().map(LogWriter::end).unwrap_or_default();
    let next_seq = old
        .as_ref()
        .map_or(1, |state| state.seq_end.0)
        .max(end.last_seq.0 + 1);
    let (boot, wall) = (parts.time.boot_us(), parts.time.wall_us());
    let floor = time_floor(old.as_ref(), &*parts.time, boot).max(end.last_time.0 + 1);
    let clock = Clock::new(boot, wall, floor);
    let housekeeper = Arc::new(Bell::default());
    let limits = QueueLimits {
        bytes: parts.queue_bytes,
        frame_delay: Duration::from_millis(config.frame_delay_ms),
        stuck: parts.stuck,
    };
    let queue = Queue::new(
        limits,
        Arc::clone(&parts.time),
        queued.into(),
        Arc::clone(&housekeeper),
        clock,
        (Seq(next_seq), TimeUs(floor.saturating_sub(1))),
    );
    let identity = config.key.clone().map(|key| Identity {
        group: config.group,
        generation: config.generation,
        suite: config.suite,
        key,
    });
    let pipeline = Pipeline::new(
        identity,
        parts.incarnation,
        config.cache_bytes,
        writer,
        config.spool_bytes_max,
    );
    let core = TapCore {
        group: config.group,
        generation: config.generation,
        has_key: config.key.is_some(),
        volumes,
        queue,
        pipeline,
        grace: Grace::default(),
        keeper: Mutex::new(Keeper {
            file: state_file,
            span: cause,
            gap_stored: false,
            intent_lost: false,
        }),
        span_turn: Mutex::new(()),
        spool: Arc::clone(&parts.spool),
        kept: config.kept,
        time: Arc::clone(&parts.time),
        housekeeper,
        copier: Bell::default(),
        wants_room: false.into(),
        checkpointer: Bell::default(),
        stopping: false.into(),
        keeper_ends: false.into(),
        notices: Mutex::new(notices),
        reads: 0.into(),
        read_bytes: 0.into(),
        flushes: 0.into(),
        copy_bytes_per_s: 0.into(),
        checkpointed: 0.into(),
    };
    begin(&core, config, old.as_ref(), cause, spool_cause)?;
    Ok(core)
}

fn check_config(config: &TapConfig, parts: &TapParts) -> Result<(), TapError> {
    let count = config.volumes.len();
    if count == 0 || count > VOLUMES_MAX || count != parts.backings.len() {
        return Err(TapError::State(format!(
            "a group has 1 to {VOLUMES_MAX} volumes"
        )));
    }
    for (position, volume) in config.volumes.iter().enumerate() {
        let before = &config.volumes[..position];
        if before
            .iter()
            .any(|other| other.index == volume.index || other.name == volume.name)
        {
            return Err(TapError::State(format!(
                "volume {} is named twice",
                volume.name
            )));
        }
        let size = parts.backings[position].size();
        if size == 0 || size > VOLUME_BYTES_MAX {
            let (name, limit) = (&volume.name, VOLUME_BYTES_MAX);
            let text = format!("volume {name} has {size} bytes; 1 to {limit} can be protected");
            return Err(TapError::State(text));
        }
    }
    Ok(())
}

/// Opens the spool. One that cannot be used costs history, not service.
fn open_spool(
    config: &TapConfig,
    parts: &TapParts,
    notices: &mut Vec<String>,
) -> Result<(Option<LogWriter>, Option<Cause>), TapError> {
    match open_writer(&parts.spool, config.group, config.spool_bytes_max) {
        Ok((mut writer, report)) => {
            writer.promise(config.generation);
            if report.torn_bytes > 0 {
                notices.push(format!(
                    "spool: a torn tail of {} bytes was cut",
                    report.torn_bytes
                ));
            }
            notices.extend(
                report
                    .damage
                    .into_iter()
                    .map(|damage| format!("spool: {damage}")),
            );
            Ok((Some(writer), None))
        }
        Err(LogError::Locked) => Err(TapError::InUse {
            path: config.spool.clone(),
        }),
        Err(error @ (LogError::ForeignGroup { .. } | LogError::Fenced { .. })) => Err(error.into()),
        Err(error) => {
            notices.push(format!("spool: {error}"));
            Ok((None, Some(super::pipeline::cause_of(&error))))
        }
    }
}

fn open_volume(
    config: &TapConfig,
    parts: &TapParts,
    volume: &VolumeConfig,
    backing: &dyn Backing,
    clean: bool,
    notices: &mut Vec<String>,
) -> Result<Opened, TapError> {
    let size = backing.size();
    let name = &volume.name;
    let header = IntentHeader {
        group: config.group,
        volume: volume.index,
        clean: false,
        copied: false,
        size,
        identity: super::intent::Identity::default(),
    };
    let fail = io_error(&config.state, "write-intent bitmap");
    let found = IntentBitmap::open(&*parts.state, volume.index, size).map_err(&fail)?;
    let (intent, found) = match found {
        Some(Ok((intent, found))) => (intent, found),
        Some(Err(error)) => {
            notices.push(format!("volume {name}: {error}; it is copied as a whole"));
            let intent = IntentBitmap::create(&*parts.state, header).map_err(&fail)?;
            return Ok(Opened {
                intent,
                cause: Cause::UncleanStop,
            });
        }
        None => {
            let intent = IntentBitmap::create(&*parts.state, header).map_err(&fail)?;
            return Ok(Opened {
                intent,
                cause: Cause::FirstCopy,
            });
        }
    };
    let recorded = found.header;
    if recorded.group != config.group || recorded.volume != volume.index {
        let text = format!(
            "the bitmap of volume {name} belongs to group {}",
            recorded.group
        );
        return Err(TapError::State(text));
    }
    if size < recorded.size {
        let path = volume.backing.clone();
        return Err(TapError::Shrunk {
            path,
            recorded: recorded.size,
            found: size,
        });
    }
    if found.damaged_pages > 0 {
        let pages = found.damaged_pages;
        notices.push(format!(
            "volume {name}: {pages} damaged pages of its bitmap count as dirty"
        ));
    }
    if size > recorded.size {
        let old = recorded.size;
        notices.push(format!("volume {name}: grew from {old} to {size} bytes"));
    }
    let mut cause = if recorded.copied {
        Cause::UncleanStop
    } else {
        Cause::FirstCopy
    };
    let now = backing
        .identity()
        .map_err(io_error(&volume.backing, "stat"))?;
    if clean && recorded.clean && recorded.identity.changed(&now) {
        notices.push(format!(
            "volume {name}: the backing was changed while no tap ran; it is copied as a whole"
        ));
        intent.dirty_all().map_err(&fail)?;
        cause = Cause::BackingChanged;
    } else {
        intent.store().map_err(&fail)?;
    }
    intent
        .update_header(|header| {
            header.clean = false;
            header.size = size;
        })
        .map_err(&fail)?;
    Ok(Opened { intent, cause })
}

/// The lowest time that may be used now.
fn time_floor(old: Option<&TapState>, time: &dyn TimeSource, boot: u64) -> u64 {
    let Some(old) = old else { return 0 };
    let passed = boot.checked_sub(old.boot_us);
    match passed {
        // Same boot: no clock of this group can have run further than this since.
        Some(passed) if !old.clean && old.boot_id == time.boot_id() => {
            (old.time.0 + passed + passed / 1000 + 1000).min(old.time_end.0.max(old.time.0 + 1))
        }
        _ => old.time_end.0,
    }
}

/// Stores the state of a running tap, then places the head of its first incarnation.
fn begin(
    core: &TapCore,
    config: &TapConfig,
    old: Option<&TapState>,
    cause: Option<Cause>,
    spool_cause: Option<Cause>,
) -> Result<(), TapError> {
    let old_gap = old.and_then(|state| state.gap);
    {
        let mut state = core.queue.lock();
        state.gap = old_gap;
        let stays_open = if core.has_key {
            spool_cause
        } else {
            Some(Cause::NoKey)
        };
        if let Some(cause) = stays_open {
            core.queue.open_gap(&mut state, cause);
        }
    }
    core.store_state(false, (Seq(0), TimeUs(0)), |_| {})
        .map_err(io_error(&config.state, "write state"))?;
    let mut state = core.queue.lock();
    if state.mode == Mode::Recording {
        // Before any request: no write may be recorded between a gap and its span.
        if !core.queue.resume(&mut state) {
            return Err(TapCore::state_error("no numbers could be reserved"));
        }
        if let (None, Some(cause)) = (state.in_span, cause) {
            core.queue.begin_span(&mut state, cause);
        }
    }
    Ok(())
}
