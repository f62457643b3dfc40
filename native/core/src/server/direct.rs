//! The tap's files past the page cache, for a process that is no I/O flusher (that needs
//! CAP_SYS_RESOURCE) and shares a memory limit with those who write to its volumes.
//!
//! A write into the page cache is charged to our control group. At its limit the kernel makes room
//! by waiting for pages under write-out, among them pages of file systems above us, whose write-out
//! waits for us: for ever. An I/O flusher never waits there; whoever is none must need no pages.
//! Direct I/O costs the cache, so that it is used only then.
//!
//! Blocks of `ALIGN` bytes are read, changed and written where a request covers a part of one. The
//! tap locks the blocks of a volume while it writes them, and a file of the log or the state has
//! one writer: nobody changes the other part meanwhile.

use std::fmt::Debug;
use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::storage::{Directory, File};
use crate::tap::{Backing, Identity, Run, TapConfig, TapParts};

/// Offsets, lengths and memory of direct I/O: enough for every disk there is.
const ALIGN: usize = 4096;
const ALIGN_U64: u64 = 4096;
/// What is not aligned passes through a buffer of this many bytes.
const BOUNCE_BYTES: usize = 256 << 10;

/// Replaces the tap's media by direct ones. A file system without direct I/O keeps the page cache;
/// returns its paths.
pub(super) fn bypass_page_cache(parts: &mut TapParts, config: &TapConfig) -> Vec<PathBuf> {
    let mut kept = Vec::new();
    for (backing, volume) in parts.backings.iter_mut().zip(&config.volumes) {
        match Direct::open(&volume.backing) {
            Ok(direct) => {
                *backing = Arc::new(DirectBacking {
                    inner: Arc::clone(backing),
                    direct,
                });
            }
            Err(_) => kept.push(volume.backing.clone()),
        }
    }
    for (directory, path) in [
        (&mut parts.spool, &config.spool),
        (&mut parts.state, &config.state),
    ] {
        let inner = Arc::clone(directory);
        *directory = Arc::new(DirectDirectory {
            inner,
            path: path.clone(),
        });
    }
    kept
}

/// A file opened for direct I/O.
#[derive(Debug)]
struct Direct {
    file: fs::File,
    bounce: Mutex<Bounce>,
}

impl Direct {
    fn open(path: &Path) -> io::Result<Self> {
        let file = fs::File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(path)
            .or_else(|_| {
                // A volume may be named by a symbolic link, as /dev/disk/by-id is.
                let flags = libc::O_DIRECT | libc::O_CLOEXEC;
                fs::File::options()
                    .read(true)
                    .write(true)
                    .custom_flags(flags)
                    .open(path)
            })?;
        Ok(Self {
            file,
            bounce: Mutex::new(Bounce::new()),
        })
    }

    /// Reads until `buffer` is full or the file ends; returns the bytes read.
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        if is_aligned(buffer, offset) {
            return read_full(&self.file, buffer, offset);
        }
        let mut bounce = self.bounce.lock();
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let (start, skip, part) = window(at, buffer.len() - done);
            let blocks = bounce.bytes((skip + part).next_multiple_of(ALIGN));
            let got = read_full(&self.file, blocks, start)?
                .saturating_sub(skip)
                .min(part);
            buffer[done..done + got].copy_from_slice(&blocks[skip..skip + got]);
            done += got;
            if got < part {
                break;
            }
        }
        Ok(done)
    }

    /// Writes `data`. The file may become longer than its end: up to the end of its last block.
    fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        if is_aligned(data, offset) {
            return self.file.write_all_at(data, offset);
        }
        let mut bounce = self.bounce.lock();
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let (start, skip, part) = window(at, data.len() - done);
            let blocks = bounce.bytes((skip + part).next_multiple_of(ALIGN));
            let last = blocks.len() - ALIGN;
            // What the request does not cover of the first and the last block stays.
            let cut = !(skip + part).is_multiple_of(ALIGN);
            if skip > 0 || (cut && last == 0) {
                self.fill(&mut blocks[..ALIGN], start)?;
            }
            if cut && last > 0 {
                self.fill(&mut blocks[last..], start + last as u64)?;
            }
            blocks[skip..skip + part].copy_from_slice(&data[done..done + part]);
            self.file.write_all_at(blocks, start)?;
            done += part;
        }
        Ok(())
    }

    /// Reads one block; zeroes behind the end.
    fn fill(&self, block: &mut [u8], offset: u64) -> io::Result<()> {
        let got = read_full(&self.file, block, offset)?;
        block[got..].fill(0);
        Ok(())
    }
}

