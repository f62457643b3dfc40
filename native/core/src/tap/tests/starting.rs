//! What a start finds and says: shrunk, grown and changed backings, second taps, damaged state; and
//! the control requests: bookmark, copy, new incarnation, release.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::rig::{Rig, WAITS, device, eventually, settle};
use crate::format::record::{Cause, RecordBody};
use crate::log::{LogEnd, LogPosition};
use crate::storage::Loss;
use crate::tap::{Tap, TapConfig, TapError};
use crate::types::{Seq, TimeUs};

fn real(directory: &std::path::Path, bytes: u64) -> TapConfig {
    let mut config = Rig::new(&[4096]).config();
    config.volumes[0].backing = directory.join("image");
    config.spool = directory.join("spool");
    config.state = directory.join("state");
    let image = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&config.volumes[0].backing)
        .unwrap();
    if bytes > 0 {
        image.set_len(bytes).unwrap();
    }
    config
}

#[test]
fn second_tap_on_one_volume_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let config = real(directory.path(), 1 << 20);
    let tap = Tap::start(config.clone()).unwrap();
    let other = TapConfig {
        spool: directory.path().join("spool2"),
        state: directory.path().join("state2"),
        ..config.clone()
    };
    assert!(matches!(
        Tap::start(other).unwrap_err(),
        TapError::InUse { .. }
    ));
    tap.stop().unwrap();
    drop(tap);
    Tap::start(config).unwrap().stop().unwrap();
}

#[test]
fn backing_changed_behind_the_tap_is_said_and_copied() {
    let directory = tempfile::tempdir().unwrap();
    let config = real(directory.path(), 1 << 20);
    let image = config.volumes[0].backing.clone();
    let tap = Tap::start(config.clone()).unwrap();
    settle(&tap);
    device(&tap, 0).write(&[1; 4096], 0, WAITS).unwrap();
    tap.stop().unwrap();
    drop(tap);
    let tap = Tap::start(config.clone()).unwrap();
    assert!(
        tap.status().notices.is_empty(),
        "{:?}",
        tap.status().notices
    );
    tap.stop().unwrap();
    drop(tap);
    std::thread::sleep(std::time::Duration::from_millis(20));
    let mut content = std::fs::read(&image).unwrap();
    content[700_000] = 9;
    std::fs::write(&image, &content).unwrap();
    let tap = Tap::start(config).unwrap();
    assert!(
        tap.status()
            .notices
            .iter()
            .any(|notice| notice.contains("changed"))
    );
    settle(&tap);
    let spool = crate::storage::DiskDirectory::open(&directory.path().join("spool")).unwrap();
    let replay = super::replay::Replay::read(
        std::sync::Arc::new(spool),
        super::rig::GROUP,
        &super::rig::key(),
        &tap.log_end(),
    );
    let cause = Cause::BackingChanged;
    assert!(
        replay
            .bodies()
            .any(|body| *body == RecordBody::SpanBegin { cause })
    );
    assert_eq!(replay.newest(0, 1 << 20), content);
    tap.stop().unwrap();
}

#[test]
fn shrunk_volume_is_refused_and_a_grown_one_is_told() {
    let mut rig = Rig::new(&[3 << 20]);
    let tap = rig.start();
    settle(&tap);
    device(&tap, 0).write(&[1; 4096], 0, WAITS).unwrap();
    tap.stop().unwrap();
    drop(tap);
    let mut content = rig.content(0);
    rig.disk.place("volume0", &content[..2 << 20]);
    let error = rig.try_start().unwrap_err();
    assert!(matches!(
        error,
        TapError::Shrunk {
            recorded: 3_145_728,
            found: 2_097_152,
            ..
        }
    ));
    content.resize(5 << 20, 8);
    rig.disk.place("volume0", &content);
    rig.sizes = vec![5 << 20];
    let tap = rig.start();
    let replay = rig.check(&tap);
    let sizes = replay.bodies().filter_map(|body| match body {
        RecordBody::Volume { size, .. } => Some(*size),
        _ => None,
    });
    assert_eq!(sizes.collect::<Vec<_>>(), [3 << 20, 5 << 20]);
    assert!(
        tap.status()
            .notices
            .iter()
            .any(|notice| notice.contains("grew"))
    );
}

