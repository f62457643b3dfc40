//! Invariant 3, replication never stops production: a spool that is full, fails or hangs, and a key
//! that is missing, cost a named gap, never local I/O; afterwards history is complete again.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::replay::Replay;
use super::rig::{FUA, ManualTime, Rig, WAITS, device, eventually, settle};
use crate::device::DeviceError;
use crate::format::record::{Cause, RecordBody};
use crate::log::LogPosition;
use crate::storage::{Directory, Fault, FaultyDirectory, File, Loss};
use crate::tap::bitmap::AtomicBitmap;
use crate::tap::clock::Clock;
use crate::tap::core::PATIENCE;
use crate::tap::queue::{Queue, QueueLimits, QueueVolume};
use crate::tap::{Tap, TimeSource};
use crate::types::{Seq, TimeUs, VolumeIndex};

const SIZE: u64 = 6 << 20;

/// Bytes that neither compress nor repeat.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..length / 8).flat_map(|_| next().to_le_bytes()).collect()
}

fn gaps(replay: &Replay) -> Vec<Cause> {
    let cause = |body: &RecordBody| match body {
        RecordBody::Gap {
            cause,
            first_seq,
            end_seq,
            ..
        } => {
            assert!(first_seq < end_seq, "a gap has a size");
            Some(*cause)
        }
        _ => None,
    };
    replay.bodies().filter_map(cause).collect()
}

/// The GAP is at the head of an incarnation and its span follows at once.
fn check_gap(replay: &Replay, cause: Cause) {
    assert_eq!(gaps(replay), [cause]);
    let bodies: Vec<&RecordBody> = replay.bodies().collect();
    let at = bodies
        .iter()
        .position(|body| matches!(body, RecordBody::Gap { .. }))
        .unwrap();
    assert!(matches!(bodies[at - 1], RecordBody::Volume { .. }));
    assert_eq!(*bodies[at + 1], RecordBody::SpanBegin { cause });
    let RecordBody::Gap {
        first_seq, end_seq, ..
    } = bodies[at]
    else {
        unreachable!()
    };
    let inside = replay
        .records
        .iter()
        .filter(|(r, _)| (*first_seq..*end_seq).contains(&r.seq));
    assert_eq!(inside.count(), 0, "nothing inside a gap is in history");
}

fn release_all(tap: &Tap) {
    let end = tap.log_end();
    let (Some(incarnation), Some(last)) = (end.incarnation, end.last_frame) else {
        return;
    };
    let next_frame = crate::types::FrameNo(last.0 + 1);
    tap.release(&LogPosition {
        incarnation,
        next_frame,
    })
    .unwrap();
}

#[test]
fn full_spool_costs_a_gap_and_recovers_when_targets_have_it() {
    // A frame of the copy has a megabyte, and the newest two segments are never released.
    let mut rig = Rig::new(&[2 * SIZE]);
    rig.spool_bytes_max = 8 << 20;
    let tap = rig.start();
    settle(&tap);
    let volume = device(&tap, 0);
    for round in 0..220u64 {
        volume
            .write(&noise(100_000, round), round % 110 * 100_001, WAITS)
            .unwrap();
        if round % 8 == 0 {
            volume.flush(WAITS).unwrap();
        }
    }
    eventually("a gap", || tap.status().mode == "extents-only");
    assert_eq!(tap.status().gap_cause, Some("spool-full"));
    assert!(tap.log_end().total_bytes <= 8 << 20);
    assert!(tap.bookmark("inside").is_err());
    volume.write(&[1; 4096], 0, FUA).unwrap();
    let before = rig.replay(&tap);
    assert!(
        !before.in_span() && gaps(&before).is_empty(),
        "what was kept is contiguous"
    );
    // Each release makes room for a part of the copy, which waits for it: it does not overflow what
    // it mends.
    release_all(&tap);
    eventually("a copy that waits for room", || {
        let notices = tap.status().notices;
        notices.iter().any(|text| text.contains("waits for room"))
    });
    assert_eq!(tap.status().mode, "recording");
    assert!(tap.log_end().total_bytes <= 6 << 20, "a quarter stays free");
    let mut gaps = BTreeSet::new();
    eventually("the end of the span", || {
        let manifest = tap.core.pipeline.with_writer(PATIENCE, |w| w.manifest());
        let events = manifest.unwrap().events;
        gaps.extend(events.iter().filter(|e| e.kind == "gap").map(|e| e.seq));
        release_all(&tap);
        std::thread::sleep(Duration::from_millis(30));
        let status = tap.status();
        let spooled = status.spooled_seq == status.last_seq;
        status.mode == "recording" && !status.in_span && spooled && tap.bookmark("after").is_ok()
    });
    assert_eq!(gaps.len(), 1, "{gaps:?}");
    tap.stop().unwrap();
}

