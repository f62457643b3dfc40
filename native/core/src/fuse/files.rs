//! What the requests mean: a flat directory, one regular file per device.
//!
//! Nothing here remembers anything of a client: node ids and file handles are functions of the
//! file's name, so that a successor process understands what its predecessor handed out.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::device::{Allocation, BlockDevice, DeviceError, RequestFlags};

use super::abi::{self, Attributes, Operation};

/// Seconds for which the kernel may keep names and attributes. Both are fixed while we live; a
/// limit remains so that a successor that serves another set of volumes is noticed.
const VALID_S: u64 = 60;
/// Largest READ or WRITE.
pub const REQUEST_BYTES_MAX: usize = 1 << 20;
/// Longest file name that `statfs` announces.
const NAME_BYTES_MAX: usize = 255;

/// One device as a file.
#[derive(Debug)]
struct File {
    name: String,
    node: u64,
    device: Arc<dyn BlockDevice>,
}

/// The directory.
#[derive(Debug)]
pub struct Files {
    list: Vec<File>,
    owner: (u32, u32),
    time_s: u64,
}

/// What to send back.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// FORGET has no answer.
    None,
    /// A positive errno.
    Error(i32),
    /// A small body.
    Body(Vec<u8>),
    /// The first bytes of the data area hold what was read.
    Data(usize),
}

/// Node id of a file: of its name alone, neither 0 nor the root's.
fn node_of(name: &str) -> u64 {
    xxhash_rust::xxh3::xxh3_64(name.as_bytes()).max(abi::ROOT_ID + 1)
}

/// The errno that a client of a disk expects.
pub fn errno(error: DeviceError) -> i32 {
    match error {
        DeviceError::WouldBlock => libc::EAGAIN,
        DeviceError::ReadOnly => libc::EROFS,
        DeviceError::OutOfRange => libc::EINVAL,
        DeviceError::NoSpace => libc::ENOSPC,
        DeviceError::Shutdown => libc::EIO,
        DeviceError::Io(code) => code,
    }
}