/// First block of a request that goes on at `at` with `rest` bytes, bytes of that block before it,
/// and bytes that fit into the bounce buffer.
fn window(at: u64, rest: usize) -> (u64, usize, usize) {
    let start = at - at % ALIGN_U64;
    let skip = usize::try_from(at - start).expect("invariant: less than a block");
    (start, skip, rest.min(BOUNCE_BYTES - skip))
}

fn is_aligned(memory: &[u8], offset: u64) -> bool {
    memory.as_ptr().addr().is_multiple_of(ALIGN)
        && memory.len().is_multiple_of(ALIGN)
        && offset.is_multiple_of(ALIGN_U64)
}

fn read_full(file: &fs::File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => {
                done += read;
                // The end of a file comes inside a block; a further read there is not aligned.
                if !read.is_multiple_of(ALIGN) {
                    break;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Aligned memory, resident from the start.
#[derive(Debug)]
struct Bounce {
    memory: Vec<u8>,
    base: usize,
}

impl Bounce {
    fn new() -> Self {
        let mut memory = vec![0; BOUNCE_BYTES + ALIGN];
        memory.fill(0xa5);
        let base = memory.as_ptr().align_offset(ALIGN);
        Self { memory, base }
    }

    fn bytes(&mut self, length: usize) -> &mut [u8] {
        &mut self.memory[self.base..][..length]
    }
}

/// A volume's data, past the page cache. What is rare stays with the backing itself.
#[derive(Debug)]
struct DirectBacking {
    inner: Arc<dyn Backing>,
    direct: Direct,
}

impl DirectBacking {
    /// Whether whole blocks around the range lie inside the volume; only its last, partial block
    /// does not have that, and a device cannot grow.
    fn covers(&self, offset: u64, length: usize) -> bool {
        (offset + length as u64).next_multiple_of(ALIGN_U64) <= self.inner.size()
    }
}

impl Backing for DirectBacking {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read(&self, buffer: &mut [u8], offset: u64, nowait: bool) -> io::Result<()> {
        if nowait {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if !self.covers(offset, buffer.len()) {
            return self.inner.read(buffer, offset, false);
        }
        let read = self.direct.read(buffer, offset)?;
        if read < buffer.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        if self.covers(offset, data.len()) {
            self.direct.write(data, offset)
        } else {
            self.inner.write(data, offset)
        }
    }

    fn zero(&self, offset: u64, length: u64, hole: bool) -> io::Result<()> {
        self.inner.zero(offset, length, hole)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn run(&self, offset: u64) -> io::Result<Run> {
        self.inner.run(offset)
    }

    fn identity(&self) -> io::Result<Identity> {
        self.inner.identity()
    }
}

/// A directory whose files are written past the page cache.
#[derive(Debug)]
struct DirectDirectory {
    inner: Arc<dyn Directory>,
    path: PathBuf,
}

impl DirectDirectory {
    fn wrap(&self, name: &str, inner: Arc<dyn File>) -> Arc<dyn File> {
        match Direct::open(&self.path.join(name)) {
            Ok(direct) => Arc::new(DirectFile { inner, direct }),
            Err(_) => inner,
        }
    }
}

impl Directory for DirectDirectory {
    fn create(&self, name: &str) -> io::Result<Arc<dyn File>> {
        Ok(self.wrap(name, self.inner.create(name)?))
    }

    fn open(&self, name: &str, writable: bool) -> io::Result<Arc<dyn File>> {
        let inner = self.inner.open(name, writable)?;
        Ok(if writable {
            self.wrap(name, inner)
        } else {
            inner
        })
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.inner.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.inner.remove(name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.inner.list()
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.inner.free_bytes()
    }

    fn lock(&self, name: &str, exclusive: bool) -> io::Result<Box<dyn Send + Sync + Debug>> {
        self.inner.lock(name, exclusive)
    }
}

#[derive(Debug)]
struct DirectFile {
    inner: Arc<dyn File>,
    direct: Direct,
}

impl File for DirectFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.direct.read(buffer, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let end = offset + data.len() as u64;
        let length = self.inner.len()?;
        self.direct.write(data, offset)?;
        // The last block was written whole: cut what lies behind the end. A crash in between leaves
        // zeroes there, which recovery cuts as it cuts every torn tail.
        if end > length && !end.is_multiple_of(ALIGN_U64) {
            self.inner.set_len(end)?;
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.inner.set_len(length)
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.inner.punch(offset, length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::DiskDirectory;

    /// A file system without direct I/O (tmpfs of old kernels) gives the plain file: the test then
    /// holds for that.
    fn directory(at: &Path) -> DirectDirectory {
        let inner = Arc::new(DiskDirectory::open(at).unwrap());
        DirectDirectory {
            inner,
            path: at.to_owned(),
        }
    }

    #[test]
    fn ranges_of_every_alignment_read_as_they_were_written() {
        let place = tempfile::tempdir().unwrap();
        let file = directory(place.path()).create("a").unwrap();
        let mut model = Vec::new();
        let lengths = [
            1usize, 511, 4096, 4097, 8192, 12_289, 300_000, 262_144, 5, 600_001,
        ];
        let mut at = 0usize;
        for (round, length) in lengths.into_iter().cycle().take(60).enumerate() {
            // Appends at first, then anywhere inside.
            let offset = if round < 12 {
                model.len()
            } else {
                at % model.len()
            };
            at = at.wrapping_mul(7919).wrapping_add(4096 * round + round % 3);
            let byte = u8::try_from(round).unwrap() + 1;
            let data = vec![byte; length];
            file.write_at(&data, offset as u64).unwrap();
            model.resize(model.len().max(offset + length), 0);
            model[offset..offset + length].copy_from_slice(&data);
            assert_eq!(file.len().unwrap(), model.len() as u64, "round {round}");
        }
        let mut found = vec![0; model.len() + 10];
        assert_eq!(file.read_at(&mut found, 0).unwrap(), model.len());
        assert!(found[..model.len()] == model[..]);
        let mut part = vec![0; 70_000];
        assert_eq!(file.read_at(&mut part, 12_345).unwrap(), 70_000);
        assert!(part == model[12_345..82_345]);
        // Through the page cache, as the agent reads it.
        assert!(fs::read(place.path().join("a")).unwrap() == model);
    }

    #[test]
    fn the_partial_last_block_of_a_volume_does_not_make_it_longer() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("volume");
        fs::write(&path, vec![1; 10_000]).unwrap();
        let inner: Arc<dyn Backing> = Arc::new(crate::tap::DiskBacking::open(&path).unwrap());
        let Ok(direct) = Direct::open(&path) else {
            return;
        };
        let backing = DirectBacking { inner, direct };
        backing.write(&[2; 1000], 9000).unwrap();
        backing.write(&[3; 100], 4000).unwrap();
        backing.sync().unwrap();
        let mut model = vec![1; 10_000];
        model[9000..].fill(2);
        model[4000..4100].fill(3);
        let mut found = vec![0; 10_000];
        backing.read(&mut found, 0, false).unwrap();
        assert!(found == model);
        assert!(fs::read(&path).unwrap() == model);
        let refused = backing.read(&mut found[..1], 0, true).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
    }
}
