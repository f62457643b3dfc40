//! Tap: where writes are intercepted. See `docs/architecture.md`, "How a write travels".

use std::path::PathBuf;
use std::sync::Arc;

use crate::crypto::{GroupKey, Suite};
use crate::device::BlockDevice;
use crate::log::{LogEnd, LogPosition};
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
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    #[error("{path}: {action} failed: {source}")]
    Io { path: PathBuf, action: &'static str, source: std::io::Error },
    #[error("{path} is in use: another tap or program holds it")]
    InUse { path: PathBuf },
    #[error("{path} shrank from {recorded} to {found} bytes; history of a smaller volume is refused")]
    Shrunk { path: PathBuf, recorded: u64, found: u64 },
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
    _private: (),
}

impl Tap {
    /// Recovers state and spool, opens the backings exclusively, starts the threads and, where
    /// regions are dirty or were never copied, the copier. Serves at once.
    pub fn start(config: TapConfig) -> Result<Arc<Self>, TapError> {
        let _ = config;
        todo!()
    }

    pub fn device(&self, volume: VolumeIndex) -> Option<Arc<dyn BlockDevice>> {
        let _ = volume;
        todo!()
    }

    pub fn status(&self) -> TapStatus {
        todo!()
    }

    /// State of the spool's newest end.
    pub fn log_end(&self) -> LogEnd {
        todo!()
    }

    /// Waits until the log's end differs from `seen` or the time is over, and returns it.
    pub fn wait_log_end(&self, seen: &LogEnd, timeout_ms: u64) -> LogEnd {
        let _ = (seen, timeout_ms);
        todo!()
    }

    /// Records a bookmark; returns its position. It is in the spool when this returns.
    pub fn bookmark(&self, label: &str) -> Result<(Seq, TimeUs), TapError> {
        let _ = label;
        todo!()
    }

    /// Everything of the spool before `position` is durable at every target.
    pub fn release(&self, position: &LogPosition) -> Result<u64, TapError> {
        let _ = position;
        todo!()
    }

    /// Starts a new incarnation whose seqs and times lie above what a target reports.
    pub fn new_incarnation(&self, above_seq: Seq, above_time: TimeUs) -> Result<(), TapError> {
        let _ = (above_seq, above_time);
        todo!()
    }

    /// Copies a whole volume again in an inconsistent span (first copy, repair).
    pub fn copy_volume(&self, volume: VolumeIndex) -> Result<(), TapError> {
        let _ = volume;
        todo!()
    }

    /// Stops: drains, makes durable, leaves the clean marker. Further requests fail.
    pub fn stop(&self) -> Result<(), TapError> {
        todo!()
    }
}
