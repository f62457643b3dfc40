//! Loop devices over the files of a FUSE mount: the real block device that `attach` gives where the
//! kernel has neither nbd nor ublk. Source: Linux `include/uapi/linux/loop.h`.
//!
//! Direct I/O on both layers: nothing is cached between the block layer and us, so that writes come
//! in the order in which they were issued and a flush means what it says.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const LOOP_CLR_FD: libc::c_ulong = 0x4C01;
const LOOP_SET_STATUS64: libc::c_ulong = 0x4C04;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_PARTSCAN: u32 = 8;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// Another process may take the free device first; this often.
const ATTEMPTS: usize = 32;
/// Short-lived users (udev looking at a new device) are waited for this long.
const SETTLE: Duration = Duration::from_secs(2);

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo64>() == 232);
const _: () = assert!(size_of::<LoopConfig>() == 304);

impl LoopInfo64 {
    const ZERO: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        sizelimit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoopError {
    #[error("{path}: {action} failed: {source}")]
    Io {
        path: PathBuf,
        action: &'static str,
        source: io::Error,
    },
    #[error("{path} is already attached as {device}")]
    Attached { path: PathBuf, device: String },
    #[error("{device} is in use: {by}")]
    InUse { device: String, by: String },
    #[error("{device} is not a loop device that is attached")]
    NotAttached { device: String },
    #[error("no loop device is free")]
    NoneFree,
    #[error("{program} failed: {message}")]
    Program {
        program: &'static str,
        message: String,
    },
}

/// An attached loop device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoopDevice {
    /// Such as "/dev/loop0".
    pub device: String,
    pub file: PathBuf,
    /// Bytes.
    pub size: u64,
    pub read_only: bool,
    pub direct_io: bool,
}

fn failed(path: &Path, action: &'static str) -> impl Fn(io::Error) -> LoopError {
    let path = path.to_owned();
    move |source| LoopError::Io {
        path: path.clone(),
        action,
        source,
    }
}

/// Attaches `file` and returns the device, such as "/dev/loop0". Refuses a second device over one
/// file: two page caches over the same blocks would destroy it.
///
/// Logical blocks are 512 bytes whatever the file's size: partition tables and xfs are laid out in
/// that unit, so that a volume that was a plain disk or image before must keep it. A last part of
/// less than 512 bytes is not seen through the device.
pub fn loop_attach(file: &Path, read_only: bool) -> Result<String, LoopError> {
    loop_attach_with(file, read_only, 512)
}

/// As `loop_attach`, for a file whose contents were laid out in logical blocks of `block_size`.
pub fn loop_attach_with(
    file: &Path,
    read_only: bool,
    block_size: u32,
) -> Result<String, LoopError> {
    let path = std::fs::canonicalize(file).map_err(failed(file, "find"))?;
    if let Some(found) = loop_list()?.into_iter().find(|device| device.file == path) {
        return Err(LoopError::Attached {
            path,
            device: found.device,
        });
    }
    let flags = libc::O_CLOEXEC | libc::O_DIRECT;
    let backing = File::options()
        .read(true)
        .write(!read_only)
        .custom_flags(flags)
        .open(&path)
        .map_err(failed(&path, "open"))?;
    let mut config = LoopConfig {
        fd: u32::try_from(backing.as_raw_fd()).expect("invariant: a descriptor is not negative"),
        block_size,
        info: LoopInfo64::ZERO,
        reserved: [0; 8],
    };
    config.info.flags = LO_FLAGS_DIRECT_IO | LO_FLAGS_PARTSCAN;
    if read_only {
        config.info.flags |= LO_FLAGS_READ_ONLY;
    }
    // For people only (losetup shows it cut to 63 bytes); sysfs has the whole path.
    let name = path.as_os_str().as_encoded_bytes();
    let shown = name.len().min(config.info.file_name.len() - 1);
    config.info.file_name[..shown].copy_from_slice(&name[..shown]);
    for _ in 0..ATTEMPTS {
        let name = format!("/dev/loop{}", free_number()?);
        let device = match open_device(Path::new(&name), !read_only, 0) {
            Ok(device) => device,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(failed(Path::new(&name), "open (is /dev a devtmpfs?)")(
                    error,
                ));
            }
            Err(error) => return Err(failed(Path::new(&name), "open")(error)),
        };
        // SAFETY: LOOP_CONFIGURE reads one loop_config, which `config` is; the kernel takes a
        // reference of its own on the backing file.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
        match check(result) {
            Ok(_) => return Ok(name),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(failed(Path::new(&name), "configure")(error)),
        }
    }
    Err(LoopError::NoneFree)
}

