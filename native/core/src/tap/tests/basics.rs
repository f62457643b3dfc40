//! What a tap does when nothing goes wrong, and at clean and unclean restarts.

use super::rig::{FUA, NOWAIT, Rig, WAITS, device, settle};
use crate::constants::BLOCK_SIZE;
use crate::device::DeviceError;
use crate::format::record::{Cause, RecordBody};
use crate::storage::Loss;
use crate::types::{Seq, TimeUs};

#[test]
fn first_copy_then_writes_are_in_history() {
    let rig = Rig::new(&[3 << 20, 5000]);
    rig.disk.place("volume0", &vec![7; 3 << 20]);
    let tap = rig.start();
    rig.check(&tap);
    let device0 = device(&tap, 0);
    let device1 = device(&tap, 1);
    device0.write(&[1; 4096], 8192, WAITS).unwrap();
    device0.write(&[2; 100], 4090, WAITS).unwrap();
    device1.write(&[3; 1000], 4000, WAITS).unwrap();
    device0.trim(100_000, 200_000, WAITS).unwrap();
    device0.zero(1, 3, WAITS).unwrap();
    device0.write(&vec![9; 2_500_000], 300_001, WAITS).unwrap();
    let mut read = [0; 100];
    device0.read(&mut read, 4090, WAITS).unwrap();
    assert_eq!(read, [2; 100]);
    device0.flush(WAITS).unwrap();
    let replay = rig.check(&tap);
    let first: Vec<&RecordBody> = replay.bodies().take(3).collect();
    assert!(matches!(
        first[0],
        RecordBody::Volume {
            size: 3_145_728,
            ..
        }
    ));
    assert!(matches!(first[1], RecordBody::Volume { size: 5000, .. }));
    assert!(matches!(
        first[2],
        RecordBody::SpanBegin {
            cause: Cause::FirstCopy
        }
    ));
    assert_eq!(
        replay
            .bodies()
            .filter(|body| **body == RecordBody::Barrier)
            .count(),
        1
    );
    tap.stop().unwrap();
    assert_eq!(device0.write(&[1], 0, WAITS), Err(DeviceError::Shutdown));
}

#[test]
fn flushed_records_are_in_the_spool_and_durable_on_the_backing() {
    let mut rig = Rig::new(&[1 << 20]);
    let tap = rig.start();
    settle(&tap);
    let volume = device(&tap, 0);
    for round in 0..20u8 {
        volume
            .write(&[round + 1; 4096], u64::from(round) * 4096, WAITS)
            .unwrap();
        if round % 2 == 0 {
            volume.flush(WAITS).unwrap();
        } else {
            volume.write(&[round; 512], 500_000, FUA).unwrap();
        }
        let replay = rig.replay(&tap);
        assert_eq!(replay.newest(0, 1 << 20), rig.content(0), "round {round}");
    }
    drop(tap);
    rig.crash(Loss::Everything, Loss::Everything, Loss::Everything);
    assert_eq!(rig.content(0)[19 * 4096], 20);
}

#[test]
fn clean_restart_copies_nothing_and_goes_on_above() {
    let rig = Rig::new(&[4 << 20]);
    let tap = rig.start();
    settle(&tap);
    device(&tap, 0).write(&[5; 4096], 0, WAITS).unwrap();
    tap.stop().unwrap();
    let before = tap.status();
    drop(tap);
    let tap = rig.start();
    let status = tap.status();
    assert!(!status.in_span && status.dirty_regions == 0, "{status:?}");
    assert!(status.last_seq > before.last_seq && status.last_seq.0 < before.last_seq.0 + 10);
    device(&tap, 0).write(&[6; 4096], 0, WAITS).unwrap();
    device(&tap, 0).flush(WAITS).unwrap();
    let replay = rig.check(&tap);
    assert_eq!(replay.incarnations.len(), 2);
    let spans = replay
        .bodies()
        .filter(|body| matches!(body, RecordBody::SpanBegin { .. }));
    assert_eq!(spans.count(), 1);
}

#[test]
fn unclean_restart_copies_what_was_dirty_and_repeats_no_number() {
    let mut rig = Rig::new(&[4 << 20]);
    let tap = rig.start();
    settle(&tap);
    let mut last = (Seq(0), TimeUs(0));
    let mut tap = Some(tap);
    for round in 0..5u8 {
        let running = tap.take().unwrap();
        device(&running, 0)
            .write(&[round + 1; 4096], 4096, WAITS)
            .unwrap();
        let status = running.status();
        assert!(status.last_seq > last.0 && status.last_time > last.1);
        last = (status.last_seq, status.last_time);
        drop(running);
        rig.crash(
            Loss::Random(u64::from(round)),
            Loss::Everything,
            Loss::Nothing,
        );
        let next = rig.start();
        let replay = rig.check(&next);
        let cause = RecordBody::SpanBegin {
            cause: Cause::UncleanStop,
        };
        assert!(replay.bodies().any(|body| *body == cause) || round == 0);
        tap = Some(next);
    }
}

