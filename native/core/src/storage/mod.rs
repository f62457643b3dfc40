//! The only door to files that hold history or state: real files, memory, and faults.
//!
//! `memory` keeps a live and a durable image of each file and can forget un-synced data;
//! `faulty` fails or cuts at the n-th operation. Crash tests run the real log over them.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

mod disk;
pub mod faulty;
pub mod memory;

pub use disk::DiskDirectory;
pub use faulty::{Fault, FaultyDirectory};
pub use memory::{Loss, MemoryDirectory};

/// One open file.
pub trait File: Send + Sync + Debug {
    /// Reads until `buffer` is full or the file ends; returns the bytes read.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `data`. After an error any part of it may have been written.
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()>;
    /// Makes data and length durable. After an error the un-synced data may be gone for good.
    fn sync_data(&self) -> io::Result<()>;
    fn set_len(&self, length: u64) -> io::Result<()>;
    fn len(&self) -> io::Result<u64>;

    /// Gives the space of a range back if the medium can; the length stays. What the range reads as
    /// is not specified until it is written again.
    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let _ = (offset, length);
        Ok(())
    }

    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// One directory of files, flat. Names are plain file names.
pub trait Directory: Send + Sync + Debug {
    /// Creates a file that must not exist.
    fn create(&self, name: &str) -> io::Result<Arc<dyn File>>;
    fn open(&self, name: &str, writable: bool) -> io::Result<Arc<dyn File>>;
    /// Renames; `to` is replaced if it exists.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Names of all files, sorted.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes creations, renames and removals durable.
    fn sync(&self) -> io::Result<()>;
    /// Bytes free for the caller on the medium.
    fn free_bytes(&self) -> io::Result<u64>;
    /// Takes an advisory lock on `name` (created if absent), held until the guard is dropped.
    /// `WouldBlock` if another holder has it in a way that conflicts.
    fn lock(&self, name: &str, exclusive: bool) -> io::Result<Box<dyn Send + Sync + Debug>>;
}

/// Whether an error says that the medium (or the quota) is full.
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// Refuses what is not a plain file name: the doors above never leave their directory.
fn check_name(name: &str) -> io::Result<()> {
    let plain = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0']);
    if plain {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a plain file name",
        ))
    }
}

/// Reads a whole file that must not be longer than `limit` bytes.
pub fn read_file(directory: &dyn Directory, name: &str, limit: u64) -> io::Result<Vec<u8>> {
    let file = directory.open(name, false)?;
    let length = file.len()?;
    if length > limit {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "file exceeds its limit",
        ));
    }
    let length = usize::try_from(length)
        .map_err(|_| io::Error::new(io::ErrorKind::FileTooLarge, "file exceeds memory"))?;
    let mut bytes = vec![0; length];
    let read = file.read_at(&mut bytes, 0)?;
    bytes.truncate(read);
    Ok(bytes)
}

/// Replaces a small file atomically and durably: `name.new`, sync, rename, directory sync.
/// After an error the old content or, if the last sync failed, either content is found.
pub fn replace_file(directory: &dyn Directory, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = format!("{name}.new");
    match directory.remove(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = directory.create(&temporary)?;
    file.write_at(bytes, 0)?;
    file.sync_data()?;
    directory.rename(&temporary, name)?;
    directory.sync()
}

#[cfg(test)]
mod tests;