/// Makes the device's data durable and detaches it. Fails with `InUse` while it is mounted or open;
/// then nothing has changed.
pub fn loop_detach(device: &str) -> Result<(), LoopError> {
    let path = Path::new(device);
    let missing = || LoopError::NotAttached {
        device: device.into(),
    };
    number(device).ok_or_else(missing)?;
    if !is_attached(device) {
        return Err(missing());
    }
    if let Some(place) = mounted_on(device) {
        return Err(LoopError::InUse {
            device: device.into(),
            by: format!("mounted on {place}"),
        });
    }
    let deadline = Instant::now() + SETTLE;
    // A mount, LVM or a swap claims a device exclusively: then our claim fails.
    let opened = loop {
        match open_device(path, false, libc::O_EXCL) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                if Instant::now() > deadline {
                    let by = "something holds it exclusively (a mount, LVM, swap)".into();
                    return Err(LoopError::InUse {
                        device: device.into(),
                        by,
                    });
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            other => break other.map_err(failed(path, "open"))?,
        }
    };
    opened.sync_all().map_err(failed(path, "flush"))?;
    // SAFETY: LOOP_CLR_FD takes no argument.
    check(unsafe { libc::ioctl(opened.as_raw_fd(), LOOP_CLR_FD, 0) })
        .map_err(failed(path, "detach"))?;
    drop(opened);
    // The kernel detaches when the last user closes. Who has it open?
    while is_attached(device) {
        if Instant::now() > deadline {
            keep_attached(path).map_err(failed(path, "keep attached"))?;
            let by = "a process has it open (see fuser or lsof)".into();
            return Err(LoopError::InUse {
                device: device.into(),
                by,
            });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Takes back a pending detach.
fn keep_attached(path: &Path) -> io::Result<()> {
    let device = open_device(path, false, 0)?;
    let mut info = LoopInfo64::ZERO;
    // SAFETY: LOOP_GET_STATUS64 fills one loop_info64, LOOP_SET_STATUS64 reads one.
    unsafe {
        check(libc::ioctl(
            device.as_raw_fd(),
            LOOP_GET_STATUS64,
            &raw mut info,
        ))?;
        info.flags &= !LO_FLAGS_AUTOCLEAR;
        check(libc::ioctl(
            device.as_raw_fd(),
            LOOP_SET_STATUS64,
            &raw const info,
        ))?;
    }
    Ok(())
}

/// All attached loop devices of the host.
pub fn loop_list() -> Result<Vec<LoopDevice>, LoopError> {
    let root = Path::new("/sys/block");
    let mut devices = Vec::new();
    for entry in std::fs::read_dir(root).map_err(failed(root, "list"))? {
        let name = entry.map_err(failed(root, "list"))?.file_name();
        let Some(name) = name.to_str().filter(|name| name.starts_with("loop")) else {
            continue;
        };
        let directory = root.join(name);
        let text = |file: &str| std::fs::read_to_string(directory.join(file)).ok();
        // Without a backing file it is not attached (or just being detached).
        let Some(file) = text("loop/backing_file") else {
            continue;
        };
        let set = |file: &str| text(file).is_some_and(|value| value.trim() == "1");
        let sectors = text("size").and_then(|size| size.trim().parse::<u64>().ok());
        devices.push(LoopDevice {
            device: format!("/dev/{name}"),
            file: PathBuf::from(file.strip_suffix('\n').unwrap_or(&file)),
            size: sectors.unwrap_or(0) * 512,
            read_only: set("ro"),
            direct_io: set("loop/dio"),
        });
    }
    devices.sort_by_key(|device| number(&device.device));
    Ok(devices)
}

fn number(device: &str) -> Option<u32> {
    device.strip_prefix("/dev/loop")?.parse().ok()
}

fn is_attached(device: &str) -> bool {
    let name = device.trim_start_matches("/dev/");
    Path::new("/sys/block")
        .join(name)
        .join("loop/backing_file")
        .exists()
}

/// Where a device or one of its partitions is mounted, in our mount namespace.
fn mounted_on(device: &str) -> Option<String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    table.lines().find_map(|line| {
        let source = line.split_once(" - ")?.1.split(' ').nth(1)?;
        let rest = source.strip_prefix(device)?;
        let same = rest.is_empty() || rest.starts_with('p');
        same.then(|| line.split(' ').nth(4).map(str::to_owned))
            .flatten()
    })
}

fn free_number() -> Result<i32, LoopError> {
    let path = Path::new("/dev/loop-control");
    let control = open_device(path, true, 0).map_err(failed(path, "open"))?;
    // SAFETY: LOOP_CTL_GET_FREE takes no argument and answers with a number.
    check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) })
        .map_err(failed(path, "find a free device"))
}

fn open_device(path: &Path, write: bool, flags: i32) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .write(write)
        .custom_flags(libc::O_CLOEXEC | flags)
        .open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_block_device() || kind.is_char_device() {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "not a device"))
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loop_devices_are_detached() {
        for device in [
            "/dev/sda",
            "/dev/loop",
            "/dev/loopx",
            "loop0",
            "/dev/loop0p1",
        ] {
            let error = loop_detach(device).unwrap_err();
            assert!(
                matches!(error, LoopError::NotAttached { .. }),
                "{device}: {error}"
            );
        }
    }

    /// Needs root and loop devices; elsewhere there is nothing to test.
    #[test]
    fn a_device_in_use_stays_attached_and_a_free_one_goes() {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/loop-control").exists() {
            eprintln!("skipped: needs root and /dev/loop-control");
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let device = loop_attach(file.path(), false).unwrap();
        let found = loop_list()
            .unwrap()
            .into_iter()
            .find(|found| found.device == device)
            .unwrap();
        assert_eq!((found.size, found.read_only), (1 << 20, false));
        assert!(matches!(
            loop_attach(file.path(), true),
            Err(LoopError::Attached { .. })
        ));

        let user = File::open(&device).unwrap();
        let refused = loop_detach(&device);
        assert!(
            matches!(refused, Err(LoopError::InUse { .. })),
            "{refused:?}"
        );
        drop(user);
        assert!(
            is_attached(&device),
            "a refused detach must not happen later"
        );

        loop_detach(&device).unwrap();
        assert!(!is_attached(&device));
        assert!(matches!(
            loop_detach(&device),
            Err(LoopError::NotAttached { .. })
        ));
    }
}
