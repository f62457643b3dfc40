//! The life of a log without accidents: append, seal, read, reopen, continue, trim.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::constants::FRAME_BYTES_MAX;
use crate::format::record::{Cause, RecordBody};
use crate::log::names::{self, SegmentState};
use crate::log::testing::FrameMaker;
use crate::log::verify;
use crate::storage::{DiskDirectory, MemoryDirectory};
use crate::types::{FrameNo, Seq, TimeUs, VolumeIndex};

pub(super) fn memory() -> (MemoryDirectory, Arc<dyn Directory>) {
    let memory = MemoryDirectory::new();
    (memory.clone(), Arc::new(memory))
}

fn segments(directory: &Arc<dyn Directory>, sealed: bool) -> usize {
    let names = directory.list().unwrap();
    let states = names.iter().filter_map(|name| names::parse(name));
    states
        .filter(|(_, state)| matches!(state, SegmentState::Sealed { .. }) == sealed)
        .count()
}

#[test]
fn frames_come_back_across_segments_incarnations_and_reopening() {
    let temporary = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Directory> = Arc::new(DiskDirectory::open(temporary.path()).unwrap());
    for (directory, background) in [(memory().1, false), (memory().1, true), (disk, true)] {
        let options = LogOptions {
            background,
            ..INLINE
        };
        let mut maker = FrameMaker::new();
        let mut written = Vec::new();
        for round in 0..3u64 {
            let (mut writer, report) = open_as(&directory, options).unwrap();
            assert_eq!(report, RecoveryReport::default());
            assert_eq!(writer.end().last_seq, Seq(maker.next_seq - 1));
            if round == 2 {
                maker = maker.next_incarnation();
            }
            writer.begin(&maker.header).unwrap();
            for blocks in 0..8 {
                let frames = [maker.data(blocks % 3), maker.bookmark("b")];
                let end = writer.append(&frames.concat(), blocks % 2 == 0).unwrap();
                written.extend(frames);
                assert_eq!(end.last_frame, Some(FrameNo(maker.next_frame - 1)));
                assert_eq!(end.last_digest, maker.prev);
                assert_eq!(end.last_seq, Seq(maker.next_seq - 1));
                assert_eq!(end.last_time, TimeUs(maker.next_time - 10));
                assert_eq!(read_all(&directory, &end), written);
            }
            writer.sync_handle().unwrap().sync().unwrap();
            if round == 1 {
                writer.seal().unwrap();
                assert_eq!(segments(&directory, false), 0);
                assert_eq!(read_all(&directory, &writer.end()), written);
            }
            let total: u64 = directory
                .list()
                .unwrap()
                .iter()
                .filter(|name| names::parse(name).is_some())
                .map(|name| directory.open(name, false).unwrap().len().unwrap())
                .sum();
            assert_eq!(writer.end().total_bytes, total);
        }
        assert!(segments(&directory, true) >= 4);
        let (writer, _) = open_as(&directory, options).unwrap();
        assert_eq!(read_all(&directory, &writer.end()), written);
        assert_eq!(verify(&directory, crate::log::testing::GROUP).unwrap(), []);
        let manifest = writer.manifest();
        assert_eq!(manifest.events.len(), 24);
        assert_eq!(manifest.incarnations.len(), 2);
        assert!(manifest.segments.iter().all(|entry| !entry.indexed));
    }
}

#[test]
fn a_second_writer_is_refused() {
    let (_, directory) = memory();
    let (writer, _) = open(&directory);
    assert!(matches!(open_as(&directory, INLINE), Err(LogError::Locked)));
    drop(writer);
    open(&directory);
}

