//! The machine or the process stops at every operation of a script, and loses what POSIX allows.
//! What recovery finds must be a prefix of what was appended, with everything that was synced.

use std::sync::Arc;

use super::*;
use crate::log::names::SYNCED;
use crate::log::synced::Synced;
use crate::log::testing::FrameMaker;
use crate::log::{LogPosition, verify};
use crate::storage::{Fault, FaultyDirectory, Loss, MemoryDirectory};
use crate::types::FrameNo;

/// What a script has done so far.
#[derive(Debug, Default)]
struct Done {
    /// Frames handed to `append`, in order; the last call may have failed.
    attempted: Vec<Vec<u8>>,
    /// Frames of calls that returned.
    appended: usize,
    /// Frames that `sync` has confirmed.
    synced: usize,
    /// Frames that may have been trimmed.
    released: usize,
}

/// Who seals what is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sealer {
    /// The appending call.
    Inline,
    /// The log's own thread: operations come in any order.
    Thread,
    /// Nobody until `seal`: several open segments, some of them complete, at every crash.
    Nobody,
}

struct Script {
    directory: Arc<dyn Directory>,
    sealer: Sealer,
    maker: FrameMaker,
    done: Done,
}

impl Script {
    fn append(&mut self, writer: &mut LogWriter, frames: Vec<Vec<u8>>) -> Result<(), LogError> {
        let bytes = frames.concat();
        self.done.attempted.extend(frames);
        writer.append(&bytes, true)?;
        self.done.appended = self.done.attempted.len();
        Ok(())
    }

    fn sync(&mut self, writer: &LogWriter) -> Result<(), LogError> {
        let handle = writer.sync_handle()?;
        let covered = self.done.appended;
        handle.sync()?;
        self.done.synced = self.done.synced.max(covered);
        Ok(())
    }

    fn open(&self) -> Result<(LogWriter, RecoveryReport), LogError> {
        let background = LogOptions {
            background: true,
            ..INLINE
        };
        let directory = Arc::clone(&self.directory);
        match self.sealer {
            Sealer::Inline => LogWriter::open_with(directory, GROUP, INLINE),
            Sealer::Thread => LogWriter::open_with(directory, GROUP, background),
            Sealer::Nobody => LogWriter::open_deferred(directory, GROUP, background),
        }
    }

    /// Every kind of change: roll-over, group commit that lags, seal, new incarnations with and
    /// without a parent, trim, reopening in the middle of an incarnation.
    fn run(&mut self) -> Result<(), LogError> {
        let (mut writer, _) = self.open()?;
        writer.begin(&self.maker.header)?;
        for blocks in [1, 0, 2] {
            let frames = vec![self.maker.data(blocks), self.maker.bookmark("x")];
            self.append(&mut writer, frames)?;
        }
        self.sync(&writer)?;
        let lagging = writer.sync_handle()?;
        let covered = self.done.appended;
        for _ in 0..7 {
            let frames = vec![self.maker.data(1)];
            self.append(&mut writer, frames)?;
        }
        lagging.sync()?;
        self.done.synced = covered;
        let first = self.maker.header.incarnation;
        self.maker = self.maker.next_incarnation();
        writer.begin(&self.maker.header)?;
        for _ in 0..3 {
            let frames = vec![self.maker.data(1), self.maker.data(0)];
            self.append(&mut writer, frames)?;
        }
        self.sync(&writer)?;
        self.done.released = 9;
        writer.trim(&LogPosition {
            incarnation: first,
            next_frame: FrameNo(9),
        })?;
        writer.seal()?;
        self.done.synced = self.done.appended;
        let frames = vec![self.maker.data(2)];
        self.append(&mut writer, frames)?;
        drop(writer);

        let (mut writer, _) = self.open()?;
        self.done.synced = self.done.appended;
        for _ in 0..6 {
            let frames = vec![self.maker.data(1)];
            self.append(&mut writer, frames)?;
        }
        // An incarnation whose header does not prove that nothing is missing before it.
        self.maker = self.maker.next_incarnation();
        self.maker.header.parent = None;
        writer.begin(&self.maker.header)?;
        for _ in 0..6 {
            let frames = vec![self.maker.data(1)];
            self.append(&mut writer, frames)?;
        }
        self.sync(&writer)?;
        let frames = vec![self.maker.data(1)];
        self.append(&mut writer, frames)
    }
}

