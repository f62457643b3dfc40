//! A full disk loses nothing, poisons nothing, and is left by trimming or by room that comes back.

use std::sync::Arc;

use super::*;
use crate::log::names::{self, SegmentState};
use crate::log::testing::FrameMaker;
use crate::log::{LogPosition, verify};
use crate::storage::{Fault, FaultyDirectory, Loss, MemoryDirectory};
use crate::types::FrameNo;

/// Repeats what found no space. `room` is called before each repetition.
fn insist<T>(mut action: impl FnMut() -> Result<T, LogError>, mut room: impl FnMut()) -> (T, u32) {
    for refused in 0..10 {
        match action() {
            Ok(value) => return (value, refused),
            Err(LogError::NoSpace) => room(),
            Err(error) => panic!("{error}"),
        }
    }
    panic!("no space ten times");
}

/// A script whose every step is repeated when there is no space. Returns frames and refusals.
fn run(directory: &Arc<dyn Directory>, mut room: impl FnMut()) -> (Vec<Vec<u8>>, u32) {
    let mut refused = 0;
    let mut maker = FrameMaker::new();
    let mut written = Vec::new();
    let ((mut writer, _), count) = insist(|| open_as(directory, INLINE), &mut room);
    refused += count;
    for round in 0..24 {
        if round == 14 {
            maker = maker.next_incarnation();
        }
        refused += insist(|| writer.begin(&maker.header), &mut room).1;
        let frame = maker.data(round % 3);
        let (end, count) = insist(|| writer.append(&frame, false), &mut room);
        refused += count;
        written.push(frame);
        if count > 0 {
            assert_eq!(read_all(directory, &end), written);
        }
        if round % 5 == 0 {
            insist(|| writer.sync_handle().unwrap().sync(), &mut room);
        }
        if round == 9 {
            refused += insist(|| writer.seal(), &mut room).1;
        }
    }
    refused += insist(|| writer.seal(), &mut room).1;
    assert_eq!(read_all(directory, &writer.end()), written);
    (written, refused)
}

#[test]
fn no_space_at_every_operation_is_survived_without_reopening() {
    let mut refusals = 0;
    let mut nth = 1;
    loop {
        let memory = MemoryDirectory::new();
        let faulty = Arc::new(FaultyDirectory::new(Arc::new(memory.clone())));
        faulty.fail_change(nth, Fault::NoSpace);
        let directory: Arc<dyn Directory> = Arc::clone(&faulty) as _;
        let (written, refused) = run(&directory, || {});
        refusals += refused;
        assert_eq!(verify(&directory, GROUP).unwrap(), [], "no space at {nth}");
        let after: Arc<dyn Directory> = Arc::new(memory.crash(Loss::Everything));
        let (writer, report) = open(&after);
        assert_eq!(report.damage, Vec::<String>::new(), "no space at {nth}");
        assert_eq!(
            read_all(&after, &writer.end()),
            written,
            "no space at {nth}"
        );
        if faulty.changes() < nth {
            assert!(refusals > 20, "only {refusals} refusals were seen");
            return;
        }
        nth += 1;
    }
}

#[test]
fn a_disk_of_any_size_that_grows_later_ends_with_everything() {
    for capacity in (0..60_000).step_by(977) {
        let memory = MemoryDirectory::new();
        memory.set_capacity(Some(capacity));
        let directory: Arc<dyn Directory> = Arc::new(memory.clone());
        let (written, refused) = run(&directory, || memory.set_capacity(None));
        assert!(refused > 0, "capacity {capacity}");
        let after: Arc<dyn Directory> = Arc::new(memory.crash(Loss::Everything));
        let (writer, _) = open(&after);
        assert_eq!(
            read_all(&after, &writer.end()),
            written,
            "capacity {capacity}"
        );
    }
}

/// Appends until the disk is full; returns what was taken.
fn fill(writer: &mut LogWriter, maker: &mut FrameMaker) -> Vec<Vec<u8>> {
    let mut written = Vec::new();
    loop {
        let before = maker.clone();
        let frame = maker.data(1);
        match writer.append(&frame, false) {
            Ok(_) => written.push(frame),
            Err(LogError::NoSpace) => {
                *maker = before;
                return written;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_full_log_is_trimmed_and_used_again() {
    for background in [false, true] {
        for capacity in (60_000..66_000).step_by(251) {
            let memory = MemoryDirectory::new();
            memory.set_capacity(Some(capacity));
            let directory: Arc<dyn Directory> = Arc::new(memory.clone());
            let options = LogOptions {
                background,
                ..INLINE
            };
            let (mut writer, _) = open_as(&directory, options).unwrap();
            let mut maker = FrameMaker::new();
            writer.begin(&maker.header).unwrap();
            let mut written = fill(&mut writer, &mut maker);
            let position = LogPosition {
                incarnation: maker.header.incarnation,
                next_frame: FrameNo(9),
            };
            // Also when nothing at all is left for the manifest that drops the segments.
            let free = usize::try_from(memory.free_bytes().unwrap()).unwrap();
            memory.place("filler", &vec![0; free]);
            if writer.trim(&position).unwrap() == 0 {
                // Full before the second segment was sealed into the manifest: nothing to trim.
                memory.remove("filler").unwrap();
                continue;
            }
            // The thread may still be at it; what it leaves undone, `seal` does.
            match writer.seal() {
                Ok(()) | Err(LogError::NoSpace) => {}
                Err(error) => panic!("{error}"),
            }
            let more = fill(&mut writer, &mut maker);
            assert!(
                more.len() >= 2,
                "capacity {capacity}: room for {}",
                more.len()
            );
            written.extend(more);
            let kept = read_all(&directory, &writer.end());
            assert!(kept.len() < written.len() && written.ends_with(&kept));
            memory.set_capacity(None);
            writer.seal().unwrap();
            drop(writer);
            let after: Arc<dyn Directory> = Arc::new(memory.crash(Loss::Everything));
            let (writer, report) = open(&after);
            assert_eq!(report.damage, Vec::<String>::new());
            assert_eq!(read_all(&after, &writer.end()), kept);
            let states = after.list().unwrap();
            let mut states = states.iter().filter_map(|name| names::parse(name));
            assert!(!states.any(|(_, state)| matches!(state, SegmentState::Gone { .. })));
        }
    }
}

#[test]
fn a_log_that_was_full_at_a_crash_opens_on_the_full_disk() {
    let memory = MemoryDirectory::new();
    memory.set_capacity(Some(70_000));
    let directory: Arc<dyn Directory> = Arc::new(memory.clone());
    let (mut writer, _) = open(&directory);
    let mut maker = FrameMaker::new();
    writer.begin(&maker.header).unwrap();
    let written = fill(&mut writer, &mut maker);
    writer.sync_handle().unwrap().sync().unwrap();
    let after = memory.crash(Loss::Everything);
    let free = usize::try_from(after.free_bytes().unwrap()).unwrap();
    after.place("filler", &vec![0; free]);
    let directory: Arc<dyn Directory> = Arc::new(after.clone());
    let (mut writer, report) = open(&directory);
    assert_eq!(report.damage, Vec::<String>::new());
    assert_eq!(read_all(&directory, &writer.end()), written);
    assert!(matches!(
        writer.append(&maker.clone().data(1), false),
        Err(LogError::NoSpace)
    ));
    let position = LogPosition {
        incarnation: maker.header.incarnation,
        next_frame: FrameNo(9),
    };
    assert!(writer.trim(&position).unwrap() > 0);
    writer.append(&maker.data(1), false).unwrap();
}
