//! Refuses a spool or state directory that lies on a protected volume, directly or below loop
//! devices, partitions, device-mapper or md: its own writes would be writes to record, and under
//! memory pressure each would wait for the other.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::{TapError, VolumeConfig};

/// A device number, as in `/sys/dev/block`.
type Device = (u32, u32);

/// One line of mountinfo, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    device: Device,
    point: PathBuf,
    kind: String,
    source: String,
}

/// Looks at `directory` and everything below it.
pub fn check(directory: &Path, volumes: &[VolumeConfig]) -> Result<(), TapError> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut walk = Walk {
        volumes,
        mounts: parse_mounts(&mounts),
        seen: BTreeSet::new(),
    };
    let directory = directory
        .canonicalize()
        .unwrap_or_else(|_| directory.to_owned());
    match walk.on_path(&directory) {
        Some(path) => Err(TapError::SpoolOnVolume { path }),
        None => Ok(()),
    }
}

/// mountinfo writes blanks and the like as `\040`.
fn unescape(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let code = rest
            .get(at + 1..at + 4)
            .and_then(|code| u8::from_str_radix(code, 8).ok());
        if let Some(code) = code {
            out.push(char::from(code));
            rest = &rest[at + 4..];
        } else {
            out.push('\\');
            rest = &rest[at + 1..];
        }
    }
    out + rest
}

fn parse_device(text: &str) -> Option<Device> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn parse_mounts(text: &str) -> Vec<Mount> {
    let parse = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ');
        let device = parse_device(left.nth(2)?)?;
        let point = PathBuf::from(unescape(left.nth(1)?));
        let mut right = right.split(' ');
        let kind = right.next()?.to_owned();
        Some(Mount {
            device,
            point,
            kind,
            source: unescape(right.next()?),
        })
    };
    text.lines().filter_map(parse).collect()
}

struct Walk<'a> {
    volumes: &'a [VolumeConfig],
    mounts: Vec<Mount>,
    seen: BTreeSet<Device>,
}

impl Walk<'_> {
    /// The backing that a file or directory lies on.
    fn on_path(&mut self, path: &Path) -> Option<PathBuf> {
        // The last of the longest: a later mount hides an earlier one.
        let mount = self
            .mounts
            .iter()
            .filter(|mount| path.starts_with(&mount.point))
            .max_by_key(|mount| mount.point.components().count())
            .cloned();
        if let Some(mount) = &mount
            && mount.kind.starts_with("fuse")
            && let Some(found) = self.served_by_a_tap(mount, path)
        {
            // Not touched: the file system waits for the tap that is starting here.
            return Some(found);
        }
        if mount
            .as_ref()
            .is_some_and(|mount| mount.kind.starts_with("fuse"))
        {
            return None;
        }
        let metadata = std::fs::metadata(path).ok()?;
        let same = |volume: &&VolumeConfig| {
            std::fs::metadata(&volume.backing)
                .is_ok_and(|b| (b.dev(), b.ino()) == (metadata.dev(), metadata.ino()))
        };
        if let Some(volume) = self.volumes.iter().find(same) {
            return Some(volume.backing.clone());
        }
        let number = metadata.dev();
        let device = (rustix::fs::major(number), rustix::fs::minor(number));
        if let Some(found) = self.on_device(device) {
            return Some(found);
        }
        // Btrfs and others show a number of their own; the mount names the device.
        let source = mount.filter(|mount| mount.source.starts_with('/'))?.source;
        let metadata = std::fs::metadata(source).ok()?;
        if !metadata.file_type().is_block_device() {
            return None;
        }
        let number = metadata.rdev();
        self.on_device((rustix::fs::major(number), rustix::fs::minor(number)))
    }

    /// A volume of this group that a tap shows as a file in a FUSE file system.
    fn served_by_a_tap(&self, mount: &Mount, path: &Path) -> Option<PathBuf> {
        let ours = mount.kind.contains("ebbtide") || mount.source.contains("ebbtide");
        let name = path.file_name()?.to_str()?;
        let volume = self.volumes.iter().find(|volume| volume.name == name)?;
        ours.then(|| volume.backing.clone())
    }

    /// The backing that a block device is, or is made of.
    fn on_device(&mut self, device: Device) -> Option<PathBuf> {
        if device.0 == 0 || !self.seen.insert(device) {
            return None;
        }
        if let Some(volume) = self
            .volumes
            .iter()
            .find(|v| device_of(&v.backing) == Some(device))
        {
            return Some(volume.backing.clone());
        }
        let sys = PathBuf::from(format!("/sys/dev/block/{}:{}", device.0, device.1));
        if let Ok(file) = std::fs::read_to_string(sys.join("loop/backing_file")) {
            let file = PathBuf::from(file.trim_end_matches('\n'));
            if let Some(found) = self.on_path(&file) {
                return Some(found);
            }
        }
        let mut below = Vec::new();
        if sys.join("partition").exists() {
            below.extend(read_device(&sys.join("../dev")));
        }
        for entry in std::fs::read_dir(sys.join("slaves"))
            .into_iter()
            .flatten()
            .flatten()
        {
            below.extend(read_device(&entry.path().join("dev")));
        }
        below.into_iter().find_map(|device| self.on_device(device))
    }
}

fn read_device(path: &Path) -> Option<Device> {
    parse_device(&std::fs::read_to_string(path).ok()?)
}

fn device_of(path: &Path) -> Option<Device> {
    let metadata = std::fs::metadata(path).ok()?;
    let number = metadata.rdev();
    metadata
        .file_type()
        .is_block_device()
        .then(|| (rustix::fs::major(number), rustix::fs::minor(number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:33 / /run/ebb\\040tide rw - fuse.ebbtide ebbtide rw,user_id=0
31 22 0:40 /sub /data rw master:1 - btrfs /dev/vdb rw";

    #[test]
    fn mountinfo_is_read_with_its_escapes() {
        let mounts = parse_mounts(MOUNTINFO);
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[0].device, (8, 1));
        assert_eq!(mounts[1].point, Path::new("/run/ebb tide"));
        assert_eq!(mounts[1].kind, "fuse.ebbtide");
        assert_eq!(mounts[2].source, "/dev/vdb");
        assert_eq!(unescape("a\\134b\\9"), "a\\b\\9");
    }

    #[test]
    fn a_loop_device_over_our_own_fuse_file_is_recognized_without_touching_it() {
        let volumes = [VolumeConfig {
            index: crate::types::VolumeIndex(0),
            name: "db".to_owned(),
            backing: PathBuf::from("/images/db.img"),
        }];
        let mounts = parse_mounts(MOUNTINFO);
        let mut walk = Walk {
            volumes: &volumes,
            mounts,
            seen: BTreeSet::new(),
        };
        let file = Path::new("/run/ebb tide/db");
        assert_eq!(walk.on_path(file), Some(PathBuf::from("/images/db.img")));
        assert_eq!(walk.on_path(Path::new("/run/ebb tide/other")), None);
    }

    #[test]
    fn a_directory_beside_the_image_is_accepted() {
        let directory = tempfile::tempdir().unwrap();
        let backing = directory.path().join("image");
        std::fs::write(&backing, [0; 4096]).unwrap();
        let name = "v".to_owned();
        let volumes = [VolumeConfig {
            index: crate::types::VolumeIndex(0),
            name,
            backing,
        }];
        check(directory.path(), &volumes).unwrap();
    }
}
