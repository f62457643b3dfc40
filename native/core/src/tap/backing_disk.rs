//! Backing in an image file or block device, through the page cache, opened for one tap alone.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use super::backing::{Backing, Run, write_zeroes};
use super::clock::{SystemTimeSource, TimeSource};
use super::intent::{Identity, IdentityKind};

#[derive(Debug)]
pub struct DiskBacking {
    file: File,
    size: u64,
    block_device: bool,
    /// The file system cannot punch holes or tell them: asked once, then not again.
    no_punch: AtomicBool,
}

impl DiskBacking {
    /// Opens for reading and writing. `WouldBlock` if another tap or program holds it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let kind = std::fs::metadata(path)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let reason = "a backing is a regular file or a block device";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if kind.is_block_device() {
            // Excludes mounts, other taps, device-mapper, swap and md.
            options.custom_flags(libc::O_EXCL);
        }
        let mut file = options
            .open(path)
            .map_err(|error| match Errno::from_io_error(&error) {
                Some(Errno::BUSY) => io::Error::from(io::ErrorKind::WouldBlock),
                _ => error,
            })?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let size = io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
        let block_device = file.metadata()?.file_type().is_block_device();
        Ok(Self {
            file,
            size,
            block_device,
            no_punch: AtomicBool::new(false),
        })
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, length: u64) -> io::Result<bool> {
        loop {
            match rustix::fs::fallocate(&self.file, flags, offset, length) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                // Not this file system, not this device, or not this alignment.
                Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Backing for DiskBacking {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, buffer: &mut [u8], offset: u64, nowait: bool) -> io::Result<()> {
        if !nowait {
            return self.file.read_exact_at(buffer, offset);
        }
        let mut done = 0;
        while done < buffer.len() {
            let mut parts = [IoSliceMut::new(&mut buffer[done..])];
            let at = offset + done as u64;
            match rustix::io::preadv2(&self.file, &mut parts, at, ReadWriteFlags::NOWAIT) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => done += read,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::NOSYS) => {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn zero(&self, offset: u64, length: u64, hole: bool) -> io::Result<()> {
        // On a block device both forms promise zeroes; BLKDISCARD would not.
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if hole && !self.no_punch.load(Ordering::Relaxed) {
            if self.fallocate(punch, offset, length)? {
                return Ok(());
            }
            if offset.is_multiple_of(4096) {
                self.no_punch.store(true, Ordering::Relaxed);
            }
        }
        // For small ranges a write into the page cache is cheaper than a change of the extents.
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        if length > 65_536 && self.fallocate(flags, offset, length)? {
            return Ok(());
        }
        write_zeroes(offset, length, |data, at| self.write(data, at))
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn run(&self, offset: u64) -> io::Result<Run> {
        let all_data = Run {
            length: self.size - offset,
            hole: false,
        };
        if self.block_device {
            return Ok(all_data);
        }
        // The file position is used by nobody else: all I/O is positioned.
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Ok(Run {
                length: data.min(self.size) - offset,
                hole: true,
            }),
            Ok(_) => match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
                Ok(hole) if hole > offset => Ok(Run {
                    length: hole.min(self.size) - offset,
                    hole: false,
                }),
                _ => Ok(all_data),
            },
            Err(Errno::NXIO) => Ok(Run {
                length: self.size - offset,
                hole: true,
            }),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(all_data),
            Err(error) => Err(error.into()),
        }
    }

    fn identity(&self) -> io::Result<Identity> {
        let metadata = self.file.metadata()?;
        if self.block_device {
            let device = metadata.rdev();
            return Ok(match written_sectors(device) {
                Some(written_sectors) => Identity {
                    kind: IdentityKind::Block,
                    device,
                    written_sectors,
                    boot_id: SystemTimeSource.boot_id(),
                    ..Identity::default()
                },
                None => Identity::default(),
            });
        }
        let nanoseconds = |seconds: i64, part: i64| {
            u64::try_from(seconds).unwrap_or(0) * 1_000_000_000 + u64::try_from(part).unwrap_or(0)
        };
        Ok(Identity {
            kind: IdentityKind::File,
            device: metadata.dev(),
            inode: metadata.ino(),
            modified_ns: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
            ..Identity::default()
        })
    }
}

/// Sectors written to a device since boot, as the kernel counts them.
fn written_sectors(device: u64) -> Option<u64> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let stat = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    stat.split_ascii_whitespace().nth(6)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(bytes: u64) -> (tempfile::TempDir, std::path::PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        File::create(&path).unwrap().set_len(bytes).unwrap();
        (directory, path)
    }

    #[test]
    fn second_opener_is_told_and_a_directory_is_refused() {
        let (directory, path) = image(8192);
        let first = DiskBacking::open(&path).unwrap();
        let second = DiskBacking::open(&path).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::WouldBlock);
        drop(first);
        DiskBacking::open(&path).unwrap();
        let refused = DiskBacking::open(directory.path()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn zeroes_of_every_kind_read_as_zeroes() {
        let (_directory, path) = image(1 << 20);
        let backing = DiskBacking::open(&path).unwrap();
        for (offset, length, hole) in [
            (0, 4096, true),
            (5000, 700, true),
            (100, 70_000, false),
            (8192, 300_000, true),
        ] {
            backing.write(&vec![9; 1 << 20], 0).unwrap();
            backing.zero(offset, length, hole).unwrap();
            let mut bytes = vec![1; 1 << 20];
            backing.read(&mut bytes, 0, false).unwrap();
            for (at, byte) in bytes.iter().enumerate() {
                let inside = (offset..offset + length).contains(&(at as u64));
                assert_eq!(*byte == 0, inside, "byte {at} of {offset}+{length}");
            }
        }
    }

    #[test]
    fn runs_cover_a_sparse_file() {
        let (_directory, path) = image(1 << 20);
        let backing = DiskBacking::open(&path).unwrap();
        assert_eq!(
            backing.run(0).unwrap(),
            Run {
                length: 1 << 20,
                hole: true
            }
        );
        backing.write(&[1; 4096], 512 * 1024).unwrap();
        let mut offset = 0;
        let mut data = 0;
        while offset < 1 << 20 {
            let run = backing.run(offset).unwrap();
            assert!(run.length > 0);
            data += if run.hole { 0 } else { run.length };
            offset += run.length;
        }
        assert!((4096..1 << 20).contains(&data) || data == 1 << 20);
    }

    #[test]
    fn a_write_by_another_program_changes_the_identity() {
        let (_directory, path) = image(1 << 20);
        let before = DiskBacking::open(&path).unwrap().identity().unwrap();
        assert!(!before.changed(&DiskBacking::open(&path).unwrap().identity().unwrap()));
        std::thread::sleep(std::time::Duration::from_millis(20));
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        assert!(before.changed(&DiskBacking::open(&path).unwrap().identity().unwrap()));
    }
}
