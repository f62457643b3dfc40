//! Overlay: the writable layer of one volume of a view. A sparse data file and a presence map.
//!
//! Order: data is written before a block's state says so; FLUSH makes the data durable, then the
//! states as they were before that, then answers. So a crash shows for every block what was flushed
//! or something newer, never less.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use super::presence::{Binding, OVERLAY_HEADER_LEN, PAIR_LEN, Presence, SLOTS_OFFSET, State};
use crate::constants::BLOCK_SIZE;
use crate::device::DeviceError;
use crate::format::FormatError;
use crate::index::HistoryError;
use crate::log::LogError;
use crate::storage::{Directory, File, is_full, replace_file};

const BLOCK: u64 = BLOCK_SIZE as u64;
/// Zeroes written at once where they must be allocated.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];
/// Fills a block with what lies below the overlay.
type Complete<'a> = dyn FnMut(u64, &mut [u8]) -> Result<(), DeviceError> + 'a;
const EIO: DeviceError = DeviceError::Io(libc::EIO);

/// Bytes that all overlays of a view may hold together.
#[derive(Debug)]
pub struct Space {
    limit: u64,
    used: AtomicU64,
}

impl Space {
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            used: AtomicU64::new(0),
        }
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    fn take(&self, blocks: u64) -> Result<(), DeviceError> {
        let bytes = blocks * BLOCK;
        let fits = |used: u64| {
            used.checked_add(bytes)
                .filter(|sum| bytes == 0 || *sum <= self.limit)
        };
        let taken = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits);
        taken.map(|_| ()).map_err(|_| DeviceError::NoSpace)
    }

    /// What an overlay of an earlier process holds is there, limit or not.
    fn account(&self, blocks: u64) {
        self.used.fetch_add(blocks * BLOCK, Ordering::Relaxed);
    }

    fn give_back(&self, blocks: u64) {
        self.used.fetch_sub(blocks * BLOCK, Ordering::Relaxed);
    }
}

#[derive(Debug)]
pub struct Overlay {
    data: Arc<dyn File>,
    map: Arc<dyn File>,
    presence: RwLock<Presence>,
    /// Shared by writes of blocks for which this layer has a place already or that they cover;
    /// alone for what reads, changes and writes back a block, and for what takes content away.
    gate: RwLock<()>,
    flushing: Mutex<()>,
    /// A write or sync failed: what is durable is unknown, so nothing more is accepted.
    poisoned: AtomicBool,
    space: Arc<Space>,
    /// Held so that no second view writes here.
    _lock: Box<dyn Send + Sync + std::fmt::Debug>,
}