#[test]
fn damaged_bitmap_is_a_copy_and_damaged_state_an_error() {
    let rig = Rig::new(&[3 << 20]);
    let tap = rig.start();
    settle(&tap);
    device(&tap, 0).write(&[1; 4096], 0, WAITS).unwrap();
    tap.stop().unwrap();
    drop(tap);
    let name = "volume-0000.intent";
    let good = rig.state.content(name).unwrap();
    for at in [20, 512 + 3, 512 + 509] {
        let mut bad = good.clone();
        bad[at] ^= 4;
        rig.state.place(name, &bad);
        let tap = rig.start();
        assert!(!tap.status().notices.is_empty(), "byte {at}");
        let replay = rig.check(&tap);
        assert!(
            replay
                .bodies()
                .filter(|b| matches!(b, RecordBody::SpanBegin { .. }))
                .count()
                > 1
        );
        tap.stop().unwrap();
        drop(tap);
    }
    rig.state.place("tap.state", &[7; 8192]);
    assert!(rig.try_start().is_err());
}

#[test]
fn bookmark_is_a_point_in_the_spool() {
    let rig = Rig::new(&[1 << 20]);
    let tap = rig.start();
    settle(&tap);
    let volume = device(&tap, 0);
    volume.write(&[1; 4096], 0, WAITS).unwrap();
    let (seq, time) = tap.bookmark("before the change").unwrap();
    let image = rig.content(0);
    volume.write(&[2; 4096], 0, WAITS).unwrap();
    let replay = rig.check(&tap);
    let label = "before the change".to_owned();
    let (found, _) = replay
        .records
        .iter()
        .find(|(r, _)| {
            r.body
                == RecordBody::Bookmark {
                    label: label.clone(),
                }
        })
        .unwrap();
    assert_eq!((found.seq, found.time), (seq, time));
    assert_eq!(replay.image(0, 1 << 20, seq), image);
    assert!(tap.bookmark("").is_err() && tap.bookmark(&"x".repeat(256)).is_err());
}

#[test]
fn new_incarnation_lies_above_what_a_target_holds() {
    let mut rig = Rig::new(&[1 << 20]);
    let tap = rig.start();
    settle(&tap);
    let volume = device(&tap, 0);
    volume.write(&[1; 4096], 0, WAITS).unwrap();
    let status = tap.status();
    let above = (
        Seq(status.last_seq.0 + 5_000_000),
        TimeUs(status.last_time.0 + 5_000_000),
    );
    tap.new_incarnation(above.0, above.1, false).unwrap();
    volume.write(&[1; 4096], 0, WAITS).unwrap();
    let status = tap.status();
    assert!(status.last_seq > above.0 && status.last_time > above.1);
    let replay = rig.check(&tap);
    assert_eq!(replay.incarnations.len(), 2);
    assert_eq!(replay.same, 0, "nothing refers across an incarnation");
    drop(tap);
    rig.crash(Loss::Everything, Loss::Everything, Loss::Everything);
    let tap = rig.start();
    assert!(tap.status().last_seq > status.last_seq);
    rig.check(&tap);
}

