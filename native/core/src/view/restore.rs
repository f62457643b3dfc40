//! Restore: one volume of a view into a file or device.
//!
//! What the target holds is read and compared first: what is right already is not written, so that
//! a restore that was stopped goes on where it was, and holes of a new file stay holes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::FlockOperation;

use crate::device::{BlockDevice, DeviceError, RequestFlags};

/// Bytes copied at a time: some cells, and a progress that moves.
const CHUNK: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    #[error("{action} failed: {source}")]
    Io {
        action: &'static str,
        source: io::Error,
    },
    #[error("history cannot be read at byte {offset}: {source}")]
    History { offset: u64, source: DeviceError },
    #[error("the device has {found} bytes, the volume {needed}")]
    TooSmall { needed: u64, found: u64 },
    #[error("the restore was cancelled")]
    Cancelled,
}

/// How far a restore is; shared with whoever watches it.
#[derive(Debug, Default)]
pub struct Progress {
    pub bytes_done: AtomicU64,
    /// Of these, bytes that differed and were written.
    pub bytes_written: AtomicU64,
    pub cancelled: AtomicBool,
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> RestoreError {
    move |source| RestoreError::Io { action, source }
}

/// Opens the target exclusively; returns it and whether it was made new. Sets a file's length.
fn open_target(path: &Path, size: u64) -> Result<File, RestoreError> {
    let is_device = path
        .metadata()
        .is_ok_and(|found| found.file_type().is_block_device());
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(!is_device)
        .mode(0o600);
    if is_device {
        // Refused while a file system on it is mounted.
        options.custom_flags(libc::O_EXCL);
    }
    let file = options.open(path).map_err(failed("opening the target"))?;
    // A tap locks its backing: nothing may be written behind it.
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|error| failed("locking the target, which may be in use,")(error.into()))?;
    if is_device {
        let found = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))
            .map_err(|error| failed("finding the size of the target")(error.into()))?;
        if found < size {
            return Err(RestoreError::TooSmall {
                needed: size,
                found,
            });
        }
    } else {
        file.set_len(size)
            .map_err(failed("setting the length of the target"))?;
    }
    Ok(file)
}

/// Copies `device` to `path` until it is whole and durable.
pub fn restore(
    device: &dyn BlockDevice,
    path: &Path,
    progress: &Progress,
) -> Result<(), RestoreError> {
    let size = device.info().size;
    let target = open_target(path, size)?;
    let mut wanted = vec![0u8; CHUNK];
    let mut held = vec![0u8; CHUNK];
    let mut offset = 0u64;
    while offset < size {
        if progress.cancelled.load(Ordering::Relaxed) {
            return Err(RestoreError::Cancelled);
        }
        let length = usize::try_from(size - offset).map_or(CHUNK, |left| left.min(CHUNK));
        let (wanted, held) = (&mut wanted[..length], &mut held[..length]);
        device
            .read(wanted, offset, RequestFlags::default())
            .map_err(|source| RestoreError::History { offset, source })?;
        target
            .read_exact_at(held, offset)
            .map_err(failed("reading the target"))?;
        if wanted != held {
            target
                .write_all_at(wanted, offset)
                .map_err(failed("writing the target"))?;
            progress
                .bytes_written
                .fetch_add(length as u64, Ordering::Relaxed);
        }
        offset += length as u64;
        progress.bytes_done.store(offset, Ordering::Relaxed);
    }
    target
        .sync_all()
        .map_err(failed("making the target durable"))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::device::{Allocation, DeviceInfo};

    /// A device over bytes, counting reads; fails from one offset on.
    #[derive(Debug)]
    struct Bytes {
        content: Vec<u8>,
        fails_from: u64,
        reads: Mutex<u64>,
    }

    impl BlockDevice for Bytes {
        fn info(&self) -> DeviceInfo {
            DeviceInfo {
                size: self.content.len() as u64,
                read_only: true,
                multi_conn: true,
            }
        }

        fn read(&self, buffer: &mut [u8], offset: u64, _: RequestFlags) -> Result<(), DeviceError> {
            *self.reads.lock().unwrap() += 1;
            if offset >= self.fails_from {
                return Err(DeviceError::Io(5));
            }
            let start = usize::try_from(offset).unwrap();
            buffer.copy_from_slice(&self.content[start..start + buffer.len()]);
            Ok(())
        }

        fn write(&self, _: &[u8], _: u64, _: RequestFlags) -> Result<(), DeviceError> {
            Err(DeviceError::ReadOnly)
        }

        fn flush(&self, _: RequestFlags) -> Result<(), DeviceError> {
            Ok(())
        }

        fn trim(&self, _: u64, _: u64, _: RequestFlags) -> Result<(), DeviceError> {
            Err(DeviceError::ReadOnly)
        }

        fn zero(&self, _: u64, _: u64, _: RequestFlags) -> Result<(), DeviceError> {
            Err(DeviceError::ReadOnly)
        }

        fn allocation(
            &self,
            _: u64,
            length: u64,
            each: &mut dyn FnMut(Allocation) -> bool,
        ) -> Result<(), DeviceError> {
            each(Allocation {
                length,
                hole: false,
                zero: false,
            });
            Ok(())
        }
    }

    fn device(length: usize, fails_from: u64) -> Bytes {
        let content = (0..length)
            .map(|at| u8::try_from(at / 4096 % 251).unwrap())
            .collect();
        Bytes {
            content,
            fails_from,
            reads: Mutex::new(0),
        }
    }

    #[test]
    fn a_stopped_restore_goes_on_and_ends_equal() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let length = 5 * CHUNK + 512;
        let progress = Progress::default();
        let broken = device(length, 3 * CHUNK as u64);
        assert!(matches!(
            restore(&broken, &path, &progress),
            Err(RestoreError::History { offset, .. }) if offset == 3 * CHUNK as u64
        ));
        let progress = Progress::default();
        let whole = device(length, u64::MAX);
        restore(&whole, &path, &progress).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), whole.content);
        assert_eq!(progress.bytes_done.load(Ordering::Relaxed), length as u64);
        assert_eq!(
            progress.bytes_written.load(Ordering::Relaxed),
            (2 * CHUNK + 512) as u64
        );
    }

    #[test]
    fn a_longer_file_is_cut_and_a_cancelled_restore_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, vec![7u8; 3 * CHUNK]).unwrap();
        let whole = device(CHUNK + 512, u64::MAX);
        restore(&whole, &path, &Progress::default()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), whole.content);
        let progress = Progress::default();
        progress.cancelled.store(true, Ordering::Relaxed);
        assert!(matches!(
            restore(&whole, &path, &progress),
            Err(RestoreError::Cancelled)
        ));
    }

    #[test]
    fn the_backing_of_a_tap_is_not_written_to() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("image");
        std::fs::write(&path, [1; 8192]).unwrap();
        let tapped = crate::tap::DiskBacking::open(&path).unwrap();
        let device = Bytes {
            content: vec![2; 4096],
            fails_from: u64::MAX,
            reads: Mutex::default(),
        };
        assert!(restore(&device, &path, &Progress::default()).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), [1; 8192]);
        drop(tapped);
        restore(&device, &path, &Progress::default()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), [2; 4096]);
    }
}
