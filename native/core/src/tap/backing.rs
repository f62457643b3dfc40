//! Where the volume's data is: the device or file behind the tap.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use super::intent::Identity;
use crate::constants::REGION_BYTES;
use crate::storage::File;

/// A run of the backing that reads as zeroes, or may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub length: u64,
    pub hole: bool,
}

/// Random access to the data of one volume. Offsets and lengths lie inside `size`.
pub trait Backing: Send + Sync + Debug {
    /// Bytes, fixed while open.
    fn size(&self) -> u64;

    /// Fills `buffer`. With `nowait`, `WouldBlock` rather than wait for a disk.
    fn read(&self, buffer: &mut [u8], offset: u64, nowait: bool) -> io::Result<()>;

    fn write(&self, data: &[u8], offset: u64) -> io::Result<()>;

    /// Makes a range read as zeroes; gives its space back if `hole` and it can.
    fn zero(&self, offset: u64, length: u64, hole: bool) -> io::Result<()>;

    /// Makes everything written before the call durable.
    fn sync(&self) -> io::Result<()>;

    /// The run that starts at `offset`. A backing that cannot tell says that all is data.
    fn run(&self, offset: u64) -> io::Result<Run>;

    /// What a later start compares to find that somebody else wrote.
    fn identity(&self) -> io::Result<Identity>;
}

/// Zeroes by writing: what is left where a backing has no better way.
pub(super) fn write_zeroes(
    offset: u64,
    length: u64,
    mut write: impl FnMut(&[u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    static ZEROES: [u8; 65_536] = [0; 65_536];
    let mut done = 0;
    while done < length {
        let part = (length - done).min(ZEROES.len() as u64);
        let bytes = usize::try_from(part).expect("invariant: at most 64 KiB");
        write(&ZEROES[..bytes], offset + done)?;
        done += part;
    }
    Ok(())
}

/// A backing in a `storage::File`: memory and faults for the tests.
#[derive(Debug)]
pub struct StorageBacking {
    file: Arc<dyn File>,
    size: u64,
}

impl StorageBacking {
    pub fn new(file: Arc<dyn File>) -> io::Result<Self> {
        let size = file.len()?;
        Ok(Self { file, size })
    }
}

impl Backing for StorageBacking {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, buffer: &mut [u8], offset: u64, _nowait: bool) -> io::Result<()> {
        let read = self.file.read_at(buffer, offset)?;
        buffer[read..].fill(0);
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(data, offset)
    }

    fn zero(&self, offset: u64, length: u64, _hole: bool) -> io::Result<()> {
        write_zeroes(offset, length, |data, at| self.file.write_at(data, at))
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn run(&self, offset: u64) -> io::Result<Run> {
        // Whole regions of zeroes stand for the holes of a sparse file.
        let length = (REGION_BYTES - offset % REGION_BYTES).min(self.size - offset);
        let mut bytes = vec![0; usize::try_from(length).expect("invariant: at most a region")];
        self.read(&mut bytes, offset, false)?;
        Ok(Run {
            length,
            hole: bytes.iter().all(|byte| *byte == 0),
        })
    }

    fn identity(&self) -> io::Result<Identity> {
        Ok(Identity::default())
    }
}
