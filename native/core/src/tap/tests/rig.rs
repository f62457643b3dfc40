//! A tap over media in memory, each of which can lose what was not synced on its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::replay::Replay;
use crate::crypto::{GroupKey, Suite};
use crate::device::{BlockDevice, RequestFlags};
use crate::storage::{Directory, Loss, MemoryDirectory};
use crate::tap::{
    Backing, IncarnationLimits, StorageBacking, Tap, TapConfig, TapError, TapParts, TimeSource,
    VolumeConfig,
};
use crate::types::{Generation, GroupId, VolumeIndex};

pub const GROUP: GroupId = GroupId([0x47; 16]);
pub const WAITS: RequestFlags = RequestFlags {
    fua: false,
    nowait: false,
    no_hole: false,
};
pub const FUA: RequestFlags = RequestFlags {
    fua: true,
    nowait: false,
    no_hole: false,
};
pub const NOWAIT: RequestFlags = RequestFlags {
    fua: false,
    nowait: true,
    no_hole: false,
};

pub fn key() -> GroupKey {
    GroupKey([0x4b; 32])
}

/// Clocks that a test moves.
#[derive(Debug)]
pub struct ManualTime {
    start: Instant,
    pub wall_us: AtomicU64,
    pub boot: AtomicU64,
}

impl Default for ManualTime {
    fn default() -> Self {
        let wall_us = AtomicU64::new(1_700_000_000_000_000);
        Self {
            start: Instant::now(),
            wall_us,
            boot: AtomicU64::new(1),
        }
    }
}

impl TimeSource for ManualTime {
    fn boot_us(&self) -> u64 {
        1_000_000 + u64::try_from(self.start.elapsed().as_micros()).unwrap()
    }

    fn wall_us(&self) -> u64 {
        self.wall_us.load(Ordering::SeqCst) + self.boot_us()
    }

    fn boot_id(&self) -> [u8; 16] {
        [self.boot.load(Ordering::SeqCst) as u8; 16]
    }
}

#[derive(Debug)]
pub struct Rig {
    pub spool: MemoryDirectory,
    pub state: MemoryDirectory,
    pub disk: MemoryDirectory,
    pub sizes: Vec<u64>,
    pub time: Arc<ManualTime>,
    pub spool_bytes_max: u64,
    pub queue_bytes: usize,
    pub stuck: Duration,
    pub checkpoint: Duration,
    pub incarnation: IncarnationLimits,
    pub key: Option<GroupKey>,
    /// The group has no target.
    pub kept: bool,
    /// Between tap and media, for faults.
    pub spool_through: Option<Arc<dyn Directory>>,
    pub disk_through: Option<Arc<dyn Directory>>,
}

impl Rig {
    pub fn new(sizes: &[u64]) -> Self {
        let disk = MemoryDirectory::new();
        for (index, size) in sizes.iter().enumerate() {
            disk.place(
                &format!("volume{index}"),
                &vec![0; usize::try_from(*size).unwrap()],
            );
        }
        Self {
            spool: MemoryDirectory::new(),
            state: MemoryDirectory::new(),
            disk,
            sizes: sizes.to_vec(),
            time: Arc::default(),
            spool_bytes_max: u64::MAX,
            queue_bytes: 8 << 20,
            stuck: Duration::from_secs(20),
            checkpoint: Duration::from_secs(3600),
            incarnation: IncarnationLimits::default(),
            key: Some(key()),
            kept: false,
            spool_through: None,
            disk_through: None,
        }
    }

    pub fn config(&self) -> TapConfig {
        let volume = |index: usize| VolumeConfig {
            index: VolumeIndex(u16::try_from(index).unwrap()),
            name: format!("volume{index}"),
            backing: PathBuf::from(format!("volume{index}")),
        };
        TapConfig {
            group: GROUP,
            generation: Generation {
                counter: 1,
                site: 1,
            },
            suite: Suite::Aes256Gcm,
            key: self.key.clone(),
            volumes: (0..self.sizes.len()).map(volume).collect(),
            spool: PathBuf::from("spool"),
            state: PathBuf::from("state"),
            spool_bytes_max: self.spool_bytes_max,
            cache_bytes: 4 << 20,
            frame_delay_ms: 2,
            kept: self.kept,
        }
    }

    pub fn backing(&self, index: usize) -> Arc<dyn Backing> {
        let name = format!("volume{index}");
        let file = match &self.disk_through {
            Some(directory) => directory.open(&name, true).unwrap(),
            None => self.disk.open(&name, true).unwrap(),
        };
        Arc::new(StorageBacking::new(file).unwrap())
    }

    pub fn parts(&self) -> TapParts {
        let backings = (0..self.sizes.len())
            .map(|index| self.backing(index))
            .collect();
        let spool = self
            .spool_through
            .clone()
            .unwrap_or_else(|| Arc::new(self.spool.clone()));
        let state = Arc::new(self.state.clone());
        let mut parts = TapParts::with(spool, state, backings);
        parts.time = Arc::clone(&self.time) as Arc<dyn TimeSource>;
        parts.queue_bytes = self.queue_bytes;
        parts.stuck = self.stuck;
        parts.checkpoint_interval = self.checkpoint;
        parts.incarnation = self.incarnation;
        parts
    }

    pub fn start(&self) -> Arc<Tap> {
        self.try_start().unwrap()
    }

    pub fn try_start(&self) -> Result<Arc<Tap>, TapError> {
        Tap::start_with(self.config(), self.parts())
    }

    /// What a power cut leaves: each medium loses on its own. May be called while a tap runs. The
    /// disk goes first: what the tap still does to state and spool afterwards it could have done
    /// before, as no write to the disk can follow.
    pub fn crash(&mut self, spool: Loss, state: Loss, disk: Loss) {
        self.disk = self.disk.crash(disk);
        self.state = self.state.crash(state);
        self.spool = self.spool.crash(spool);
    }

    pub fn content(&self, index: usize) -> Vec<u8> {
        self.disk.content(&format!("volume{index}")).unwrap()
    }

    pub fn replay(&self, tap: &Tap) -> Replay {
        Replay::read(Arc::new(self.spool.clone()), GROUP, &key(), &tap.log_end())
    }

    /// Everything recorded, no span open, and newest history equal to every backing.
    pub fn check(&self, tap: &Tap) -> Replay {
        settle(tap);
        let replay = self.replay(tap);
        assert!(!replay.in_span(), "the span has ended");
        for (index, size) in self.sizes.iter().enumerate() {
            let (held, history) = (self.content(index), replay.newest(index as u16, *size));
            if let Some(at) = (0..held.len()).find(|at| held[*at] != history[*at]) {
                panic!("volume {index} differs from history at byte {at}");
            }
        }
        replay
    }
}

pub fn device(tap: &Tap, index: u16) -> Arc<dyn BlockDevice> {
    tap.device(VolumeIndex(index)).unwrap()
}

pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until nothing is left to copy and everything is in the spool.
pub fn settle(tap: &Tap) {
    eventually("a settled tap", || {
        let status = tap.status();
        status.mode == "recording"
            && !status.in_span
            && status.copy_regions_left == 0
            && status.spooled_seq == status.last_seq
    });
}

/// xorshift64*, seeded.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }
}