/// Runs the script with a fault at the `nth` change; whether the fault came.
fn run(nth: u64, fault: Fault, sealer: Sealer) -> (MemoryDirectory, Done, bool) {
    let memory = MemoryDirectory::new();
    let faulty = Arc::new(FaultyDirectory::new(Arc::new(memory.clone())));
    faulty.fail_change(nth, fault);
    let directory: Arc<dyn Directory> = Arc::clone(&faulty) as _;
    let mut script = Script {
        directory,
        sealer,
        maker: FrameMaker::new(),
        done: Done::default(),
    };
    let result = script.run();
    let came = faulty.changes() >= nth;
    assert!(came || result.is_ok(), "{result:?} without a fault");
    (memory, script.done, came)
}

/// Recovers and checks what is found. `survived`: frames that must be there.
fn check(directory: &Arc<dyn Directory>, done: &Done, survived: usize, context: &str) {
    let (mut writer, report) = open(directory);
    assert_eq!(report.damage, Vec::<String>::new(), "{context}");
    let end = writer.end();
    let found = read_all(directory, &end);
    let count = found.len();
    let all = &done.attempted;
    let place = all
        .windows(count.max(1))
        .position(|window| count > 0 && window == found);
    if let Some(start) = place {
        assert!(start <= done.released, "{context}: begins at {start}");
        assert!(
            start + count >= survived,
            "{context}: {} of {survived}",
            start + count
        );
        assert_eq!(
            end.last_frame.map(|last| last.0),
            Some(frame_no(&found[count - 1]))
        );
    } else {
        let numbers: Vec<_> = found
            .iter()
            .map(|frame| all.iter().position(|known| known == frame))
            .collect();
        assert_eq!(
            count,
            0,
            "{context}: {numbers:?} of {}: what is found is no part of what was appended",
            all.len()
        );
        assert_eq!(survived, 0, "{context}");
    }
    assert_eq!(verify(directory, GROUP).unwrap(), [], "{context}");

    // The log goes on: with a new incarnation, as a spool does.
    let mut maker = FrameMaker::new();
    maker.next_seq = 10_000;
    maker.next_time = 1 << 40;
    maker.header.incarnation.0 = [200; 16];
    writer.begin(&maker.header).unwrap();
    let more = maker.data(1);
    writer.append(&more, false).unwrap();
    writer.sync_handle().unwrap().sync().unwrap();
    let expected = [found, vec![more]].concat();
    assert_eq!(read_all(directory, &writer.end()), expected, "{context}");
    let end = writer.end();
    drop(writer);
    let (writer, report) = open(directory);
    assert_eq!(report, RecoveryReport::default(), "{context}");
    assert_eq!(writer.end().last_digest, end.last_digest, "{context}");
}

fn frame_no(frame: &[u8]) -> u32 {
    crate::format::frame::FrameHeader::parse(frame)
        .unwrap()
        .frame_no
        .0
}

fn losses(nth: u64) -> Vec<Loss> {
    let random = (0..6).map(|seed| Loss::Random(nth * 100 + seed));
    [Loss::Nothing, Loss::Everything]
        .into_iter()
        .chain(random)
        .collect()
}

/// A stop at every operation of the script, and all kinds of loss.
fn stop_everywhere(sealer: Sealer) {
    let mut nth = 1;
    loop {
        let (memory, done, came) = run(nth, Fault::Stop, sealer);
        for loss in losses(nth) {
            let after: Arc<dyn Directory> = Arc::new(memory.fork().crash(loss));
            let survived = if loss == Loss::Nothing {
                done.appended
            } else {
                done.synced
            };
            check(
                &after,
                &done,
                survived,
                &format!("{sealer:?}, stop at {nth}, {loss:?}"),
            );
        }
        if !came {
            assert!(nth > 60, "the script did only {nth} operations");
            return;
        }
        nth += 1;
    }
}

#[test]
fn a_stop_at_every_operation_leaves_a_prefix_with_all_that_was_synced() {
    stop_everywhere(Sealer::Inline);
}

#[test]
fn a_stop_beside_the_sealing_thread_leaves_a_prefix() {
    stop_everywhere(Sealer::Thread);
}

#[test]
fn a_stop_with_many_segments_unsealed_leaves_a_prefix() {
    stop_everywhere(Sealer::Nobody);
}