#[test]
fn events_and_volumes_reach_the_manifest() {
    let (_, directory) = memory();
    let (mut writer, _) = open(&directory);
    let mut maker = FrameMaker::new();
    let volume = |size| RecordBody::Volume {
        volume: VolumeIndex(0),
        size,
        name: "data".into(),
    };
    let gap = RecordBody::Gap {
        cause: Cause::SpoolFull,
        first_seq: Seq(4),
        end_seq: Seq(9),
        first_time: TimeUs(1_000_020),
        bytes: 4096,
    };
    writer.begin(&maker.header).unwrap();
    writer
        .append(
            &maker.frame(&[
                volume(8192),
                RecordBody::SpanBegin {
                    cause: Cause::FirstCopy,
                },
                RecordBody::Barrier,
                RecordBody::SpanEnd,
                gap,
                RecordBody::ClockStep { us: -7 },
                volume(8192),
                volume(16384),
            ]),
            false,
        )
        .unwrap();
    let open_manifest = writer.manifest();
    writer.seal().unwrap();
    let sealed_manifest = writer.manifest();
    assert_eq!(open_manifest.events, sealed_manifest.events);
    let kinds: Vec<_> = sealed_manifest
        .events
        .iter()
        .map(|event| event.kind.as_str())
        .collect();
    assert_eq!(
        kinds,
        [
            "volume",
            "span_begin",
            "span_end",
            "gap",
            "clock_step",
            "volume"
        ]
    );
    assert_eq!(
        sealed_manifest.events[1].cause,
        Some(Cause::FirstCopy as u8)
    );
    assert_eq!(sealed_manifest.events[3].gap_first_time_us, Some(1_000_020));
    assert_eq!(sealed_manifest.events[4].label, "-7");
    assert_eq!(
        (
            sealed_manifest.events[5].volume,
            sealed_manifest.events[5].seq
        ),
        (Some(0), 8)
    );
    assert_eq!(sealed_manifest.volumes.len(), 1);
    assert_eq!(sealed_manifest.volumes[0].size, 16384);
    drop(writer);
    assert_eq!(open(&directory).0.manifest(), sealed_manifest);
}

#[test]
fn segments_are_sealed_by_size_count_and_age() {
    // Six frames of one record; a frame with one block has 4386 to 4390 bytes.
    let cases = [
        (
            LogOptions {
                segment_bytes_max: 9100,
                ..INLINE
            },
            2,
        ),
        (
            LogOptions {
                segment_records_max: 3,
                ..INLINE
            },
            1,
        ),
        (
            LogOptions {
                segment_age: Duration::ZERO,
                ..INLINE
            },
            5,
        ),
    ];
    for (options, sealed) in cases {
        let (_, directory) = memory();
        let (mut writer, _) = open_as(&directory, options).unwrap();
        let mut maker = FrameMaker::new();
        writer.begin(&maker.header).unwrap();
        for _ in 0..6 {
            writer.append(&maker.data(1), false).unwrap();
        }
        assert_eq!(segments(&directory, true), sealed, "{options:?}");
        writer.seal_if_due().unwrap();
        let due = usize::from(options.segment_age.is_zero());
        assert_eq!(segments(&directory, true), sealed + due);
    }
}

#[test]
fn sealed_segments_are_announced_and_runs_noted() {
    for background in [false, true] {
        let (_, directory) = memory();
        let (mut writer, _) = open_as(
            &directory,
            LogOptions {
                background,
                ..INLINE
            },
        )
        .unwrap();
        let sealed = writer.sealed();
        let mut maker = FrameMaker::new();
        writer.begin(&maker.header).unwrap();
        for _ in 0..12 {
            writer.append(&maker.data(1), false).unwrap();
        }
        writer.seal().unwrap();
        let entries: Vec<_> = sealed.try_iter().collect();
        assert_eq!(entries, writer.manifest().segments);
        assert!(entries.len() > 2);
        writer
            .publish_run(entries[1].ordinal, FrameNo(entries[1].first_frame))
            .unwrap();
        writer.publish_run(99, FrameNo(0)).unwrap();
        writer.seal().unwrap();
        drop(writer);
        let indexed: Vec<bool> = open(&directory)
            .0
            .manifest()
            .segments
            .iter()
            .map(|entry| entry.indexed)
            .collect();
        assert_eq!(indexed.iter().filter(|indexed| **indexed).count(), 1);
        assert!(indexed[1]);
    }
}