#[test]
fn a_copy_that_nobody_makes_room_for_uses_the_whole_spool() {
    let mut rig = Rig::new(&[7 << 20]);
    rig.disk.place("volume0", &noise(7 << 20, 1));
    rig.spool_bytes_max = 8 << 20;
    rig.kept = true;
    let tap = rig.start();
    settle(&tap);
    assert!(tap.log_end().total_bytes > 7 << 20);
    rig.check(&tap);
    tap.stop().unwrap();
}

#[test]
fn no_space_on_the_medium_is_a_gap_and_history_is_whole_afterwards() {
    let mut rig = Rig::new(&[SIZE]);
    let faulty = Arc::new(FaultyDirectory::new(Arc::new(rig.spool.clone())));
    rig.spool_through = Some(Arc::clone(&faulty) as Arc<dyn Directory>);
    let tap = rig.start();
    settle(&tap);
    let volume = device(&tap, 0);
    volume.write(&noise(500_000, 1), 0, FUA).unwrap();
    faulty.limit_space(300_000);
    for round in 0..20u64 {
        volume
            .write(&noise(200_000, round), round * 200_000, WAITS)
            .unwrap();
    }
    volume.flush(WAITS).unwrap();
    assert_eq!(tap.status().gap_cause, Some("spool-full"));
    faulty.heal();
    let replay = rig.check(&tap);
    check_gap(&replay, Cause::SpoolFull);
    assert_eq!(tap.status().gap_cause, None);
}

#[test]
fn failing_spool_is_opened_again() {
    let mut rig = Rig::new(&[SIZE]);
    let faulty = Arc::new(FaultyDirectory::new(Arc::new(rig.spool.clone())));
    rig.spool_through = Some(Arc::clone(&faulty) as Arc<dyn Directory>);
    let tap = rig.start();
    settle(&tap);
    let volume = device(&tap, 0);
    volume.write(&noise(500_000, 1), 0, FUA).unwrap();
    faulty.fail_change(1, Fault::Error);
    for round in 0..20u64 {
        volume
            .write(&noise(200_000, round), round * 200_000, WAITS)
            .unwrap();
        volume.flush(WAITS).unwrap();
    }
    let replay = rig.check(&tap);
    check_gap(&replay, Cause::SpoolFailed);
}

/// Writes hang while the gate is shut.
#[derive(Debug, Default)]
struct Gate {
    shut: Mutex<bool>,
    opened: Condvar,
    /// Writes panic.
    breaks: AtomicBool,
}

#[derive(Debug)]
struct GatedDirectory {
    inner: Arc<dyn Directory>,
    gate: Arc<Gate>,
}

#[derive(Debug)]
struct GatedFile {
    inner: Arc<dyn File>,
    gate: Arc<Gate>,
}

impl GatedDirectory {
    fn wrap(&self, inner: Arc<dyn File>) -> Arc<dyn File> {
        Arc::new(GatedFile {
            inner,
            gate: Arc::clone(&self.gate),
        })
    }
}

impl Directory for GatedDirectory {
    fn create(&self, name: &str) -> io::Result<Arc<dyn File>> {
        Ok(self.wrap(self.inner.create(name)?))
    }
    fn open(&self, name: &str, writable: bool) -> io::Result<Arc<dyn File>> {
        Ok(self.wrap(self.inner.open(name, writable)?))
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

impl File for GatedFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.inner.read_at(buffer, offset)
    }
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        assert!(!self.gate.breaks.load(Ordering::SeqCst), "as told");
        let mut shut = self.gate.shut.lock();
        while *shut {
            self.gate.opened.wait(&mut shut);
        }
        drop(shut);
        self.inner.write_at(data, offset)
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
}