impl Overlay {
    /// Opens or creates the layer of one volume.
    pub fn open(
        directory: &dyn Directory,
        binding: Binding,
        space: Arc<Space>,
    ) -> Result<Self, HistoryError> {
        let stem = format!("volume-{:04x}", binding.volume.0);
        let (data_name, map_name) = (format!("{stem}.data"), format!("{stem}.map"));
        let failed = |file: &str, source: LogError| HistoryError::Overlay {
            file: file.to_owned(),
            source,
        };
        let io_failed = |file: &str, action: &'static str| {
            let file = file.to_owned();
            move |source: io::Error| {
                let source = if is_full(&source) {
                    LogError::NoSpace
                } else if source.kind() == io::ErrorKind::WouldBlock {
                    LogError::Locked
                } else {
                    LogError::Io { action, source }
                };
                HistoryError::Overlay { file, source }
            }
        };
        let lock_name = format!("{stem}.lock");
        let lock = directory
            .lock(&lock_name, true)
            .map_err(io_failed(&lock_name, "locking"))?;
        let names = directory.list().map_err(io_failed(&map_name, "listing"))?;
        if !names.contains(&data_name) {
            if names.contains(&map_name) {
                let gone = io::Error::from(io::ErrorKind::NotFound);
                return Err(io_failed(&data_name, "opening")(gone));
            }
            directory
                .create(&data_name)
                .map_err(io_failed(&data_name, "creating"))?;
        }
        if !names.contains(&map_name) {
            // The map appears whole or not at all, and the data file's name with it.
            replace_file(directory, &map_name, &binding.encode())
                .map_err(io_failed(&map_name, "creating"))?;
        }
        let data = directory
            .open(&data_name, true)
            .map_err(io_failed(&data_name, "opening"))?;
        let map = directory
            .open(&map_name, true)
            .map_err(io_failed(&map_name, "opening"))?;
        let mut header = [0u8; OVERLAY_HEADER_LEN];
        let have = map
            .read_at(&mut header, 0)
            .map_err(io_failed(&map_name, "reading"))?;
        binding
            .check(&header[..have])
            .map_err(|error| failed(&map_name, error.into()))?;
        let presence = load(&map, &map_name, binding.blocks)?;
        space.account(presence.data_blocks());
        Ok(Self {
            data,
            map,
            presence: RwLock::new(presence),
            gate: RwLock::new(()),
            flushing: Mutex::new(()),
            poisoned: AtomicBool::new(false),
            space,
            _lock: lock,
        })
    }

    /// State of `block` and of how many blocks from it on, at most `max`.
    pub fn run(&self, block: u64, max: u64) -> (State, u64) {
        self.presence.read().run(block, max)
    }

    /// Reads from the data file; what it does not reach reads as zeroes.
    pub fn read_data(&self, buffer: &mut [u8], offset: u64) -> Result<(), DeviceError> {
        let read = self.data.read_at(buffer, offset).map_err(|_| EIO)?;
        buffer[read..].fill(0);
        Ok(())
    }

    /// Writes at any alignment. `complete` fills a whole block with its content below the write
    /// and is asked for blocks that the data file has no content of.
    pub fn write(
        &self,
        data: &[u8],
        offset: u64,
        complete: &mut Complete<'_>,
    ) -> Result<(), DeviceError> {
        self.check()?;
        if data.is_empty() {
            return Ok(());
        }
        let end = offset + data.len() as u64;
        let (first, behind) = (offset / BLOCK, end.div_ceil(BLOCK));
        let edges = || {
            [
                (first, !offset.is_multiple_of(BLOCK)),
                (behind - 1, !end.is_multiple_of(BLOCK)),
            ]
            .into_iter()
            .filter(|(_, partial)| *partial)
            .map(|(block, _)| block)
        };
        let in_place = || {
            let presence = self.presence.read();
            edges().all(|block| presence.state(block) == State::Data)
        };
        {
            let _shared = self.gate.read();
            if in_place() {
                return self.put(data, offset, first, behind - first);
            }
        }
        let _alone = self.gate.write();
        let mut whole = vec![0u8; to_usize(behind - first) * BLOCK_SIZE];
        for block in edges() {
            let at = to_usize(block - first) * BLOCK_SIZE;
            let buffer = &mut whole[at..at + BLOCK_SIZE];
            let state = self.presence.read().state(block);
            match state {
                State::Data => self.read_data(buffer, block * BLOCK)?,
                State::Below => complete(block, buffer)?,
                State::Zero | State::Discarded => {}
            }
        }
        let from = to_usize(offset - first * BLOCK);
        whole[from..from + data.len()].copy_from_slice(data);
        self.put(&whole, first * BLOCK, first, behind - first)
    }

    /// Writes data, then the states of its blocks.
    fn put(&self, data: &[u8], offset: u64, first: u64, count: u64) -> Result<(), DeviceError> {
        let new = count - self.presence.read().data_in(first, count);
        self.space.take(new)?;
        if let Err(error) = self.data.write_at(data, offset) {
            self.space.give_back(new);
            // A full disk changed nothing that was promised; anything else may have.
            return Err(if is_full(&error) {
                DeviceError::NoSpace
            } else {
                self.poison()
            });
        }
        let before = self.presence.write().set(first, count, State::Data);
        // Another writer may have been first with some of these blocks.
        self.space.give_back(new - (count - before).min(new));
        Ok(())
    }

    /// Makes whole blocks read as zeroes, without content in the data file.
    pub fn clear(&self, first: u64, count: u64, state: State) -> Result<(), DeviceError> {
        self.check()?;
        let _alone = self.gate.write();
        let mut at = first;
        while at < first + count {
            let (old, run) = self.run(at, first + count - at);
            if old == State::Data {
                // Only gives space back; the state decides what is read.
                self.data
                    .punch(at * BLOCK, run * BLOCK)
                    .map_err(|_| self.poison())?;
            }
            at += run;
        }
        let before = self.presence.write().set(first, count, state);
        self.space.give_back(before);
        Ok(())
    }

    /// Writes zeroes that take space.
    pub fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        complete: &mut Complete<'_>,
    ) -> Result<(), DeviceError> {
        let (mut at, end) = (offset, offset + length);
        while at < end {
            // Pieces end at block borders, so that only the outer edges need completion.
            let piece = (ZEROES.len() as u64 - at % BLOCK).min(end - at);
            self.write(&ZEROES[..to_usize(piece)], at, complete)?;
            at += piece;
        }
        Ok(())
    }

    /// Makes everything answered before the call durable.
    pub fn flush(&self) -> Result<(), DeviceError> {
        let _turn = self.flushing.lock();
        self.check()?;
        // States first, then data: a state taken here is of data written already.
        let slots = self.presence.write().take_dirty();
        self.data.sync_data().map_err(|_| self.poison())?;
        if slots.is_empty() {
            return Ok(());
        }
        for slot in &slots {
            self.map
                .write_at(&slot.bytes, slot.offset)
                .map_err(|_| self.poison())?;
        }
        self.map.sync_data().map_err(|_| self.poison())
    }

    fn check(&self) -> Result<(), DeviceError> {
        if self.poisoned.load(Ordering::Acquire) {
            Err(EIO)
        } else {
            Ok(())
        }
    }

    fn poison(&self) -> DeviceError {
        self.poisoned.store(true, Ordering::Release);
        EIO
    }
}

fn load(map: &Arc<dyn File>, name: &str, blocks: u64) -> Result<Presence, HistoryError> {
    let overlay = |source| HistoryError::Overlay {
        file: name.to_owned(),
        source,
    };
    let failed = |source| {
        overlay(LogError::Io {
            action: "reading",
            source,
        })
    };
    let mut presence = Presence::new(blocks);
    let length = map.len().map_err(failed)?;
    let mut buffer = vec![0u8; 64 * to_usize(PAIR_LEN)];
    let (mut offset, mut pair) = (SLOTS_OFFSET, 0);
    while offset < length {
        let read = map.read_at(&mut buffer, offset).map_err(failed)?;
        if read == 0 {
            break;
        }
        for bytes in buffer[..read].chunks(to_usize(PAIR_LEN)) {
            let damaged = |source: FormatError| {
                let offset = SLOTS_OFFSET + pair * PAIR_LEN;
                overlay(LogError::Damaged {
                    segment: name.to_owned(),
                    offset,
                    source,
                })
            };
            presence.load(pair, bytes).map_err(damaged)?;
            pair += 1;
        }
        offset += buffer.len() as u64;
    }
    Ok(presence)
}

fn to_usize(number: u64) -> usize {
    usize::try_from(number).expect("invariant: 64-bit host")
}
