//! A process in the write-back path must not wait for memory that only it can free.
//!
//! It is locked in memory, its threads allocate without starting I/O (PR_SET_IO_FLUSHER, which also
//! exempts them from the throttling of those who dirty pages), the OOM killer passes it by, and its
//! caches fit the control group it runs in.

#![allow(unsafe_code)]

use std::path::{Path, PathBuf};

use crate::constants::ENCODER_QUEUE_BYTES_MIN;
use rustix::mm::{MlockAllFlags, mlockall};

/// Share of the available memory that one cache may have by itself: 1/8. Encoder queue, front ends
/// and the page cache of spool and backing live in the rest.
const CACHE_SHARE: u64 = 8;
/// From `include/uapi/linux/prctl.h`; needs CAP_SYS_RESOURCE and kernel 5.6.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Prepares this process for the write-back path. Call it before threads start: they inherit it.
/// Returns what could not be done, in sentences for people; none of it stops the process.
pub fn enter_write_back_path() -> Vec<String> {
    let mut notices = Vec::new();
    if let Err(error) = become_io_flusher() {
        notices.push(format!(
            "cannot become an I/O flusher: {error}; grant CAP_SYS_RESOURCE"
        ));
    }
    // ONFAULT: pages are locked as they are first used. Locking the whole address space at once
    // would make every thread's stack and arena resident.
    let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    if let Err(error) = mlockall(all) {
        notices.push(format!("cannot lock memory: {error}; raise RLIMIT_MEMLOCK"));
    }
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        notices.push(format!("cannot be exempted from the OOM killer: {error}"));
    }
    notices
}

fn become_io_flusher() -> std::io::Result<()> {
    let (yes, none): (libc::c_ulong, libc::c_ulong) = (1, 0);
    // SAFETY: PR_SET_IO_FLUSHER takes one integer and three zeroes and touches no memory of ours.
    match unsafe { libc::prctl(PR_SET_IO_FLUSHER, yes, none, none, none) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Whether the page cache is dangerous for us: a control group limits our memory, others may fill
/// it, and the kernel does not know that they wait for us.
pub fn must_avoid_page_cache() -> bool {
    available_memory() < physical_memory() && become_io_flusher().is_err()
}

/// Has the allocator keep what it once got. Memory that is given back and asked for again has to be
/// found again, at a time when there may be none. For a process that `must_avoid_page_cache`.
pub fn keep_memory() {
    // SAFETY: mallopt only sets limits of the allocator; these are within its ranges.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 30);
    }
}

/// Keeps secrets out of core files and away from debuggers of the same user.
pub fn forbid_core_files() {
    // SAFETY: PR_SET_DUMPABLE takes one integer and touches no memory of ours.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
}

/// Bytes that this process may use: physical memory, or less if a control group (v1 or v2, its own
/// or one above) sets a limit.
pub fn available_memory() -> u64 {
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    limit_files(&groups, &mounts)
        .iter()
        .filter_map(|path| std::fs::read_to_string(path).ok()?.trim().parse().ok())
        .fold(physical_memory(), u64::min)
}

/// The bytes that a cache may have: what is configured, or less where memory is short.
pub fn cache_limit(configured: u64) -> usize {
    share_of(available_memory(), configured, 0)
}

/// The bytes that the encoder's queue may have: it works with less, but not with none.
pub fn queue_limit(configured: usize) -> usize {
    share_of(
        available_memory(),
        configured as u64,
        ENCODER_QUEUE_BYTES_MIN,
    )
}

fn share_of(available: u64, configured: u64, least: usize) -> usize {
    let share = configured.min(available / CACHE_SHARE);
    usize::try_from(share).unwrap_or(usize::MAX).max(least)
}

fn physical_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").ok();
    text.and_then(|text| meminfo_total(&text))
        .unwrap_or(u64::MAX)
}

fn meminfo_total(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// Files that hold the memory limits above this process, by the texts of /proc/self/cgroup and
/// /proc/self/mountinfo. "max" in such a file is no number and so no limit.
fn limit_files(groups: &str, mounts: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        // hierarchy-ID:controller-list:cgroup-path
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let (kind, file) = if controllers.is_empty() {
            ("cgroup2", "memory.max")
        } else if controllers
            .split(',')
            .any(|controller| controller == "memory")
        {
            ("cgroup", "memory.limit_in_bytes")
        } else {
            continue;
        };
        let Some((root, mountpoint)) = mount_of(mounts, kind) else {
            continue;
        };
        // Inside a container the mount may show only a part of the hierarchy.
        let inner = Path::new(path).strip_prefix(root).unwrap_or(Path::new(""));
        let inner = inner.strip_prefix("/").unwrap_or(inner);
        files.extend(
            inner
                .ancestors()
                .map(|group| Path::new(mountpoint).join(group).join(file)),
        );
    }
    files
}

/// Root and mount point of the hierarchy of `kind`; of version 1, the one with the memory
/// controller.
fn mount_of<'a>(mounts: &'a str, kind: &str) -> Option<(&'a str, &'a str)> {
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let (found, options) = (after.next()?, after.nth(1)?);
        let memory = kind == "cgroup2" || options.split(',').any(|option| option == "memory");
        let mut fields = before.split(' ').skip(3);
        (found == kind && memory).then_some((fields.next()?, fields.next()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "\
30 22 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
31 22 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
32 22 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup rw
";

    #[test]
    fn every_group_above_ours_may_set_the_limit() {
        let files = limit_files("4:memory:/a/b\n1:cpu:/x\n0::/\n", V1);
        let expected = [
            "/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/a/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/unified/memory.max",
        ];
        assert_eq!(files, expected.map(PathBuf::from));
    }

    #[test]
    fn a_container_sees_its_own_part_of_the_hierarchy() {
        let mounts = "40 1 0:28 /docker/1 /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        let files = limit_files("0::/docker/1/inner\n", mounts);
        let expected = [
            "/sys/fs/cgroup/inner/memory.max",
            "/sys/fs/cgroup/memory.max",
        ];
        assert_eq!(files, expected.map(PathBuf::from));
    }

    #[test]
    fn garbage_sets_no_limit() {
        assert!(limit_files("memory\n::\nx:y\n", V1).len() <= 1);
        assert!(limit_files("4:memory:/a\n", "nonsense\n").is_empty());
        assert_eq!(meminfo_total("MemTotal:  2 kB\n"), Some(2048));
        assert_eq!(meminfo_total("MemFree: 2 kB\n"), None);
    }

    #[test]
    fn a_cache_never_has_more_than_its_share() {
        let available = available_memory();
        assert!(available > 0);
        assert_eq!(cache_limit(4096), 4096);
        assert_eq!(cache_limit(u64::MAX) as u64, available / CACHE_SHARE);
    }

    #[test]
    fn the_queue_takes_a_record_however_little_memory_there_is() {
        let limit = |available| share_of(available, 64 << 20, ENCODER_QUEUE_BYTES_MIN);
        assert_eq!(limit(1 << 20), ENCODER_QUEUE_BYTES_MIN);
        assert_eq!(limit(256 << 20), 32 << 20);
        assert_eq!(limit(u64::MAX), 64 << 20);
        assert!(queue_limit(1) >= ENCODER_QUEUE_BYTES_MIN);
    }
}
