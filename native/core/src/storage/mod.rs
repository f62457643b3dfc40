//! The only door to files that hold history or state: real files, memory, and faults.
//!
//! `memory` keeps a live and a durable image of each file and can forget un-synced data;
//! `faulty` fails or cuts at the n-th operation. Crash tests run the real log over them.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

/// One open file.
pub trait File: Send + Sync + Debug {
    /// Reads until `buffer` is full or the file ends; returns the bytes read.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()>;
    fn sync_data(&self) -> io::Result<()>;
    fn set_len(&self, length: u64) -> io::Result<()>;
    fn len(&self) -> io::Result<u64>;
}

/// One directory of files, flat. Names are plain file names.
pub trait Directory: Send + Sync + Debug {
    /// Creates a file that must not exist.
    fn create(&self, name: &str) -> io::Result<Arc<dyn File>>;
    fn open(&self, name: &str, writable: bool) -> io::Result<Arc<dyn File>>;
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    fn remove(&self, name: &str) -> io::Result<()>;
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes creations, renames and removals durable.
    fn sync(&self) -> io::Result<()>;
    /// Bytes free for the caller on the medium.
    fn free_bytes(&self) -> io::Result<u64>;
    /// Takes an advisory lock on `name` (created if absent), held until the guard is dropped.
    /// `WouldBlock` if another process holds it in a way that conflicts.
    fn lock(&self, name: &str, exclusive: bool) -> io::Result<Box<dyn Send + Sync + Debug>>;
}