#[test]
fn a_failed_operation_poisons_and_recovery_finds_all_that_was_synced() {
    for fault in [Fault::Error, Fault::Short] {
        let mut nth = 1;
        loop {
            let (memory, done, came) = run(nth, fault, Sealer::Inline);
            for loss in [Loss::Nothing, Loss::Everything, Loss::Random(nth)] {
                let after: Arc<dyn Directory> = Arc::new(memory.fork().crash(loss));
                let survived = if loss == Loss::Nothing {
                    done.appended
                } else {
                    done.synced
                };
                check(
                    &after,
                    &done,
                    survived,
                    &format!("{fault:?} at {nth}, {loss:?}"),
                );
            }
            if !came {
                break;
            }
            nth += 1;
        }
    }
}

#[test]
fn a_second_crash_at_every_operation_of_recovery_changes_nothing() {
    let mut nth = 1;
    loop {
        let (memory, done, came) = run(nth, Fault::Stop, Sealer::Inline);
        for loss in [
            Loss::Everything,
            Loss::Random(nth),
            Loss::Random(nth + 1000),
        ] {
            let crashed = memory.fork().crash(loss);
            let mut step = 1;
            loop {
                let copy = crashed.fork();
                let faulty = Arc::new(FaultyDirectory::new(Arc::new(copy.clone())));
                faulty.fail_change(step, Fault::Stop);
                let directory: Arc<dyn Directory> = Arc::clone(&faulty) as _;
                let first = open_as(&directory, INLINE).map(|(_, report)| report.torn_bytes);
                let again: Arc<dyn Directory> = Arc::new(copy.crash(Loss::Random(nth * 7 + step)));
                let context = format!("stop at {nth}, {loss:?}, then at {step} of recovery");
                check(&again, &done, done.synced, &context);
                if first.is_ok() {
                    break;
                }
                step += 1;
            }
        }
        if !came {
            return;
        }
        nth += 1;
    }
}

#[test]
fn the_note_of_what_is_durable_never_goes_back() {
    let memory = MemoryDirectory::new();
    let directory: Arc<dyn Directory> = Arc::new(memory.clone());
    let (mut writer, _) = open(&directory);
    let mut maker = FrameMaker::new();
    writer.begin(&maker.header).unwrap();
    writer.append(&maker.data(1), false).unwrap();
    let lagging = writer.sync_handle().unwrap();
    writer.append(&maker.data(1), false).unwrap();
    let newest = writer.sync_handle().unwrap();
    newest.sync().unwrap();
    let note = Synced::parse(&memory.content(SYNCED).unwrap()).unwrap();
    assert_eq!(note.length, newest.end().committed_len);
    lagging.sync().unwrap();
    assert_eq!(Synced::parse(&memory.content(SYNCED).unwrap()), Some(note));
}

#[test]
fn after_a_failed_sync_everything_is_refused() {
    for sync in [false, true] {
        let faulty = Arc::new(FaultyDirectory::new(Arc::new(MemoryDirectory::new())));
        let directory: Arc<dyn Directory> = Arc::clone(&faulty) as _;
        let (mut writer, _) = open(&directory);
        let mut maker = FrameMaker::new();
        writer.begin(&maker.header).unwrap();
        writer.append(&maker.data(1), false).unwrap();
        let handle = writer.sync_handle().unwrap();
        faulty.fail_change(1, Fault::Error);
        let frame = maker.data(1);
        let failed = if sync {
            handle.sync()
        } else {
            writer.append(&frame, false).map(drop)
        };
        assert!(matches!(failed, Err(LogError::Io { .. })), "{failed:?}");
        assert!(matches!(handle.sync(), Err(LogError::Poisoned)));
        assert!(matches!(
            writer.append(&frame, false),
            Err(LogError::Poisoned)
        ));
        assert!(matches!(writer.sync_handle(), Err(LogError::Poisoned)));
        assert!(matches!(
            writer.begin(&maker.header),
            Err(LogError::Poisoned)
        ));
        assert!(matches!(writer.seal(), Err(LogError::Poisoned)));
        assert!(matches!(writer.seal_if_due(), Err(LogError::Poisoned)));
        assert!(matches!(
            writer.publish_run(1, FrameNo(0)),
            Err(LogError::Poisoned)
        ));
        drop(writer);
        let (writer, _) = open(&directory);
        assert_eq!(read_all(&directory, &writer.end()).len(), 1);
    }
}