/// A journal once waited for its indexer for ever, because somebody still held a sync handle.
#[test]
fn announcements_end_with_the_writer_though_a_sync_handle_lives() {
    let (_, directory) = memory();
    let (mut writer, _) = open(&directory);
    let sealed = writer.sealed();
    let mut maker = FrameMaker::new();
    writer.begin(&maker.header).unwrap();
    writer.append(&maker.data(1), false).unwrap();
    let handle = writer.sync_handle().unwrap();
    drop(writer);
    assert_eq!(
        sealed.recv_timeout(Duration::from_secs(5)),
        Err(std::sync::mpsc::RecvTimeoutError::Disconnected)
    );
    drop(handle);
}

#[test]
fn trim_gives_back_what_lies_before_a_position() {
    for background in [false, true] {
        let (_, directory) = memory();
        let options = LogOptions {
            background,
            ..INLINE
        };
        let (mut writer, _) = open_as(&directory, options).unwrap();
        let mut maker = FrameMaker::new();
        writer.begin(&maker.header).unwrap();
        let mut written = Vec::new();
        for _ in 0..20 {
            written.push(maker.data(1));
            writer.append(written.last().unwrap(), false).unwrap();
        }
        let mut position = LogPosition {
            incarnation: maker.header.incarnation,
            next_frame: FrameNo(7),
        };
        let first = writer.manifest().segments[0].clone();
        directory.create(&names::run_name(&first)).unwrap();
        let before = writer.end().total_bytes;
        let freed = writer.trim(&position).unwrap();
        assert_eq!(writer.end().total_bytes, before - freed);
        writer.seal().unwrap();
        assert!(directory.open(&names::run_name(&first), false).is_err());
        let kept = read_all(&directory, &writer.end());
        assert!(kept.len() < 20 && kept.len() >= 13 && written.ends_with(&kept));
        assert_eq!(writer.manifest().horizon_seq, (20 - kept.len() + 1) as u64);

        position.next_frame = FrameNo(20);
        writer.trim(&position).unwrap();
        let unknown = LogPosition {
            incarnation: crate::types::IncarnationId([99; 16]),
            ..position
        };
        assert_eq!(writer.trim(&unknown).unwrap(), 0);
        writer.seal().unwrap();
        assert_eq!(segments(&directory, true), 1, "the newest stays");
        let end = writer.end();
        drop(writer);
        let (mut writer, report) = open_as(&directory, options).unwrap();
        assert_eq!(report, RecoveryReport::default());
        assert_eq!(writer.end(), end);
        writer.append(&maker.data(1), false).unwrap();
    }
}

#[test]
fn a_reader_follows_a_growing_log() {
    let (_, directory) = memory();
    let (mut writer, _) = open(&directory);
    let mut maker = FrameMaker::new();
    let mut reader = LogReader::open(Arc::clone(&directory), crate::log::testing::GROUP).unwrap();
    assert!(reader.next_batch(&writer.end(), 1 << 20).unwrap().is_none());
    let mut stale = writer.end();
    let (mut written, mut seen) = (Vec::new(), Vec::new());
    for round in 0..40 {
        if round % 15 == 0 {
            if round > 0 {
                maker = maker.next_incarnation();
            }
            writer.begin(&maker.header).unwrap();
        }
        written.extend(maker.data(round % 3));
        let end = writer.append(
            &written[written.len() - frame_len(&written, &maker)..],
            true,
        );
        let end = end.unwrap();
        // What was published before the last append is all that may be seen.
        let before = seen.len();
        while let Some(batch) = reader.next_batch(&stale, 5000).unwrap() {
            let starts = batch.first_frame.0 == 0;
            assert_eq!(batch.header.is_some(), starts, "one header an incarnation");
            if let Some(header) = batch.header {
                assert_eq!(header.first_frame, batch.first_frame);
            }
            seen.extend(batch.frames);
        }
        assert!(round == 0 || seen.len() > before);
        assert!(seen.len() < written.len() && written.starts_with(&seen));
        if round % 7 == 0 {
            writer.seal().unwrap();
            stale = writer.end();
        } else {
            stale = end;
        }
    }
    while let Some(batch) = reader.next_batch(&writer.end(), FRAME_BYTES_MAX).unwrap() {
        seen.extend(batch.frames);
    }
    assert_eq!(seen, written);
}

