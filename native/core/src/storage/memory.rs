//! Files in memory that know what a power cut would leave.
//!
//! Each file has a live image and the durable image of its last sync; so has the list of names.
//! What came since is kept as a list of changes, from which a crash keeps none, or a random subset
//! (each write lost, kept, or kept in some of its sectors; each change of the names lost or kept).
//! That is harsher than most file systems and allowed by POSIX.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Directory, File, check_name};
use crate::constants::SECTOR_SIZE;

/// What a crash does to data that was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Nothing is lost: only the processes died.
    Nothing,
    /// All of it is lost.
    Everything,
    /// A subset drawn from this seed is lost, writes are torn at sectors.
    Random(u64),
}

type NodeId = u64;

#[derive(Debug, Clone)]
enum Change {
    Write { offset: usize, data: Vec<u8> },
    SetLen(usize),
}

#[derive(Debug, Clone)]
enum NameChange {
    Link(String, NodeId),
    Rename {
        from: String,
        to: String,
        node: NodeId,
    },
    Remove(String),
}

#[derive(Debug, Clone, Default)]
struct Node {
    live: Vec<u8>,
    durable: Vec<u8>,
    changes: Vec<Change>,
}

#[derive(Debug, Default)]
struct State {
    /// Grows with each crash; handles of an earlier epoch belong to dead processes.
    epoch: u64,
    next_node: NodeId,
    nodes: BTreeMap<NodeId, Node>,
    names: BTreeMap<String, NodeId>,
    durable_names: BTreeMap<String, NodeId>,
    name_changes: Vec<NameChange>,
    capacity: Option<u64>,
    /// Holders of each lock; -1 is one exclusive holder.
    locks: BTreeMap<String, i64>,
}

/// A directory in memory. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct MemoryDirectory {
    state: Arc<Mutex<State>>,
    epoch: u64,
}

#[derive(Debug)]
struct MemoryFile {
    state: Arc<Mutex<State>>,
    epoch: u64,
    node: NodeId,
    writable: bool,
}

#[derive(Debug)]
struct MemoryLock {
    state: Arc<Mutex<State>>,
    epoch: u64,
    name: String,
    exclusive: bool,
}

/// xorshift64*: seeded, so that a failing case can be run again.
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }
}

fn not_found() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

fn put(image: &mut Vec<u8>, offset: usize, data: &[u8]) {
    let end = offset + data.len();
    if image.len() < end {
        image.resize(end, 0);
    }
    image[offset..end].copy_from_slice(data);
}

