//! Real files: positioned reads and writes, fdatasync, flock.
//!
//! All names are resolved against one directory descriptor, so the directory may be renamed under
//! a running process, and never through a symbolic link.

use std::fmt::Debug;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, Dir, FlockOperation, Mode, OFlags};

use super::{Directory, File, check_name};

/// A directory of the file system.
#[derive(Debug)]
pub struct DiskDirectory {
    directory: OwnedFd,
}

#[derive(Debug)]
struct DiskFile {
    file: fs::File,
}

/// Holds a lock until dropped: closing the descriptor releases a flock.
#[derive(Debug)]
struct DiskLock {
    _file: OwnedFd,
}

const FILE_MODE: Mode = Mode::from_raw_mode(0o600);
const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o700);

impl DiskDirectory {
    /// Opens a directory, creating it (not its parents) if absent; its entry is made durable.
    pub fn open(path: &Path) -> io::Result<Self> {
        match rustix::fs::mkdir(path, DIRECTORY_MODE) {
            Ok(()) => {
                let parent = path
                    .parent()
                    .filter(|parent| !parent.as_os_str().is_empty());
                fs::File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
            }
            Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            directory: rustix::fs::open(path, flags, Mode::empty())?,
        })
    }

    fn open_at(&self, name: &str, flags: OFlags) -> io::Result<OwnedFd> {
        check_name(name)?;
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(rustix::fs::openat(&self.directory, name, flags, FILE_MODE)?)
    }
}

impl Directory for DiskDirectory {
    fn create(&self, name: &str) -> io::Result<Arc<dyn File>> {
        let file = self.open_at(name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?;
        Ok(Arc::new(DiskFile { file: file.into() }))
    }

    fn open(&self, name: &str, writable: bool) -> io::Result<Arc<dyn File>> {
        let file = self.open_at(
            name,
            if writable {
                OFlags::RDWR
            } else {
                OFlags::RDONLY
            },
        )?;
        Ok(Arc::new(DiskFile { file: file.into() }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        check_name(from)?;
        check_name(to)?;
        Ok(rustix::fs::renameat(
            &self.directory,
            from,
            &self.directory,
            to,
        )?)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        check_name(name)?;
        Ok(rustix::fs::unlinkat(
            &self.directory,
            name,
            AtFlags::empty(),
        )?)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.directory)? {
            let entry = entry?;
            // A name that is not UTF-8 is none of ours.
            if let Ok(name) = entry.file_name().to_str()
                && name != "."
                && name != ".."
            {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.directory)?)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.directory)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn lock(&self, name: &str, exclusive: bool) -> io::Result<Box<dyn Send + Sync + Debug>> {
        let file = self.open_at(name, OFlags::RDWR | OFlags::CREATE)?;
        // flock belongs to the open file description: it also excludes a second opening in this
        // process, and a child that inherits nothing (CLOEXEC) cannot keep it.
        let operation = if exclusive {
            FlockOperation::NonBlockingLockExclusive
        } else {
            FlockOperation::NonBlockingLockShared
        };
        rustix::fs::flock(&file, operation)?;
        Ok(Box::new(DiskLock { _file: file }))
    }
}

impl File for DiskFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, offset, length) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) | Ok(()) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
