//! One protected volume of a running tap: backing, range lock, bitmaps, group sync.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};

use super::VolumeConfig;
use super::backing::Backing;
use super::completion::CompletionCache;
use super::intent::IntentBitmap;
use super::range_lock::RangeLock;
use super::unreadable::Unreadable;
use crate::constants::BLOCK_SIZE;
use crate::device::DeviceError;

#[derive(Debug)]
pub struct Volume {
    /// Position in the tap's list.
    pub slot: u16,
    pub config: VolumeConfig,
    pub size: u64,
    pub backing: Arc<dyn Backing>,
    pub ranges: RangeLock,
    pub completion: CompletionCache,
    pub intent: IntentBitmap,
    pub unreadable: Unreadable,
    sync: GroupSync,
    /// Changes of the backing that have returned. Starts at 1: an earlier process may have written
    /// what was never synced.
    changes: AtomicU64,
}

/// One fdatasync for all who wait.
#[derive(Debug, Default)]
struct GroupSync {
    state: Mutex<SyncState>,
    done: Condvar,
}

#[derive(Debug, Default)]
struct SyncState {
    running: bool,
    synced: u64,
    /// A failed sync may have dropped data: it is not retried, every later one fails too.
    failed: Option<i32>,
}

impl Volume {
    pub fn new(
        slot: u16,
        config: VolumeConfig,
        backing: Arc<dyn Backing>,
        intent: IntentBitmap,
    ) -> Self {
        Self {
            slot,
            size: backing.size(),
            unreadable: Unreadable::new(backing.size()),
            config,
            backing,
            ranges: RangeLock::default(),
            completion: CompletionCache::default(),
            intent,
            sync: GroupSync::default(),
            changes: AtomicU64::new(1),
        }
    }

    /// A write to the backing has returned.
    pub fn changed(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether nothing was written since the last sync.
    pub fn is_synced(&self) -> bool {
        let state = self.sync.state.lock();
        state.failed.is_none() && state.synced >= self.changes.load(Ordering::SeqCst)
    }

    /// Makes every change that returned before the call durable, together with other callers.
    pub fn sync(&self) -> Result<(), DeviceError> {
        let target = self.changes.load(Ordering::SeqCst);
        let mut state = self.sync.state.lock();
        loop {
            if let Some(errno) = state.failed {
                return Err(DeviceError::Io(errno));
            }
            if state.synced >= target {
                return Ok(());
            }
            if state.running {
                self.sync.done.wait(&mut state);
                continue;
            }
            state.running = true;
            let upto = self.changes.load(Ordering::SeqCst);
            drop(state);
            let outcome = self.backing.sync();
            state = self.sync.state.lock();
            state.running = false;
            match outcome {
                Ok(()) => state.synced = state.synced.max(upto),
                Err(error) => state.failed = Some(errno_of(&error)),
            }
            self.sync.done.notify_all();
        }
    }

    /// Reads one block, zero-padded where the volume ends inside it. The caller holds its range.
    pub fn read_block(
        &self,
        block: u64,
        out: &mut [u8; BLOCK_SIZE],
        nowait: bool,
    ) -> io::Result<()> {
        if self.completion.get(block, out) {
            return Ok(());
        }
        let offset = block * BLOCK_SIZE as u64;
        let length = usize::try_from((self.size - offset).min(BLOCK_SIZE as u64))
            .expect("invariant: at most a block");
        out[length..].fill(0);
        self.backing.read(&mut out[..length], offset, nowait)
    }

    /// Blocks of the volume; the last may be partial.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK_SIZE as u64)
    }
}

pub fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// What a client is told about a failed operation of the backing.
pub fn device_error(error: &io::Error) -> DeviceError {
    match error.kind() {
        io::ErrorKind::WouldBlock => DeviceError::WouldBlock,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => DeviceError::NoSpace,
        _ => DeviceError::Io(errno_of(error)),
    }
}

pub fn too_large() -> io::Error {
    io::ErrorKind::FileTooLarge.into()
}