fn index(offset: u64) -> io::Result<usize> {
    usize::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

fn change_names(names: &mut BTreeMap<String, NodeId>, change: &NameChange) {
    match change {
        NameChange::Link(name, node) => {
            names.insert(name.clone(), *node);
        }
        NameChange::Rename { from, to, node } => {
            // The creation of `from` may itself have been lost; then only the new name is there.
            if names.get(from) == Some(node) {
                names.remove(from);
            }
            names.insert(to.clone(), *node);
        }
        NameChange::Remove(name) => {
            names.remove(name);
        }
    }
}

impl Node {
    /// What the medium holds after a crash.
    fn after_crash(&self, loss: Loss, random: &mut Random) -> Vec<u8> {
        match loss {
            Loss::Nothing => self.live.clone(),
            Loss::Everything => self.durable.clone(),
            Loss::Random(_) => {
                let mut image = self.durable.clone();
                for change in &self.changes {
                    match change {
                        Change::SetLen(length) if random.below(2) == 0 => image.resize(*length, 0),
                        Change::SetLen(_) => {}
                        Change::Write { offset, data } => {
                            Self::keep_some(&mut image, *offset, data, random);
                        }
                    }
                }
                image
            }
        }
    }

    /// Keeps nothing, all, or some sectors of a write.
    fn keep_some(image: &mut Vec<u8>, offset: usize, data: &[u8], random: &mut Random) {
        match random.below(3) {
            0 => {}
            1 => put(image, offset, data),
            _ => {
                let mut start = 0;
                while start < data.len() {
                    let sector_left = SECTOR_SIZE - (offset + start) % SECTOR_SIZE;
                    let end = (start + sector_left).min(data.len());
                    if random.below(2) == 0 {
                        put(image, offset + start, &data[start..end]);
                    }
                    start = end;
                }
            }
        }
    }
}

impl State {
    fn check_epoch(&self, epoch: u64) -> io::Result<()> {
        if self.epoch == epoch {
            Ok(())
        } else {
            Err(io::Error::other(
                "the machine has crashed since this was opened",
            ))
        }
    }

    fn used(&self) -> u64 {
        self.names
            .values()
            .map(|node| self.nodes[node].live.len() as u64)
            .sum()
    }

    fn change_names(&mut self, change: NameChange) {
        change_names(&mut self.names, &change);
        self.name_changes.push(change);
    }

    fn crash(&mut self, loss: Loss) {
        let mut random = Random::new(if let Loss::Random(seed) = loss {
            seed
        } else {
            0
        });
        let names = match loss {
            Loss::Nothing => self.names.clone(),
            Loss::Everything => self.durable_names.clone(),
            Loss::Random(_) => {
                let mut names = self.durable_names.clone();
                for change in &self.name_changes {
                    if random.below(2) == 0 {
                        change_names(&mut names, change);
                    }
                }
                names
            }
        };
        let mut nodes = BTreeMap::new();
        for node in names.values() {
            let image = self.nodes[node].after_crash(loss, &mut random);
            nodes.insert(
                *node,
                Node {
                    live: image.clone(),
                    durable: image,
                    changes: Vec::new(),
                },
            );
        }
        self.epoch += 1;
        self.nodes = nodes;
        self.durable_names.clone_from(&names);
        self.names = names;
        self.name_changes.clear();
        self.locks.clear();
    }
}

impl MemoryDirectory {
    pub fn new() -> Self {
        Self::default()
    }

    /// The directory as the next boot finds it. Handles, locks and clones made before are dead:
    /// their operations fail.
    #[must_use = "the directory before the crash is dead"]
    pub fn crash(&self, loss: Loss) -> Self {
        let mut state = self.state.lock();
        state.crash(loss);
        Self {
            state: Arc::clone(&self.state),
            epoch: state.epoch,
        }
    }

    /// An independent copy of the whole directory, un-synced data included; without locks.
    #[must_use]
    pub fn fork(&self) -> Self {
        let state = self.state.lock();
        let copy = State {
            epoch: 0,
            next_node: state.next_node,
            nodes: state.nodes.clone(),
            names: state.names.clone(),
            durable_names: state.durable_names.clone(),
            name_changes: state.name_changes.clone(),
            capacity: state.capacity,
            locks: BTreeMap::new(),
        };
        Self {
            state: Arc::new(Mutex::new(copy)),
            epoch: 0,
        }
    }

    /// Bytes that all files together may hold; `None` is no limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state.lock().capacity = bytes;
    }

    /// Live content of a file.
    pub fn content(&self, name: &str) -> Option<Vec<u8>> {
        let state = self.state.lock();
        state
            .names
            .get(name)
            .map(|node| state.nodes[node].live.clone())
    }

    /// Places a file, durable at once, past every limit: what damage and tests do.
    pub fn place(&self, name: &str, content: &[u8]) {
        let mut state = self.state.lock();
        let node = state.next_node;
        state.next_node += 1;
        let image = content.to_vec();
        state.nodes.insert(
            node,
            Node {
                live: image.clone(),
                durable: image,
                changes: vec![],
            },
        );
        state.names.insert(name.to_owned(), node);
        state.durable_names.insert(name.to_owned(), node);
    }
}

