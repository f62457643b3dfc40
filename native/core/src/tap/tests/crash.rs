//! Crashes at any moment, with backing, spool and state losing what was not synced independently:
//! what was flushed is on the backing (and, unless the spool lost it, in history), the backing is
//! the truth, and once the span has ended the newest history equals it. Numbers never repeat.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::rig::{Random, Rig, WAITS, device};
use crate::device::BlockDevice;
use crate::format::record::RecordBody;
use crate::storage::Loss;
use crate::tap::IncarnationLimits;
use crate::types::Seq;

const SIZE: u64 = 5 << 20;
const SECTOR: usize = 512;

fn loss(random: &mut Random) -> Loss {
    match random.below(4) {
        0 => Loss::Nothing,
        1 => Loss::Everything,
        _ => Loss::Random(random.below(1 << 30)),
    }
}

/// What a writer knows about its part of the volume.
#[derive(Debug, Clone)]
struct Knowledge {
    /// Content at the last flush that was answered.
    flushed: Vec<u8>,
    /// Values written to each sector since.
    since: Vec<Vec<u8>>,
    flushed_seq: Seq,
    /// Part of the volume that this writer alone writes to.
    from: usize,
}

impl Knowledge {
    fn new(content: &[u8], from: usize, to: usize) -> Self {
        Self {
            flushed: content[from..to].to_vec(),
            since: vec![Vec::new(); (to - from) / SECTOR],
            flushed_seq: Seq(0),
            from,
        }
    }

    /// The backing after a crash holds for each sector the flushed value or a later one.
    fn check(&self, content: &[u8]) {
        for (index, later) in self.since.iter().enumerate() {
            let at = index * SECTOR;
            let found = &content[self.from + at..self.from + at + SECTOR];
            let kept = found == &self.flushed[at..at + SECTOR];
            let written = later
                .iter()
                .any(|value| found.iter().all(|byte| byte == value));
            assert!(
                kept || written,
                "sector {index} is neither flushed nor written later"
            );
        }
    }
}

/// Writes and flushes until an operation fails, which is the crash.
fn work(
    volume: &dyn BlockDevice,
    mut random: Random,
    known: &mut Knowledge,
    seq: impl Fn() -> Seq,
    going: &AtomicBool,
) {
    let length = known.flushed.len();
    let mut current = known.flushed.clone();
    let mut value = 1u8;
    loop {
        if random.below(12) == 0 {
            let (before, after) = (seq(), volume.flush(WAITS));
            // One that is answered after the crash is answered by a dead process.
            if after.is_err() || !going.load(Ordering::SeqCst) {
                return;
            }
            known.flushed.clone_from(&current);
            known.since.iter_mut().for_each(Vec::clear);
            known.flushed_seq = before;
            continue;
        }
        value = value.wrapping_add(1).max(1);
        let sectors = 1 + random.below(20) as usize;
        let sectors = if random.below(10) == 0 { 700 } else { sectors };
        let first = random.below((length / SECTOR - sectors) as u64) as usize;
        let range = first * SECTOR..(first + sectors) * SECTOR;
        let zero = random.below(10) == 0;
        let stored = if zero { 0 } else { value };
        // Noted before: an operation that fails may have been done.
        known.since[first..first + sectors]
            .iter_mut()
            .for_each(|sector| sector.push(stored));
        let offset = (known.from + range.start) as u64;
        let outcome = if zero {
            volume.trim(offset, range.len() as u64, WAITS)
        } else {
            volume.write(&vec![value; range.len()], offset, WAITS)
        };
        if outcome.is_err() {
            return;
        }
        current[range].fill(stored);
    }
}

fn crash_round(seed: u64) {
    let mut random = Random(seed * 2 + 1);
    let mut rig = Rig::new(&[SIZE]);
    rig.checkpoint = Duration::from_millis(5);
    rig.incarnation = IncarnationLimits {
        bytes: 2 << 20,
        ..IncarnationLimits::default()
    };
    let mut newest = Seq(0);
    for _ in 0..3 {
        let tap = rig.start();
        assert!(tap.status().last_seq > newest, "a seq was used twice");
        let content = rig.content(0);
        let half = SIZE as usize / 2 / 4096 * 4096;
        let mut known = [
            Knowledge::new(&content, 0, half),
            Knowledge::new(&content, half, SIZE as usize),
        ];
        let losses = [loss(&mut random), loss(&mut random), loss(&mut random)];
        let pause = random.below(30_000);
        let going = AtomicBool::new(true);
        std::thread::scope(|scope| {
            for (index, known) in known.iter_mut().enumerate() {
                let (tap, going) = (Arc::clone(&tap), &going);
                let random = Random(seed * 17 + index as u64 + 1);
                scope.spawn(move || {
                    work(
                        &*device(&tap, 0),
                        random,
                        known,
                        || tap.status().last_seq,
                        going,
                    );
                    assert!(
                        !going.load(Ordering::SeqCst),
                        "an operation failed before the crash"
                    );
                });
            }
            std::thread::sleep(Duration::from_micros(pause));
            going.store(false, Ordering::SeqCst);
            let [spool, state, disk] = losses;
            rig.crash(spool, state, disk);
        });
        newest = tap.status().last_seq;
        drop(tap);
        let content = rig.content(0);
        for known in &known {
            known.check(&content);
        }
        let tap = rig.start();
        let replay = rig.check(&tap);
        newest = newest.max(tap.status().last_seq);
        if losses[0] == Loss::Nothing {
            // Only processes died: what was flushed is in history as it was.
            for known in &known {
                if known.flushed_seq == Seq(0) {
                    continue;
                }
                let recorded: Vec<Seq> = replay.records.iter().map(|(r, _)| r.seq).collect();
                let held = recorded.contains(&known.flushed_seq);
                let gap = replay
                    .bodies()
                    .any(|body| matches!(body, RecordBody::Gap { .. }));
                assert!(
                    held || gap,
                    "{:?} was flushed and is not in history",
                    known.flushed_seq
                );
            }
        }
        drop(tap);
        rig.crash(Loss::Nothing, Loss::Nothing, Loss::Nothing);
    }
}

#[test]
fn crashes_with_independent_loss_recover_to_the_backing() {
    for seed in 1..=40 {
        crash_round(seed);
    }
}

#[test]
fn crash_while_nothing_was_copied_yet_is_a_first_copy_again() {
    for seed in 1..=10 {
        let mut rig = Rig::new(&[SIZE]);
        rig.disk.place("volume0", &vec![9; SIZE as usize]);
        let tap = rig.start();
        std::thread::sleep(Duration::from_micros(seed * 300));
        rig.crash(Loss::Random(seed), Loss::Random(seed + 1), Loss::Nothing);
        drop(tap);
        let tap = rig.start();
        rig.check(&tap);
        tap.stop().unwrap();
    }
}