impl Files {
    /// Refuses names that no directory can hold, and two of one node id.
    pub fn new(devices: Vec<(String, Arc<dyn BlockDevice>)>) -> std::io::Result<Self> {
        let mut files: Vec<File> = Vec::with_capacity(devices.len());
        for (name, device) in devices {
            let node = node_of(&name);
            let bad = name.is_empty()
                || name.len() > NAME_BYTES_MAX
                || name == "."
                || name == ".."
                || name.contains(['/', '\0']);
            if bad || files.iter().any(|file| file.node == node) {
                return Err(std::io::Error::new(
                    std::io::ErrorKind::InvalidInput,
                    format!("{name:?} cannot be the name of a file beside the others"),
                ));
            }
            files.push(File { name, node, device });
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let owner = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        Ok(Self {
            list: files,
            owner,
            time_s: now,
        })
    }

    fn by_node(&self, node: u64) -> Result<&File, i32> {
        self.list
            .iter()
            .find(|file| file.node == node)
            .ok_or(libc::ENOENT)
    }

    fn attributes(&self, node: u64) -> Result<Attributes, i32> {
        let (size, mode, links) = if node == abi::ROOT_ID {
            (4096, libc::S_IFDIR | 0o700, 2)
        } else {
            let info = self.by_node(node)?.device.info();
            (
                info.size,
                libc::S_IFREG | if info.read_only { 0o400 } else { 0o600 },
                1,
            )
        };
        let (owner, group) = self.owner;
        Ok(Attributes {
            node,
            size,
            mode,
            links,
            owner,
            group,
            time_s: self.time_s,
        })
    }

    /// Runs one operation. `data` is the data area: on WRITE it begins with the payload, on READ it
    /// takes what was read; it is at least `REQUEST_BYTES_MAX` long. INIT is not for here.
    pub fn run(&self, node: u64, operation: &Operation, data: &mut [u8]) -> Answer {
        self.try_run(node, operation, data)
            .unwrap_or_else(Answer::Error)
    }

    fn try_run(&self, node: u64, operation: &Operation, data: &mut [u8]) -> Result<Answer, i32> {
        let empty = || Answer::Body(Vec::new());
        match *operation {
            Operation::Forget => Ok(Answer::None),
            Operation::Lookup { ref name } => {
                if node != abi::ROOT_ID {
                    return Err(libc::ENOTDIR);
                }
                let file = self.list.iter().find(|file| file.name.as_bytes() == name);
                let attributes = self.attributes(file.ok_or(libc::ENOENT)?.node)?;
                Ok(Answer::Body(abi::entry_out(&attributes, VALID_S)))
            }
            Operation::GetAttr => Ok(Answer::Body(abi::attr_out(
                &self.attributes(node)?,
                VALID_S,
            ))),
            Operation::SetAttr { valid, size } => {
                let attributes = self.attributes(node)?;
                let same_size = valid & abi::FATTR_SIZE == 0 || size == attributes.size;
                if valid & !(abi::FATTR_HARMLESS | abi::FATTR_SIZE) != 0 || !same_size {
                    return Err(libc::EPERM);
                }
                Ok(Answer::Body(abi::attr_out(&attributes, VALID_S)))
            }
            Operation::Open { flags } => {
                let file = self.by_node(node)?;
                let writes = flags.cast_signed() & libc::O_ACCMODE != libc::O_RDONLY;
                if writes && file.device.info().read_only {
                    return Err(libc::EROFS);
                }
                let flags =
                    abi::FOPEN_DIRECT_IO | abi::FOPEN_NOFLUSH | abi::FOPEN_PARALLEL_DIRECT_WRITES;
                Ok(Answer::Body(abi::open_out(node, flags)))
            }
            Operation::Read { offset, length } => self.read(node, offset, length, data),
            Operation::Write {
                offset,
                length,
                flags,
            } => {
                let file = self.by_node(node)?;
                let payload = data.get(..length).ok_or(libc::EINVAL)?;
                let durable = flags.cast_signed() & libc::O_DSYNC != 0;
                let end = offset.checked_add(length as u64).ok_or(libc::EFBIG)?;
                if end > file.device.info().size {
                    return Err(libc::ENOSPC);
                }
                let options = RequestFlags {
                    fua: durable,
                    ..RequestFlags::default()
                };
                file.device.write(payload, offset, options).map_err(errno)?;
                let written = u32::try_from(length).map_err(|_| libc::EINVAL)?;
                Ok(Answer::Body(abi::write_out(written)))
            }
            Operation::Fsync => {
                let device = &self.by_node(node)?.device;
                device.flush(RequestFlags::default()).map_err(errno)?;
                Ok(empty())
            }
            Operation::Fallocate {
                offset,
                length,
                mode,
            } => {
                self.fallocate(node, offset, length, mode.cast_signed())?;
                Ok(empty())
            }
            Operation::Lseek { offset, whence } => {
                let found = self.seek(node, offset, whence.cast_signed())?;
                Ok(Answer::Body(found.to_ne_bytes().to_vec()))
            }
            Operation::ReadDir { offset, length } => Ok(self.read_directory(offset, length)),
            Operation::OpenDir => Ok(Answer::Body(abi::open_out(node, 0))),
            Operation::StatFs => {
                let bytes: u64 = self.list.iter().map(|file| file.device.info().size).sum();
                let blocks = bytes.div_ceil(4096);
                Ok(Answer::Body(abi::statfs_out(
                    blocks,
                    self.list.len() as u64,
                )))
            }
            Operation::Release
            | Operation::ReleaseDir
            | Operation::FsyncDir
            | Operation::Destroy => Ok(empty()),
            Operation::ChangesDirectory => Err(libc::EPERM),
            Operation::Ioctl => Err(libc::ENOTTY),
            // ENOSYS stops the kernel from asking again. INTERRUPT: a request runs to its end, as
            // on a disk. FLUSH is close(2), not a promise of durability, and must not wait for us:
            // a process that has a file open and starts our successor would wait, between fork
            // and exec, for that successor.
            Operation::Interrupt | Operation::Flush | Operation::Other => Err(libc::ENOSYS),
            Operation::Init { .. } => Err(libc::EPROTO),
        }
    }

    fn read(&self, node: u64, offset: u64, length: usize, data: &mut [u8]) -> Result<Answer, i32> {
        let device = &self.by_node(node)?.device;
        let rest = device.info().size.saturating_sub(offset);
        let length = length.min(usize::try_from(rest).unwrap_or(usize::MAX));
        let target = data.get_mut(..length).ok_or(libc::EINVAL)?;
        if length > 0 {
            device
                .read(target, offset, RequestFlags::default())
                .map_err(errno)?;
        }
        Ok(Answer::Data(length))
    }

    /// Punching a hole is a discard, zeroing a range is a zero; the size never changes.
    fn fallocate(&self, node: u64, offset: u64, length: u64, mode: i32) -> Result<(), i32> {
        const HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let device = &self.by_node(node)?.device;
        let size = device.info().size;
        let length = length.min(size.saturating_sub(offset));
        if length == 0 {
            return Err(libc::ENOSPC);
        }
        let flags = RequestFlags::default();
        match mode {
            HOLE => device.trim(offset, length, flags),
            mode if mode & !libc::FALLOC_FL_KEEP_SIZE == libc::FALLOC_FL_ZERO_RANGE => device.zero(
                offset,
                length,
                RequestFlags {
                    no_hole: true,
                    ..flags
                },
            ),
            _ => return Err(libc::EOPNOTSUPP),
        }
        .map_err(errno)
    }

    fn seek(&self, node: u64, offset: u64, whence: i32) -> Result<u64, i32> {
        let device = &self.by_node(node)?.device;
        let size = device.info().size;
        let want_hole = match whence {
            libc::SEEK_HOLE => true,
            libc::SEEK_DATA => false,
            _ => return Err(libc::EINVAL),
        };
        if offset >= size {
            return Err(libc::ENXIO);
        }
        let mut at = offset;
        let mut found = None;
        let mut each = |run: Allocation| {
            if run.hole == want_hole {
                found = Some(at);
            }
            at += run.length;
            found.is_none()
        };
        device
            .allocation(offset, size - offset, &mut each)
            .map_err(errno)?;
        // The end of a file counts as a hole.
        found.or(want_hole.then_some(size)).ok_or(libc::ENXIO)
    }

    /// Entry k has offset k; offset k + 1 is where the next call goes on.
    fn read_directory(&self, offset: u64, length: usize) -> Answer {
        let dots = [(".", abi::ROOT_ID, true), ("..", abi::ROOT_ID, true)];
        let names = self
            .list
            .iter()
            .map(|file| (file.name.as_str(), file.node, false));
        let mut out = Vec::new();
        let limit = length.min(REQUEST_BYTES_MAX);
        for (entry, next) in dots.into_iter().chain(names).zip(1u64..) {
            let (name, node, directory) = entry;
            if next <= offset {
                continue;
            }
            if !abi::put_dirent(&mut out, limit, node, next, directory, name.as_bytes()) {
                break;
            }
        }
        Answer::Body(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DeviceInfo;
    use parking_lot::Mutex;

    #[derive(Debug)]
    struct Memory {
        bytes: Mutex<Vec<u8>>,
        calls: Mutex<Vec<String>>,
        read_only: bool,
    }

    impl BlockDevice for Memory {
        fn info(&self) -> DeviceInfo {
            let size = self.bytes.lock().len() as u64;
            DeviceInfo {
                size,
                read_only: self.read_only,
                multi_conn: true,
            }
        }

        fn read(&self, buffer: &mut [u8], offset: u64, _: RequestFlags) -> Result<(), DeviceError> {
            let at = usize::try_from(offset).unwrap();
            buffer.copy_from_slice(&self.bytes.lock()[at..at + buffer.len()]);
            Ok(())
        }

        fn write(&self, data: &[u8], offset: u64, flags: RequestFlags) -> Result<(), DeviceError> {
            let at = usize::try_from(offset).unwrap();
            self.bytes.lock()[at..at + data.len()].copy_from_slice(data);
            self.calls
                .lock()
                .push(format!("write {offset} {} {}", data.len(), flags.fua));
            Ok(())
        }

        fn flush(&self, _: RequestFlags) -> Result<(), DeviceError> {
            self.calls.lock().push("flush".into());
            Ok(())
        }

        fn trim(&self, offset: u64, length: u64, _: RequestFlags) -> Result<(), DeviceError> {
            self.calls.lock().push(format!("trim {offset} {length}"));
            Ok(())
        }

        fn zero(&self, offset: u64, length: u64, _: RequestFlags) -> Result<(), DeviceError> {
            self.calls.lock().push(format!("zero {offset} {length}"));
            Ok(())
        }

        fn allocation(
            &self,
            offset: u64,
            length: u64,
            each: &mut dyn FnMut(Allocation) -> bool,
        ) -> Result<(), DeviceError> {
            // Data in the first 8 KiB, a hole behind.
            let end = offset + length;
            let data = 8192u64.clamp(offset, end) - offset;
            let runs = [(data, false), (length - data, true)];
            for (length, hole) in runs.into_iter().filter(|run| run.0 > 0) {
                if !each(Allocation {
                    length,
                    hole,
                    zero: hole,
                }) {
                    break;
                }
            }
            Ok(())
        }
    }

    fn one(size: usize, read_only: bool) -> (Files, Arc<Memory>, u64) {
        let (bytes, calls) = (Mutex::new(vec![0; size]), Mutex::default());
        let device = Arc::new(Memory {
            bytes,
            calls,
            read_only,
        });
        let files = Files::new(vec![("disk".into(), Arc::clone(&device) as _)]).unwrap();
        (files, device, node_of("disk"))
    }

    fn run(files: &Files, node: u64, operation: &Operation) -> Answer {
        let mut data = vec![0x5a; REQUEST_BYTES_MAX];
        files.run(node, operation, &mut data)
    }

    #[test]
    fn names_that_no_directory_can_hold_are_refused() {
        let (_, device, _) = one(4096, false);
        for names in [vec![""], vec!["."], vec!["a/b"], vec!["a", "a"]] {
            let devices = names
                .iter()
                .map(|name| ((*name).into(), Arc::clone(&device) as _));
            assert!(Files::new(devices.collect()).is_err(), "{names:?}");
        }
    }

    #[test]
    fn a_successor_gives_the_same_node_ids_whatever_the_order() {
        let (_, device, _) = one(4096, false);
        let files = |names: [&str; 2]| {
            Files::new(
                names
                    .map(|name| (name.into(), Arc::clone(&device) as _))
                    .into(),
            )
            .unwrap()
        };
        let (first, second) = (files(["a", "b"]), files(["b", "a"]));
        assert_eq!(first.by_node(node_of("a")).unwrap().name, "a");
        assert_eq!(second.by_node(node_of("a")).unwrap().name, "a");
    }

    #[test]
    fn reads_stop_at_the_end_and_writes_never_cross_it() {
        let (files, _, node) = one(5000, false);
        assert_eq!(
            run(
                &files,
                node,
                &Operation::Read {
                    offset: 4096,
                    length: 4096
                }
            ),
            Answer::Data(904)
        );
        assert_eq!(
            run(
                &files,
                node,
                &Operation::Read {
                    offset: u64::MAX,
                    length: 1
                }
            ),
            Answer::Data(0)
        );
        let write = |offset, length| Operation::Write {
            offset,
            length,
            flags: 0,
        };
        assert_eq!(
            run(&files, node, &write(4096, 905)),
            Answer::Error(libc::ENOSPC)
        );
        assert_eq!(
            run(&files, node, &write(u64::MAX, 2)),
            Answer::Error(libc::EFBIG)
        );
        assert_eq!(
            run(&files, node, &write(0, usize::MAX)),
            Answer::Error(libc::EINVAL)
        );
        assert!(matches!(
            run(&files, node, &write(4096, 904)),
            Answer::Body(_)
        ));
    }

    #[test]
    fn a_synchronous_write_is_forced_and_fsync_flushes() {
        let (files, device, node) = one(8192, false);
        let flags = u32::try_from(libc::O_DSYNC).unwrap();
        run(
            &files,
            node,
            &Operation::Write {
                offset: 0,
                length: 512,
                flags,
            },
        );
        run(&files, node, &Operation::Fsync);
        run(&files, node, &Operation::Flush);
        assert_eq!(*device.calls.lock(), ["write 0 512 true", "flush"]);
    }

    #[test]
    fn holes_are_discards_and_zero_ranges_are_zeroes_inside_the_device() {
        let (files, device, node) = one(8192, false);
        let fallocate = |offset, length, mode: i32| {
            let mode = mode.cast_unsigned();
            run(
                &files,
                node,
                &Operation::Fallocate {
                    offset,
                    length,
                    mode,
                },
            )
        };
        let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        fallocate(4096, 1 << 40, hole);
        fallocate(
            0,
            4096,
            libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        );
        assert_eq!(*device.calls.lock(), ["trim 4096 4096", "zero 0 4096"]);
        assert_eq!(fallocate(8192, 1, hole), Answer::Error(libc::ENOSPC));
        assert_eq!(fallocate(0, 1, 0), Answer::Error(libc::EOPNOTSUPP));
    }

    #[test]
    fn seek_finds_data_and_holes_and_the_end_counts_as_a_hole() {
        let (files, _, node) = one(16384, false);
        let seek = |offset, whence: i32| files.seek(node, offset, whence);
        assert_eq!(seek(0, libc::SEEK_DATA), Ok(0));
        assert_eq!(seek(0, libc::SEEK_HOLE), Ok(8192));
        assert_eq!(seek(9000, libc::SEEK_HOLE), Ok(9000));
        assert_eq!(seek(9000, libc::SEEK_DATA), Err(libc::ENXIO));
        assert_eq!(seek(16384, libc::SEEK_HOLE), Err(libc::ENXIO));
        let (small, _, node) = one(4096, false);
        assert_eq!(small.seek(node, 0, libc::SEEK_HOLE), Ok(4096));
    }

    #[test]
    fn a_read_only_device_opens_for_reading_only() {
        let (files, _, node) = one(4096, true);
        let open = |flags: i32| {
            run(
                &files,
                node,
                &Operation::Open {
                    flags: flags.cast_unsigned(),
                },
            )
        };
        assert_eq!(open(libc::O_RDWR), Answer::Error(libc::EROFS));
        assert!(matches!(open(libc::O_RDONLY), Answer::Body(_)));
    }

    #[test]
    fn the_directory_goes_on_where_a_short_buffer_stopped() {
        let (files, _, _) = one(4096, false);
        let list = |offset, length| match files.read_directory(offset, length) {
            Answer::Body(body) => body.len(),
            other => panic!("{other:?}"),
        };
        assert_eq!(list(0, 4096), 96);
        assert_eq!(list(0, 64), 64);
        assert_eq!(list(2, 4096), 32);
        assert_eq!(list(3, 4096), 0);
    }

    #[test]
    fn nothing_changes_the_directory_or_the_size() {
        let (files, _, node) = one(4096, false);
        let set = |valid, size| run(&files, node, &Operation::SetAttr { valid, size });
        assert_eq!(set(abi::FATTR_SIZE, 0), Answer::Error(libc::EPERM));
        assert_eq!(set(1, 0), Answer::Error(libc::EPERM));
        assert!(matches!(set(abi::FATTR_SIZE, 4096), Answer::Body(_)));
        assert!(matches!(set(1 << 5, 0), Answer::Body(_)));
        assert_eq!(
            run(&files, 1, &Operation::ChangesDirectory),
            Answer::Error(libc::EPERM)
        );
        assert_eq!(
            run(&files, 1, &Operation::Interrupt),
            Answer::Error(libc::ENOSYS)
        );
        assert_eq!(run(&files, 1, &Operation::Forget), Answer::None);
    }
}