impl Directory for MemoryDirectory {
    fn create(&self, name: &str) -> io::Result<Arc<dyn File>> {
        check_name(name)?;
        let mut state = self.state.lock();
        state.check_epoch(self.epoch)?;
        if state.names.contains_key(name) {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        let node = state.next_node;
        state.next_node += 1;
        state.nodes.insert(node, Node::default());
        state.change_names(NameChange::Link(name.to_owned(), node));
        let state = Arc::clone(&self.state);
        Ok(Arc::new(MemoryFile {
            state,
            epoch: self.epoch,
            node,
            writable: true,
        }))
    }

    fn open(&self, name: &str, writable: bool) -> io::Result<Arc<dyn File>> {
        check_name(name)?;
        let state = self.state.lock();
        state.check_epoch(self.epoch)?;
        let node = *state.names.get(name).ok_or_else(not_found)?;
        let state = Arc::clone(&self.state);
        Ok(Arc::new(MemoryFile {
            state,
            epoch: self.epoch,
            node,
            writable,
        }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        check_name(from)?;
        check_name(to)?;
        let mut state = self.state.lock();
        state.check_epoch(self.epoch)?;
        let node = *state.names.get(from).ok_or_else(not_found)?;
        let (from, to) = (from.to_owned(), to.to_owned());
        state.change_names(NameChange::Rename { from, to, node });
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        check_name(name)?;
        let mut state = self.state.lock();
        state.check_epoch(self.epoch)?;
        if !state.names.contains_key(name) {
            return Err(not_found());
        }
        state.change_names(NameChange::Remove(name.to_owned()));
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let state = self.state.lock();
        state.check_epoch(self.epoch)?;
        Ok(state.names.keys().cloned().collect())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        state.check_epoch(self.epoch)?;
        state.durable_names = state.names.clone();
        state.name_changes.clear();
        Ok(())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let state = self.state.lock();
        state.check_epoch(self.epoch)?;
        Ok(state
            .capacity
            .map_or(u64::MAX, |capacity| capacity.saturating_sub(state.used())))
    }

    fn lock(&self, name: &str, exclusive: bool) -> io::Result<Box<dyn Send + Sync + Debug>> {
        check_name(name)?;
        let mut state = self.state.lock();
        state.check_epoch(self.epoch)?;
        if !state.names.contains_key(name) {
            let node = state.next_node;
            state.next_node += 1;
            state.nodes.insert(node, Node::default());
            state.change_names(NameChange::Link(name.to_owned(), node));
        }
        let holders = state.locks.entry(name.to_owned()).or_insert(0);
        if *holders < 0 || (exclusive && *holders > 0) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        *holders = if exclusive { -1 } else { *holders + 1 };
        let state = Arc::clone(&self.state);
        Ok(Box::new(MemoryLock {
            state,
            epoch: self.epoch,
            name: name.to_owned(),
            exclusive,
        }))
    }
}

impl Drop for MemoryLock {
    fn drop(&mut self) {
        let mut state = self.state.lock();
        if state.epoch == self.epoch
            && let Some(holders) = state.locks.get_mut(&self.name)
        {
            *holders = if self.exclusive { 0 } else { *holders - 1 };
        }
    }
}

impl MemoryFile {
    fn with<T>(&self, action: impl FnOnce(&mut Node) -> T) -> io::Result<T> {
        let mut state = self.state.lock();
        state.check_epoch(self.epoch)?;
        // An open file outlives its name; only a crash takes the node, and then the epoch.
        let node = state.nodes.get_mut(&self.node).ok_or_else(not_found)?;
        Ok(action(node))
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.writable {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::EBADF))
        }
    }
}

impl File for MemoryFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let offset = index(offset)?;
        self.with(|node| {
            let tail = node.live.get(offset..).unwrap_or(&[]);
            let length = tail.len().min(buffer.len());
            buffer[..length].copy_from_slice(&tail[..length]);
            length
        })
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.check_writable()?;
        let start = index(offset)?;
        let free = {
            let state = self.state.lock();
            state.check_epoch(self.epoch)?;
            state
                .capacity
                .map(|capacity| capacity.saturating_sub(state.used()))
        };
        let cut = self.with(|node| {
            let grows = (start + data.len()).saturating_sub(node.live.len().max(start));
            let missing = free.map_or(0, |free| (grows as u64).saturating_sub(free));
            let stored = &data[..data.len() - index(missing).unwrap_or(data.len())];
            if !stored.is_empty() {
                put(&mut node.live, start, stored);
                node.changes.push(Change::Write {
                    offset: start,
                    data: stored.to_vec(),
                });
            }
            stored.len() < data.len()
        })?;
        if cut {
            Err(io::Error::from_raw_os_error(libc::ENOSPC))
        } else {
            Ok(())
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.with(|node| {
            // Images of many MiB are not copied for a few changes.
            let (durable, changes) = (&mut node.durable, &mut node.changes);
            for change in changes.drain(..) {
                match change {
                    Change::Write { offset, data } => put(durable, offset, &data),
                    Change::SetLen(length) => durable.resize(length, 0),
                }
            }
        })
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.check_writable()?;
        let length = index(length)?;
        self.with(|node| {
            node.live.resize(length, 0);
            node.changes.push(Change::SetLen(length));
        })
    }

    fn len(&self) -> io::Result<u64> {
        self.with(|node| node.live.len() as u64)
    }
}