/// Length of the last frame that was made.
fn frame_len(written: &[u8], maker: &FrameMaker) -> usize {
    let frames = split(written);
    let last = frames.last().unwrap();
    assert!(maker.next_frame > 0);
    last.len()
}

#[test]
fn seek_finds_every_frame_and_skips_what_is_trimmed() {
    let (_, directory) = memory();
    let (mut writer, _) = open(&directory);
    let first = FrameMaker::new();
    let mut maker = first.clone();
    writer.begin(&maker.header).unwrap();
    let mut written = Vec::new();
    for round in 0..30 {
        if round == 17 {
            maker = maker.next_incarnation();
            writer.begin(&maker.header).unwrap();
        }
        written.push(maker.data(1));
        writer.append(written.last().unwrap(), false).unwrap();
    }
    let end = writer.end();
    for index in 0..=30u32 {
        let incarnation = if index < 17 {
            first.header.incarnation
        } else {
            maker.header.incarnation
        };
        let next_frame = FrameNo(if index < 17 { index } else { index - 17 });
        let position = LogPosition {
            incarnation,
            next_frame,
        };
        let seen = read_from(&directory, &end, Some(&position)).unwrap();
        assert_eq!(seen, written[index as usize..], "frame {index}");
    }
    // Behind the end of a closed incarnation: the next one, announced.
    let behind = LogPosition {
        incarnation: first.header.incarnation,
        next_frame: FrameNo(500),
    };
    assert_eq!(
        read_from(&directory, &end, Some(&behind)).unwrap(),
        written[17..]
    );
    let unknown = LogPosition {
        incarnation: crate::types::IncarnationId([77; 16]),
        next_frame: FrameNo(3),
    };
    assert_eq!(
        read_from(&directory, &end, Some(&unknown)).unwrap(),
        written
    );

    let at = LogPosition {
        incarnation: first.header.incarnation,
        next_frame: FrameNo(9),
    };
    writer.trim(&at).unwrap();
    let gone = LogPosition {
        next_frame: FrameNo(1),
        ..at
    };
    let mut reader = LogReader::open(Arc::clone(&directory), crate::log::testing::GROUP).unwrap();
    reader.seek(Some(&gone)).unwrap();
    let batch = reader.next_batch(&end, 1).unwrap().unwrap();
    assert_eq!(batch.frame_count, 1);
    assert!(batch.first_frame > FrameNo(1) && batch.first_frame <= FrameNo(9));
    assert_eq!(batch.header.unwrap().first_frame, batch.first_frame);
}

#[test]
fn a_reader_keeps_its_segment_through_seal_and_trim() {
    let (_, directory) = memory();
    let (mut writer, _) = open(&directory);
    let mut maker = FrameMaker::new();
    writer.begin(&maker.header).unwrap();
    let mut written = Vec::new();
    for _ in 0..3 {
        written.push(maker.data(1));
        writer.append(written.last().unwrap(), false).unwrap();
    }
    let mut reader = LogReader::open(Arc::clone(&directory), crate::log::testing::GROUP).unwrap();
    reader.next_batch(&writer.end(), 1).unwrap().unwrap();
    for _ in 0..20 {
        written.push(maker.data(1));
        writer.append(written.last().unwrap(), false).unwrap();
    }
    let position = LogPosition {
        incarnation: maker.header.incarnation,
        next_frame: FrameNo(15),
    };
    assert!(writer.trim(&position).unwrap() > 0);
    let end = writer.end();
    let batch = reader.next_batch(&end, 1).unwrap().unwrap();
    assert_eq!(batch.frames, written[1]);
    assert!(batch.header.is_none());
    for frame in [2, 3] {
        assert_eq!(
            reader.next_batch(&end, 1).unwrap().unwrap().frames,
            written[frame]
        );
    }
    let behind_hole = reader.next_batch(&end, 1).unwrap().unwrap();
    assert!(behind_hole.header.is_some() && behind_hole.first_frame > FrameNo(4));
}