#[test]
fn stuck_encoder_never_holds_local_io_for_long() {
    let mut rig = Rig::new(&[SIZE]);
    let gate = Arc::new(Gate::default());
    let inner: Arc<dyn Directory> = Arc::new(rig.spool.clone());
    rig.spool_through = Some(Arc::new(GatedDirectory {
        inner,
        gate: Arc::clone(&gate),
    }));
    rig.queue_bytes = 4 << 20;
    rig.stuck = Duration::from_millis(200);
    let tap = rig.start();
    settle(&tap);
    let volume = device(&tap, 0);
    *gate.shut.lock() = true;
    let started = Instant::now();
    let nowait = super::rig::NOWAIT;
    let mut would_block = 0;
    for round in 0..100u64 {
        let (data, offset) = (noise(100_000, round), round % 50 * 100_001);
        match volume.write(&data, offset, nowait) {
            Ok(()) => {}
            Err(DeviceError::WouldBlock) => {
                would_block += 1;
                volume.write(&data, offset, WAITS).unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
    volume.flush(WAITS).unwrap();
    assert!(would_block > 0, "the queue was full");
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(tap.status().mode, "extents-only");
    assert_eq!(tap.status().gap_cause, Some("encoder-stuck"));
    *gate.shut.lock() = false;
    gate.opened.notify_all();
    let replay = rig.check(&tap);
    check_gap(&replay, Cause::EncoderStuck);
}

#[test]
fn flush_alone_is_released_when_the_spool_hangs() {
    let mut rig = Rig::new(&[SIZE]);
    let gate = Arc::new(Gate::default());
    let inner: Arc<dyn Directory> = Arc::new(rig.spool.clone());
    rig.spool_through = Some(Arc::new(GatedDirectory {
        inner,
        gate: Arc::clone(&gate),
    }));
    rig.stuck = Duration::from_millis(200);
    let tap = rig.start();
    settle(&tap);
    *gate.shut.lock() = true;
    device(&tap, 0).write(&[1; 4096], 0, WAITS).unwrap();
    device(&tap, 0).flush(WAITS).unwrap();
    assert_eq!(tap.status().mode, "extents-only");
    *gate.shut.lock() = false;
    gate.opened.notify_all();
    rig.check(&tap);
}

fn queue() -> Queue {
    let volume = QueueVolume {
        index: VolumeIndex(0),
        name: "a".to_owned(),
        size: SIZE,
        to_copy: AtomicBitmap::new(6),
    };
    let limits = QueueLimits {
        bytes: 4 << 20,
        frame_delay: Duration::from_millis(2),
        stuck: Duration::from_secs(2),
    };
    let time: Arc<dyn TimeSource> = Arc::new(ManualTime::default());
    let clock = Clock::new(time.boot_us(), time.wall_us(), 0);
    let numbers = (Seq(1), TimeUs(0));
    Queue::new(
        limits,
        time,
        [volume].into(),
        Arc::default(),
        clock,
        numbers,
    )
}

#[test]
fn waiter_that_slept_through_two_gaps_learns_that_its_record_is_lost() {
    let queue = queue();
    queue.set_limits(Seq(1000), TimeUs(u64::MAX));
    let settle = |in_spool| {
        let mut batch = Vec::new();
        while !queue.lock().is_idle() {
            assert!(queue.take(&mut batch));
            queue.committed(batch.len(), in_spool);
        }
    };
    let bookmark = || {
        let label = "b".to_owned();
        let body = RecordBody::Bookmark { label };
        queue.place_control(body).unwrap().0
    };
    let mut lost = Vec::new();
    let mut kept = Vec::new();
    for _ in 0..100 {
        kept.push(bookmark());
        settle(true);
        lost.push(bookmark());
        queue.give_up(Cause::SpoolFull);
        settle(false);
        assert!(queue.resume(&mut queue.lock()));
        settle(true);
    }
    for seq in lost {
        assert_eq!(queue.wait_spooled(seq), Ok(false), "{seq:?}");
    }
    // Of the oldest gaps only the whole is known.
    for seq in &kept[60..] {
        assert_eq!(queue.wait_spooled(*seq), Ok(true), "{seq:?}");
    }
}

#[test]
fn recording_goes_on_only_with_numbers_for_the_gap_and_its_span() {
    let queue = queue();
    queue.open_gap(&mut queue.lock(), Cause::SpoolFull);
    // For the VOLUME record and the GAP, not for the span.
    queue.set_limits(Seq(3), TimeUs(u64::MAX));
    assert!(!queue.resume(&mut queue.lock()));
    assert!(queue.lock().gap.is_some(), "the gap is still to be told");
    queue.set_limits(Seq(4), TimeUs(u64::MAX));
    assert!(queue.resume(&mut queue.lock()));
    let state = queue.lock();
    assert_eq!((state.gap, state.in_span), (None, Some(Cause::SpoolFull)));
}

#[test]
fn what_a_failed_write_left_is_copied_if_a_gap_opened_meanwhile() {
    let mut rig = Rig::new(&[SIZE]);
    let gate = Arc::new(Gate::default());
    let inner: Arc<dyn Directory> = Arc::new(rig.spool.clone());
    rig.spool_through = Some(Arc::new(GatedDirectory {
        inner,
        gate: Arc::clone(&gate),
    }));
    rig.stuck = Duration::from_millis(200);
    let tap = rig.start();
    settle(&tap);
    let volume = device(&tap, 0);
    volume.write(&[1; 4096], 4 << 20, FUA).unwrap();
    *gate.shut.lock() = true;
    volume.write(&[2; 4096], 0, WAITS).unwrap();
    volume.flush(WAITS).unwrap();
    assert_eq!(tap.status().mode, "extents-only");
    // The write of [1; 4096] fails only now: half of something else is there.
    let disk = rig.disk.open("volume0", true).unwrap();
    disk.write_at(&[3; 2048], 4 << 20).unwrap();
    let block = (4 << 20) / 4096;
    tap.core.backing_failed(&tap.core.volumes[0], block, 1);
    *gate.shut.lock() = false;
    gate.opened.notify_all();
    rig.check(&tap);
}

/// Runs itself again in a process of its own.
#[test]
fn panic_of_an_encoder_thread_ends_the_process() {
    const CHILD: &str = "EBB_TEST_PANICS";
    if std::env::var_os(CHILD).is_none() {
        let name = "tap::tests::gaps::panic_of_an_encoder_thread_ends_the_process";
        let ended = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.signal(), Some(libc::SIGABRT), "{told}");
        assert!(told.contains("tap-encode-"), "{told}");
        return;
    }
    let mut rig = Rig::new(&[SIZE]);
    let gate = Arc::new(Gate::default());
    let inner: Arc<dyn Directory> = Arc::new(rig.spool.clone());
    rig.spool_through = Some(Arc::new(GatedDirectory {
        inner,
        gate: Arc::clone(&gate),
    }));
    let tap = rig.start();
    settle(&tap);
    gate.breaks.store(true, Ordering::SeqCst);
    device(&tap, 0).write(&[1; 4096], 0, WAITS).unwrap();
    // Does not return: its thread waits for a frame that never comes.
    let _ = device(&tap, 0).flush(WAITS);
}

#[test]
fn request_under_way_at_a_stop_still_gets_its_numbers() {
    let mut rig = Rig::new(&[SIZE]);
    rig.stuck = Duration::from_secs(1);
    let tap = rig.start();
    settle(&tap);
    let volume = device(&tap, 0);
    std::thread::scope(|scope| {
        let held = tap.core.volumes[0].ranges.lock(0, 1);
        let writing = scope.spawn(|| volume.write(&[9; 4096], 0, WAITS));
        let under_way = || !tap.core.grace.wait(|| true);
        eventually("a request under way", under_way);
        let stopping = scope.spawn(|| tap.stop());
        eventually("the stop", || tap.core.is_stopping());
        // The other threads have seen it; nothing is reserved any more.
        std::thread::sleep(Duration::from_millis(200));
        let next = tap.core.queue.last_seq().0 + 1;
        tap.core.queue.set_limits(Seq(next), TimeUs(0));
        drop(held);
        writing.join().unwrap().unwrap();
        stopping.join().unwrap().unwrap();
    });
    let replay = rig.replay(&tap);
    assert!(gaps(&replay).is_empty());
    assert!(replay.newest(0, SIZE) == rig.content(0));
}

#[test]
fn without_a_key_extents_are_kept_and_made_good_with_it() {
    for clean in [true, false] {
        let mut rig = Rig::new(&[SIZE]);
        let tap = rig.start();
        settle(&tap);
        device(&tap, 0).write(&noise(100_000, 5), 0, WAITS).unwrap();
        tap.stop().unwrap();
        drop(tap);
        let key = rig.key.take();
        let tap = rig.start();
        let volume = device(&tap, 0);
        volume.write(&noise(100_000, 6), 1_500_000, WAITS).unwrap();
        volume.flush(WAITS).unwrap();
        let status = tap.status();
        assert_eq!(
            (status.mode, status.gap_cause),
            ("extents-only", Some("no-key"))
        );
        if clean {
            tap.stop().unwrap();
            drop(tap);
        } else {
            drop(tap);
            rig.crash(Loss::Everything, Loss::Everything, Loss::Nothing);
        }
        rig.key = key;
        let tap = rig.start();
        let replay = rig.check(&tap);
        check_gap(&replay, Cause::NoKey);
        tap.stop().unwrap();
    }
}

#[test]
fn failed_backing_write_is_an_error_and_history_follows_the_backing() {
    let mut rig = Rig::new(&[SIZE]);
    let faulty = Arc::new(FaultyDirectory::new(Arc::new(rig.disk.clone())));
    rig.disk_through = Some(Arc::clone(&faulty) as Arc<dyn Directory>);
    let tap = rig.start();
    settle(&tap);
    let volume = device(&tap, 0);
    volume.write(&noise(8192, 1), 0, WAITS).unwrap();
    faulty.fail_change(1, Fault::Short);
    assert_eq!(
        volume.write(&noise(8192, 2), 0, WAITS),
        Err(DeviceError::Io(libc::EIO))
    );
    let replay = rig.check(&tap);
    assert!(
        replay
            .bodies()
            .any(|body| matches!(body, RecordBody::Resync { .. }))
    );
    // The read back fails too: a span says that the region is not known.
    faulty.fail_change(1, Fault::Short);
    faulty.fail_read(1);
    assert_eq!(
        volume.write(&noise(8192, 3), 0, WAITS),
        Err(DeviceError::Io(libc::EIO))
    );
    eventually("a span", || {
        rig.replay(&tap).bodies().any(|body| {
            *body
                == RecordBody::SpanBegin {
                    cause: Cause::BackingError,
                }
        })
    });
    rig.check(&tap);
}

#[test]
fn failed_sync_of_the_backing_is_not_forgotten() {
    let mut rig = Rig::new(&[SIZE]);
    let faulty = Arc::new(FaultyDirectory::new(Arc::new(rig.disk.clone())));
    rig.disk_through = Some(Arc::clone(&faulty) as Arc<dyn Directory>);
    let tap = rig.start();
    settle(&tap);
    let volume = device(&tap, 0);
    volume.write(&[1; 4096], 0, WAITS).unwrap();
    faulty.fail_change(1, Fault::Error);
    assert_eq!(volume.flush(WAITS), Err(DeviceError::Io(libc::EIO)));
    assert_eq!(
        volume.flush(WAITS),
        Err(DeviceError::Io(libc::EIO)),
        "not retried"
    );
    volume.write(&[2; 4096], 0, WAITS).unwrap();
    assert!(tap.stop().is_err(), "no clean marker");
    drop(tap);
    let tap = rig.start();
    assert!(tap.status().in_span || tap.status().dirty_regions > 0);
    rig.check(&tap);
}
