//! A sector that cannot be read costs its block, with a name, and not all later recovery points.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::rig::{Rig, WAITS, device, eventually, settle};
use crate::format::record::{Cause, RecordBody};
use crate::tap::intent::Identity;
use crate::tap::{Backing, Run, Tap};

const SIZE: u64 = 6 << 20;
/// In region 1.
const BAD: u64 = 300;

/// Blocks from `BAD` on cannot be read.
#[derive(Debug)]
struct BadSectors {
    inner: Arc<dyn Backing>,
    count: Arc<AtomicU64>,
    /// So often; after that they can.
    failures: AtomicU64,
}

impl Backing for BadSectors {
    fn size(&self) -> u64 {
        self.inner.size()
    }
    fn read(&self, buffer: &mut [u8], offset: u64, nowait: bool) -> io::Result<()> {
        let (bad, end) = (BAD * 4096, offset + buffer.len() as u64);
        let count = self.count.load(Ordering::SeqCst);
        let bad = count > 0 && offset < bad + count * 4096 && end > bad;
        let less = |left: u64| left.checked_sub(1);
        let (set, get) = (Ordering::SeqCst, Ordering::SeqCst);
        if bad && self.failures.fetch_update(set, get, less).is_ok() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.inner.read(buffer, offset, nowait)
    }
    fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.inner.write(data, offset)
    }
    fn zero(&self, offset: u64, length: u64, hole: bool) -> io::Result<()> {
        self.inner.zero(offset, length, hole)
    }
    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }
    fn run(&self, offset: u64) -> io::Result<Run> {
        let length = self.size() - offset;
        Ok(Run {
            length,
            hole: false,
        })
    }
    fn identity(&self) -> io::Result<Identity> {
        self.inner.identity()
    }
}

fn rig() -> (Rig, Vec<u8>) {
    let rig = Rig::new(&[SIZE]);
    let content: Vec<u8> = (0..SIZE).map(|at| 1 + (at / 4096) as u8 % 250).collect();
    rig.disk.place("volume0", &content);
    (rig, content)
}

fn start(rig: &Rig, count: &Arc<AtomicU64>) -> Arc<Tap> {
    start_failing(rig, count, u64::MAX)
}

fn start_failing(rig: &Rig, count: &Arc<AtomicU64>, failures: u64) -> Arc<Tap> {
    let mut parts = rig.parts();
    let bad = BadSectors {
        inner: rig.backing(0),
        count: Arc::clone(count),
        failures: failures.into(),
    };
    parts.backings = vec![Arc::new(bad)];
    Tap::start_with(rig.config(), parts).unwrap()
}

/// Whether the newest span ends behind a GAP that names so many bytes.
fn names_missing(rig: &Rig, tap: &Tap, wanted: u64) -> bool {
    let replay = rig.replay(tap);
    let bodies: Vec<&RecordBody> = replay.bodies().collect();
    let end = bodies.iter().rposition(|b| **b == RecordBody::SpanEnd);
    match bodies[end.unwrap() - 1] {
        RecordBody::Gap {
            cause,
            first_seq,
            end_seq,
            bytes,
            ..
        } => {
            assert_eq!((*cause, *bytes), (Cause::BackingError, wanted));
            first_seq == end_seq
        }
        _ => false,
    }
}

#[test]
fn bad_sector_is_named_passed_over_and_copied_when_it_can_be_read() {
    let (rig, mut wanted) = rig();
    let count = Arc::new(AtomicU64::new(2));
    let tap = start(&rig, &count);
    settle(&tap);
    assert!(names_missing(&rig, &tap, 8192));
    let notices = tap.status().notices;
    let named = |notice: &String| notice.contains("volume0: 8192 bytes at 1228800");
    assert!(notices.iter().any(named), "{notices:?}");
    let hole = BAD as usize * 4096..(BAD as usize + 2) * 4096;
    let copied = wanted[hole.clone()].to_vec();
    wanted[hole.clone()].fill(0);
    assert!(rig.replay(&tap).newest(0, SIZE) == wanted);

    // Recorded as any other: only what was there before is missing.
    device(&tap, 0)
        .write(&[7; 4096], BAD * 4096, WAITS)
        .unwrap();
    device(&tap, 0).flush(WAITS).unwrap();
    wanted[hole.start..hole.start + 4096].fill(7);
    // The region is dirty over checkpoints, and copied again by the next tap.
    assert!(tap.core.checkpoint());
    assert_eq!(tap.status().dirty_regions, 1);
    tap.stop().unwrap();
    drop(tap);
    let tap = start(&rig, &count);
    settle(&tap);
    assert!(names_missing(&rig, &tap, 8192));
    assert!(rig.replay(&tap).newest(0, SIZE) == wanted);

    count.store(0, Ordering::SeqCst);
    tap.core.copier.ring();
    wanted[hole.start + 4096..hole.end].copy_from_slice(&copied[4096..]);
    eventually("the copy of what can be read again", || {
        let replay = rig.replay(&tap);
        !replay.in_span() && replay.newest(0, SIZE) == wanted
    });
    rig.check(&tap);
    assert!(!names_missing(&rig, &tap, 0));
    assert!(tap.core.checkpoint());
    assert_eq!(tap.status().dirty_regions, 0);
    tap.stop().unwrap();
}

#[test]
fn what_can_be_read_again_before_the_span_ends_is_copied_within_it() {
    let (rig, wanted) = rig();
    // The region, the piece of it, the block: then the path is back.
    let tap = start_failing(&rig, &Arc::new(AtomicU64::new(1)), 3);
    settle(&tap);
    let replay = rig.replay(&tap);
    assert!(replay.newest(0, SIZE) == wanted);
    assert!(
        !replay
            .bodies()
            .any(|body| matches!(body, RecordBody::Gap { .. }))
    );
    tap.stop().unwrap();
}

#[test]
fn device_that_fails_keeps_its_span_open() {
    let mut rig = Rig::new(&[32 << 20]);
    rig.disk.place("volume0", &vec![5; 32 << 20]);
    rig.queue_bytes = 16 << 20;
    let count = Arc::new(AtomicU64::new(1 << 20));
    let tap = start(&rig, &count);
    let passed_over = || {
        let limit = crate::constants::UNREADABLE_REGIONS_MAX;
        let notices = tap.status().notices;
        let stays = |notice: &String| notice.contains("cannot be read for the copy");
        tap.status().copy_regions_left >= 31 - limit && notices.iter().any(stays)
    };
    eventually("a copier that gives up passing over", passed_over);
    assert!(tap.status().in_span);
    count.store(0, Ordering::SeqCst);
    tap.core.copier.ring();
    eventually("the end of the span", || !tap.status().in_span);
    // What was passed over in time is copied too.
    tap.core.copier.ring();
    eventually("a whole history", || {
        let replay = rig.replay(&tap);
        !replay.in_span() && replay.newest(0, 32 << 20) == rig.content(0)
    });
    tap.stop().unwrap();
}
