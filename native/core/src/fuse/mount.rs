//! Mounting /dev/fuse, which needs root. Used by the holder.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

/// Type of the mounts in /proc/self/mountinfo.
pub const FILE_SYSTEM: &str = "fuse.ebbtide";

/// Opens /dev/fuse and mounts it on `directory`. Returns at once: the first user of the mount waits
/// until a server has answered INIT on the descriptor.
pub fn mount(directory: &Path, source: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let descriptor = rustix::fs::open("/dev/fuse", flags, Mode::empty())?;
    let options = CString::new(format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions",
        descriptor.as_raw_fd()
    ))
    .expect("invariant: no NUL in the options");
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME;
    rustix::mount::mount(source, directory, FILE_SYSTEM, flags, options.as_c_str())?;
    Ok(descriptor)
}

/// Unmounts. `ResourceBusy` while a file is open, hence while a loop device stands on one.
pub fn unmount(directory: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(directory, UnmountFlags::empty())?)
}

/// Takes a mount out of the tree at once, whatever still uses it: for one whose server is gone.
pub fn detach(directory: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(directory, UnmountFlags::DETACH)?)
}

/// What lies on a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    Nothing,
    /// One of our mounts; somebody holds its descriptor.
    Alive,
    /// One of our mounts, whose descriptor was closed by everyone: every request fails.
    Dead,
    /// Another file system.
    Foreign,
}

/// Looks at `directory`, without waiting long for a server that does not answer.
pub fn probe(directory: &Path) -> io::Result<Found> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let Some(kind) = file_system_at(&table, directory) else {
        return Ok(Found::Nothing);
    };
    if kind != FILE_SYSTEM {
        return Ok(Found::Foreign);
    }
    // Nothing caches statfs: it fails at once on a dead connection and waits on a living one.
    let (send, receive) = mpsc::channel();
    let target = directory.to_owned();
    std::thread::Builder::new()
        .name("probe".into())
        .spawn(move || {
            // The receiver may have given up.
            let _ = send.send(rustix::fs::statfs(&target).err());
        })?;
    let dead = receive.recv_timeout(Duration::from_secs(1)) == Ok(Some(Errno::NOTCONN));
    Ok(if dead { Found::Dead } else { Found::Alive })
}

/// Type of the file system mounted last on `directory`, by the text of mountinfo.
fn file_system_at<'a>(table: &'a str, directory: &Path) -> Option<&'a str> {
    let line = table.lines().rfind(|line| {
        line.split(' ')
            .nth(4)
            .is_some_and(|path| unescape(path) == directory)
    })?;
    line.split_once(" - ")?.1.split(' ').next()
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let digits = bytes
            .get(at + 1..at + 4)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.map(|digits| u8::from_str_radix(digits, 8)) {
            Some(Ok(code)) if byte == b'\\' => {
                out.push(code);
                at += 4;
            }
            _ => {
                out.push(byte);
                at += 1;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
40 22 0:35 / /run/ebb\\040tide rw,nosuid - ext4 /dev/x rw
41 40 0:36 / /run/ebb\\040tide rw,nosuid - fuse.ebbtide g rw,user_id=0
";

    #[test]
    fn the_upper_mount_counts_and_its_path_may_hold_a_space() {
        let found = |path: &str| file_system_at(TABLE, Path::new(path));
        assert_eq!(found("/run/ebb tide"), Some(FILE_SYSTEM));
        assert_eq!(found("/"), Some("ext4"));
        assert_eq!(found("/run"), None);
    }

    #[test]
    fn a_plain_directory_carries_nothing() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(probe(directory.path()).unwrap(), Found::Nothing);
    }
}
