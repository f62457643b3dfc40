//! Faults on top of any directory: the n-th changing operation fails, or space runs out.
//!
//! Changing operations are counted from 1: create, write, sync, `set_len`, rename, remove. Reads
//! are counted apart. One plan is shared by a directory and all files opened through it.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Directory, File};

/// What happens at the chosen operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails with EIO and does nothing.
    Error,
    /// A write stores the first half, then fails with EIO; other operations act as `Error`.
    Short,
    /// A write stores the first half, then fails with ENOSPC; create and rename fail with ENOSPC.
    /// A sync, `set_len` or removal succeeds.
    NoSpace,
    /// It and everything after it, reads too, fails: the process or machine is gone. A write
    /// stores its first half. Ends with `heal`.
    Stop,
}

#[derive(Debug, Default)]
struct Plan {
    changes: u64,
    reads: u64,
    change_fault: Option<(u64, Fault)>,
    read_fault: Option<u64>,
    stopped: bool,
    /// Bytes that may still be written to new places.
    space: Option<u64>,
}

/// How one write ends.
enum Verdict {
    Pass,
    /// Store this many bytes, then fail.
    Cut(usize, io::Error),
}

/// A directory that fails on demand.
#[derive(Debug)]
pub struct FaultyDirectory {
    inner: Arc<dyn Directory>,
    plan: Arc<Mutex<Plan>>,
}

#[derive(Debug)]
struct FaultyFile {
    inner: Arc<dyn File>,
    plan: Arc<Mutex<Plan>>,
}

fn broken() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

fn full() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOSPC)
}

impl Plan {
    fn fault_of_change(&mut self) -> Option<Fault> {
        if self.stopped {
            return Some(Fault::Stop);
        }
        self.changes += 1;
        let fault = self
            .change_fault
            .filter(|(at, _)| *at == self.changes)
            .map(|(_, f)| f);
        self.stopped = fault == Some(Fault::Stop);
        fault
    }

    /// Verdict on an operation that is not a write.
    fn change(&mut self, needs_space: bool) -> io::Result<()> {
        match self.fault_of_change() {
            Some(Fault::NoSpace) if needs_space => return Err(full()),
            None | Some(Fault::NoSpace) => {}
            Some(_) => return Err(broken()),
        }
        if needs_space && self.space == Some(0) {
            Err(full())
        } else {
            Ok(())
        }
    }

    fn write(&mut self, offset: u64, length: usize, file_length: u64) -> Verdict {
        if self.stopped {
            return Verdict::Cut(0, broken());
        }
        match self.fault_of_change() {
            None => {}
            Some(Fault::Error) => return Verdict::Cut(0, broken()),
            Some(Fault::NoSpace) => return Verdict::Cut(length / 2, full()),
            Some(Fault::Short | Fault::Stop) => return Verdict::Cut(length / 2, broken()),
        }
        let Some(space) = &mut self.space else {
            return Verdict::Pass;
        };
        let grows = (offset + length as u64).saturating_sub(file_length.max(offset));
        if grows <= *space {
            *space -= grows;
            return Verdict::Pass;
        }
        let missing = usize::try_from(grows - *space).unwrap_or(length);
        *space = 0;
        Verdict::Cut(length.saturating_sub(missing), full())
    }

    fn read(&mut self) -> io::Result<()> {
        self.reads += 1;
        if self.stopped || self.read_fault == Some(self.reads) {
            Err(broken())
        } else {
            Ok(())
        }
    }
}

impl FaultyDirectory {
    pub fn new(inner: Arc<dyn Directory>) -> Self {
        Self {
            inner,
            plan: Arc::default(),
        }
    }

    /// The `nth` changing operation from now on (1 is the next one) ends in `fault`.
    pub fn fail_change(&self, nth: u64, fault: Fault) {
        let mut plan = self.plan.lock();
        plan.change_fault = Some((plan.changes + nth, fault));
    }

    /// The `nth` read from now on fails with EIO.
    pub fn fail_read(&self, nth: u64) {
        let mut plan = self.plan.lock();
        plan.read_fault = Some(plan.reads + nth);
    }

    /// `bytes` more may be written to places behind the files' ends, then ENOSPC.
    pub fn limit_space(&self, bytes: u64) {
        self.plan.lock().space = Some(bytes);
    }

    /// Ends all planned faults.
    pub fn heal(&self) {
        let mut plan = self.plan.lock();
        *plan = Plan {
            changes: plan.changes,
            reads: plan.reads,
            ..Plan::default()
        };
    }

    /// Changing operations so far.
    pub fn changes(&self) -> u64 {
        self.plan.lock().changes
    }

    /// Whether a planned `Fault::Stop` has come.
    pub fn stopped(&self) -> bool {
        self.plan.lock().stopped
    }

    fn wrap(&self, inner: Arc<dyn File>) -> Arc<dyn File> {
        Arc::new(FaultyFile {
            inner,
            plan: Arc::clone(&self.plan),
        })
    }
}

impl Directory for FaultyDirectory {
    fn create(&self, name: &str) -> io::Result<Arc<dyn File>> {
        self.plan.lock().change(true)?;
        Ok(self.wrap(self.inner.create(name)?))
    }

    fn open(&self, name: &str, writable: bool) -> io::Result<Arc<dyn File>> {
        self.plan.lock().read()?;
        Ok(self.wrap(self.inner.open(name, writable)?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.plan.lock().change(true)?;
        self.inner.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.plan.lock().change(false)?;
        self.inner.remove(name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.plan.lock().read()?;
        self.inner.list()
    }

    fn sync(&self) -> io::Result<()> {
        self.plan.lock().change(false)?;
        self.inner.sync()
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let free = self.inner.free_bytes()?;
        Ok(self.plan.lock().space.map_or(free, |space| space.min(free)))
    }

    fn lock(&self, name: &str, exclusive: bool) -> io::Result<Box<dyn Send + Sync + Debug>> {
        self.plan.lock().read()?;
        self.inner.lock(name, exclusive)
    }
}

impl File for FaultyFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.plan.lock().read()?;
        self.inner.read_at(buffer, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let length = self.inner.len()?;
        let verdict = self.plan.lock().write(offset, data.len(), length);
        match verdict {
            Verdict::Pass => self.inner.write_at(data, offset),
            Verdict::Cut(stored, error) => {
                if stored > 0 {
                    self.inner.write_at(&data[..stored], offset)?;
                }
                Err(error)
            }
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.plan.lock().change(false)?;
        self.inner.sync_data()
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.plan.lock().change(false)?;
        self.inner.set_len(length)
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
}