#[test]
fn wall_clock_that_went_back_repeats_no_time() {
    for same_boot in [true, false] {
        for clean in [true, false] {
            let rig = Rig::new(&[1 << 20]);
            let tap = rig.start();
            settle(&tap);
            device(&tap, 0).write(&[1; 4096], 0, WAITS).unwrap();
            let before = tap.status().last_time;
            if clean {
                tap.stop().unwrap();
            }
            drop(tap);
            let wall = &rig.time.wall_us;
            wall.fetch_sub(3_600_000_000, std::sync::atomic::Ordering::SeqCst);
            if !same_boot {
                rig.time.boot.store(2, std::sync::atomic::Ordering::SeqCst);
            }
            let tap = rig.start();
            device(&tap, 0).write(&[2; 4096], 0, WAITS).unwrap();
            let after = tap.status().last_time;
            assert!(after > before);
            assert!(after.0 < before.0 + 120_000_000, "and stays near");
            rig.check(&tap);
        }
    }
}

#[test]
fn identical_and_zero_blocks_store_nothing() {
    let rig = Rig::new(&[1 << 20]);
    let tap = rig.start();
    settle(&tap);
    let volume = device(&tap, 0);
    let mut data = vec![3; 4 * BLOCK_SIZE];
    data[BLOCK_SIZE..2 * BLOCK_SIZE].fill(0);
    volume.write(&data, 0, WAITS).unwrap();
    volume.flush(WAITS).unwrap();
    let before = tap.status().frame_bytes;
    for _ in 0..10 {
        volume.write(&data, 0, WAITS).unwrap();
        volume.flush(WAITS).unwrap();
    }
    let replay = rig.check(&tap);
    assert_eq!(replay.same, 30);
    assert!(tap.status().frame_bytes - before < 10 * 1024);
}

#[test]
fn nowait_does_nothing_where_it_would_wait() {
    let rig = Rig::new(&[4 << 20]);
    let tap = rig.start();
    settle(&tap);
    let volume = device(&tap, 0);
    volume.write(&[1; 8192], 0, WAITS).unwrap();
    assert_eq!(volume.flush(NOWAIT), Err(DeviceError::WouldBlock));
    volume.flush(WAITS).unwrap();
    assert_eq!(volume.flush(NOWAIT), Ok(()));
    volume.write(&[2; 4096], 4096, NOWAIT).unwrap();
    let before = (tap.status().last_seq, rig.content(0));
    let both = crate::device::RequestFlags {
        fua: true,
        ..NOWAIT
    };
    assert_eq!(
        volume.write(&[3; 4096], 0, both),
        Err(DeviceError::WouldBlock)
    );
    assert_eq!(volume.trim(0, 4096, NOWAIT), Err(DeviceError::WouldBlock));
    assert_eq!(
        volume.write(&vec![3; 2 << 20], 0, NOWAIT),
        Err(DeviceError::WouldBlock)
    );
    assert_eq!(before, (tap.status().last_seq, rig.content(0)));
    tap.stop().unwrap();
    drop(tap);
    // After a clean stop every region is clean: its bit needs a sync first.
    let tap = rig.start();
    let volume = device(&tap, 0);
    assert_eq!(
        volume.write(&[4; 4096], 0, NOWAIT),
        Err(DeviceError::WouldBlock)
    );
    volume.write(&[4; 4096], 0, WAITS).unwrap();
    volume.write(&[5; 4096], 0, NOWAIT).unwrap();
    rig.check(&tap);
}

#[test]
fn out_of_range_is_refused_and_empty_requests_are_nothing() {
    let rig = Rig::new(&[10_000]);
    let tap = rig.start();
    let volume = device(&tap, 0);
    assert_eq!(
        volume.write(&[1; 2], 9999, WAITS),
        Err(DeviceError::OutOfRange)
    );
    assert_eq!(
        volume.trim(u64::MAX, 2, WAITS),
        Err(DeviceError::OutOfRange)
    );
    assert_eq!(
        volume.read(&mut [0; 1], 10_000, WAITS),
        Err(DeviceError::OutOfRange)
    );
    volume.write(&[], 10_000, WAITS).unwrap();
    volume.zero(10_000, 0, WAITS).unwrap();
    volume.write(&[1; 10_000], 0, WAITS).unwrap();
    volume.trim(4096, 10_000 - 4096, WAITS).unwrap();
    rig.check(&tap);
}