#[test]
fn incarnation_with_a_copy_begins_with_the_span_of_it() {
    let sizes = [9 << 20, 3 << 20];
    let rig = Rig::new(&sizes);
    let tap = rig.start();
    settle(&tap);
    let content = vec![4; 2 << 20];
    device(&tap, 0).write(&content, 70_000, WAITS).unwrap();
    let status = tap.status();
    let above = (
        Seq(status.last_seq.0 + 5_000_000),
        TimeUs(status.last_time.0 + 5_000_000),
    );
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0u64.. {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                let offset = round * 4096 % (3 << 20);
                device(&tap, 1)
                    .write(&[round as u8 | 1; 4096], offset, WAITS)
                    .unwrap();
            }
        });
        std::thread::sleep(Duration::from_millis(20));
        tap.new_incarnation(above.0, above.1, true).unwrap();
        stop.store(true, Ordering::SeqCst);
    });
    let replay = rig.check(&tap);
    assert_eq!(replay.incarnations.len(), 2);
    let bodies: Vec<&RecordBody> = replay.bodies().collect();
    let is_begin = |body: &&RecordBody| matches!(body, RecordBody::SpanBegin { .. });
    let begin = bodies.iter().rposition(is_begin).unwrap();
    let heads = &replay.records[begin - 2..begin];
    assert!(
        heads
            .iter()
            .all(|(head, _)| matches!(head.body, RecordBody::Volume { .. }))
    );
    assert!(heads[0].0.seq > above.0 && heads[0].0.time > above.1);
    let mut copied = sizes.map(|size| vec![false; (size / 4096) as usize]);
    for body in &bodies[begin..] {
        if let RecordBody::Resync { extent, .. } | RecordBody::Zero { extent } = body {
            let blocks = extent.start.0 as usize..extent.end().0 as usize;
            copied[usize::from(extent.volume.0)][blocks].fill(true);
        }
    }
    assert!(copied.iter().flatten().all(|copied| *copied));
}

#[test]
fn release_gives_back_sealed_segments_and_the_end_is_published() {
    let rig = Rig::new(&[1 << 20]);
    let tap = rig.start();
    settle(&tap);
    let seen = tap.log_end();
    let waited = std::thread::scope(|scope| {
        let waiter = scope.spawn(|| tap.wait_log_end(&seen, 10_000));
        device(&tap, 0).write(&[5; 10_000], 70_000, WAITS).unwrap();
        waiter.join().unwrap()
    });
    assert!(waited.last_seq > seen.last_seq);
    assert_eq!(tap.wait_log_end(&tap.log_end(), 1), tap.log_end());
    // The newest sealed segment is kept, whatever is released.
    tap.new_incarnation(Seq(0), TimeUs(0), false).unwrap();
    tap.new_incarnation(Seq(0), TimeUs(0), false).unwrap();
    let end: LogEnd = tap.log_end();
    let (incarnation, next_frame) = (end.incarnation.unwrap(), end.last_frame.unwrap());
    eventually("a release", || {
        tap.release(&LogPosition {
            incarnation,
            next_frame,
        })
        .unwrap()
            > 0
    });
    assert!(tap.log_end().total_bytes < end.total_bytes);
}

#[test]
fn step_of_the_clock_is_a_record() {
    let rig = Rig::new(&[1 << 20]);
    let tap = rig.start();
    settle(&tap);
    rig.time.wall_us.fetch_add(300_000_000, Ordering::SeqCst);
    let step =
        |body: &RecordBody| matches!(body, RecordBody::ClockStep { us } if *us > 290_000_000);
    eventually("a clock step", || rig.replay(&tap).bodies().any(step));
    device(&tap, 0).write(&[1; 4096], 0, WAITS).unwrap();
    rig.check(&tap);
    assert!(
        tap.status()
            .notices
            .iter()
            .any(|notice| notice.contains("clock"))
    );
}

#[test]
fn configuration_that_cannot_be_served_is_refused() {
    let rig = Rig::new(&[1 << 20, 1 << 20]);
    let mut config = rig.config();
    config.volumes[1].name = config.volumes[0].name.clone();
    assert!(matches!(
        Tap::start_with(config, rig.parts()),
        Err(TapError::State(_))
    ));
    let mut config = rig.config();
    config.volumes[0].backing = PathBuf::from("/nowhere/at/all");
    assert!(matches!(Tap::start(config), Err(TapError::Io { .. })));
}
