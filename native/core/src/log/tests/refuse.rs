//! Frames that must not be taken, each refused with an error of its own, and the log unchanged.

use std::sync::Arc;

use super::*;
use crate::format::FormatError;
use crate::format::frame::{FRAME_HEADER_LEN, FrameHeader};
use crate::log::testing::{FrameMaker, edited};
use crate::storage::MemoryDirectory;
use crate::types::{FrameNo, Generation, GroupId, IncarnationId, Seq, TimeUs};

struct Fixture {
    directory: Arc<dyn Directory>,
    writer: LogWriter,
    /// At the state behind the frames that are held.
    maker: FrameMaker,
    held: Vec<Vec<u8>>,
}

/// A log that holds some frames of one incarnation, in sealed segments and an open one.
fn fixture() -> Fixture {
    let directory: Arc<dyn Directory> = Arc::new(MemoryDirectory::new());
    let (mut writer, _) = open(&directory);
    let mut maker = FrameMaker::new();
    writer.begin(&maker.header).unwrap();
    let held: Vec<_> = (0..10).map(|_| maker.data(1)).collect();
    for frame in &held {
        writer.append(frame, false).unwrap();
    }
    Fixture {
        directory,
        writer,
        maker,
        held,
    }
}

impl Fixture {
    /// Appends, expects an error, and that nothing has changed.
    fn refused(&mut self, frames: &[u8]) -> LogError {
        let before = self.writer.end();
        let error = self
            .writer
            .append(frames, false)
            .expect_err("must be refused");
        assert_eq!(self.writer.end(), before);
        assert_eq!(read_all(&self.directory, &before), self.held);
        error
    }

    fn refused_begin(&mut self, maker: &FrameMaker) -> LogError {
        let before = self.writer.end();
        let error = self
            .writer
            .begin(&maker.header)
            .expect_err("must be refused");
        assert_eq!(self.writer.end(), before);
        error
    }

    /// The log still takes the frame that is due.
    fn goes_on(mut self) {
        let next = self.maker.data(1);
        self.writer.append(&next, false).unwrap();
        self.held.push(next);
        assert_eq!(read_all(&self.directory, &self.writer.end()), self.held);
    }
}

#[test]
fn frames_held_already_are_skipped() {
    let mut log = fixture();
    let before = log.writer.end();
    let all = log.held.concat();
    assert_eq!(log.writer.append(&all, false).unwrap(), before);
    assert_eq!(log.writer.append(&log.held[3], false).unwrap(), before);
    let new = log.maker.data(1);
    let mixed = [log.held[8..].concat(), new.clone()].concat();
    log.writer.append(&mixed, false).unwrap();
    log.held.push(new);
    assert_eq!(read_all(&log.directory, &log.writer.end()), log.held);
    // Also after reopening, when no digest is in memory, and for an incarnation that has ended.
    let Fixture {
        directory,
        writer,
        maker,
        held,
    } = log;
    drop(writer);
    let (mut writer, _) = open(&directory);
    let before = writer.end();
    assert_eq!(writer.append(&held.concat(), false).unwrap(), before);
    let mut later = maker.next_incarnation();
    writer.begin(&later.header).unwrap();
    writer.append(&later.data(1), false).unwrap();
    writer.begin(&maker.header).unwrap();
    let before = writer.end();
    assert_eq!(writer.append(&held.concat(), false).unwrap(), before);
    writer.begin(&later.header).unwrap();
    writer.append(&later.data(1), false).unwrap();
    assert_eq!(read_all(&directory, &writer.end()).len(), held.len() + 2);
}

#[test]
fn an_ended_incarnation_cannot_grow() {
    let mut log = fixture();
    let mut later = log.maker.next_incarnation();
    log.writer.begin(&later.header).unwrap();
    log.held.push(later.data(1));
    log.writer.append(&log.held[10], false).unwrap();
    log.writer.begin(&log.maker.header).unwrap();
    let mut ended = log.maker.clone();
    ended.next_seq = 1000;
    ended.next_time = 1 << 40;
    let error = log.refused(&ended.data(1));
    assert!(matches!(error, LogError::IncarnationClosed(id) if id == ended.header.incarnation));
}

#[test]
fn the_same_number_with_another_digest_is_a_conflict() {
    for reopen in [false, true] {
        let mut log = fixture();
        if reopen {
            let Fixture {
                directory,
                writer,
                maker,
                held,
            } = log;
            drop(writer);
            let (writer, _) = open(&directory);
            log = Fixture {
                directory,
                writer,
                maker,
                held,
            };
        }
        for index in [1, 5, 9] {
            let other = edited(&log.held[index], |header| header.nonce_random ^= 1);
            let error = log.refused(&other);
            assert!(
                matches!(error, LogError::Conflict { frame } if frame.0 as usize == index),
                "{error}"
            );
        }
        log.goes_on();
    }
}

#[test]
fn frames_out_of_order_are_refused() {
    let mut log = fixture();
    let mut maker = log.maker.clone();
    let (next, after) = (maker.data(1), maker.data(1));
    let is = |error: &LogError, expected: u32, found: u32| {
        matches!(error, LogError::OutOfOrder { expected: e, found: f }
            if e.0 == expected && f.0 == found)
    };
    let error = log.refused(&after);
    assert!(is(&error, 10, 11), "{error}");
    let error = log.refused(&[&after[..], &next].concat());
    assert!(is(&error, 10, 11), "{error}");
    // A good frame before a bad one is not taken either, and can come again.
    let error = log.refused(&[&next[..], &next].concat());
    assert!(is(&error, 11, 10), "{error}");
    let third = maker.data(1);
    let error = log.refused(&[&next[..], &third].concat());
    assert!(is(&error, 11, 12), "{error}");
    log.goes_on();
}

#[test]
fn foreign_frames_are_refused() {
    let mut log = fixture();
    let next = log.maker.clone().data(1);
    let foreign = edited(&next, |header| header.group = GroupId([8; 16]));
    assert!(matches!(
        log.refused(&foreign),
        LogError::ForeignGroup { .. }
    ));
    let unknown = edited(&next, |header| header.incarnation = IncarnationId([9; 16]));
    assert!(matches!(log.refused(&unknown), LogError::UnknownIncarnation(id) if id.0 == [9; 16]));
    let generation = edited(&next, |header| header.generation.counter += 1);
    assert!(matches!(
        log.refused(&generation),
        LogError::Format(FormatError::Field {
            field: "generation",
            ..
        })
    ));
    let suite = edited(&next, |header| header.suite = 1);
    assert!(matches!(
        log.refused(&suite),
        LogError::Format(FormatError::Field { field: "suite", .. })
    ));
    let mut other = log.maker.next_incarnation();
    other.header.group = GroupId([8; 16]);
    assert!(matches!(
        log.refused_begin(&other),
        LogError::ForeignGroup { .. }
    ));
    log.goes_on();

    let directory: Arc<dyn Directory> = Arc::new(MemoryDirectory::new());
    let (mut writer, _) = open(&directory);
    let frame = FrameMaker::new().data(1);
    assert!(matches!(
        writer.append(&frame, false),
        Err(LogError::UnknownIncarnation(_))
    ));
}

#[test]
fn an_older_generation_is_fenced() {
    let mut log = fixture();
    let next = log.maker.clone().data(1);
    let promised = Generation {
        counter: 3,
        site: 2,
    };
    log.writer.promise(promised);
    log.writer.promise(Generation {
        counter: 1,
        site: 9,
    });
    let error = log.refused(&next);
    assert!(
        matches!(error, LogError::Fenced { promised: p, .. } if p == promised),
        "{error}"
    );
    let later = log.maker.next_incarnation();
    assert!(matches!(log.refused_begin(&later), LogError::Fenced { .. }));
    let mut newer = later.clone();
    newer.header.generation = promised;
    log.writer.begin(&newer.header).unwrap();
    log.writer.append(&newer.data(1), false).unwrap();
}

#[test]
fn a_broken_chain_is_refused() {
    let mut log = fixture();
    let next = log.maker.clone().data(1);
    let broken = edited(&next, |header| header.prev[31] ^= 1);
    let error = log.refused(&broken);
    assert!(
        matches!(error, LogError::BrokenChain { frame: FrameNo(10) }),
        "{error}"
    );
    let mut maker = log.maker.clone();
    let second = {
        maker.data(1);
        maker.data(1)
    };
    let broken = edited(&second, |header| header.prev[0] ^= 1);
    let error = log.refused(&[&next[..], &broken].concat());
    assert!(
        matches!(error, LogError::BrokenChain { frame: FrameNo(11) }),
        "{error}"
    );
    log.goes_on();
}

#[test]
fn a_floor_below_what_is_held_is_refused() {
    let directory: Arc<dyn Directory> = Arc::new(MemoryDirectory::new());
    let (mut writer, _) = open(&directory);
    let mut maker = FrameMaker::new();
    for _ in 0..5 {
        maker.data(1);
    }
    maker.header.first_frame = FrameNo(5);
    writer.begin(&maker.header).unwrap();
    let first = maker.data(1);
    let below = edited(&first, |header| header.ref_floor = FrameNo(4));
    let error = writer.append(&below, false).unwrap_err();
    assert!(matches!(
        error,
        LogError::BelowFloor {
            frame: FrameNo(5),
            floor: FrameNo(4)
        }
    ));
    writer.append(&first, false).unwrap();
    drop(writer);
    let (mut writer, _) = open(&directory);
    let next = maker.data(1);
    let below = edited(&next, |header| header.ref_floor = FrameNo(2));
    assert!(matches!(
        writer.append(&below, false),
        Err(LogError::BelowFloor { .. })
    ));
    let reaching = edited(&next, |header| header.ref_floor = FrameNo(5));
    writer.append(&reaching, false).unwrap();
}

#[test]
fn reused_seqs_and_times_are_refused() {
    let mut log = fixture();
    let next = log.maker.clone().data(1);
    let reused = edited(&next, |header| header.first_seq = Seq(10));
    let error = log.refused(&reused);
    assert!(
        matches!(
            error,
            LogError::SeqReused {
                last: Seq(10),
                found: Seq(10)
            }
        ),
        "{error}"
    );
    let last = FrameHeader::parse(&log.held[9]).unwrap().last_time;
    let back = edited(&next, |header| {
        (header.first_time, header.last_time) = (last, last);
    });
    let error = log.refused(&back);
    assert!(matches!(error, LogError::TimeReused { .. }), "{error}");
    // Across incarnations too.
    let mut rolled_back = log.maker.next_incarnation();
    rolled_back.next_seq = 4;
    log.writer.begin(&rolled_back.header).unwrap();
    assert!(matches!(
        log.refused(&rolled_back.data(1)),
        LogError::SeqReused { .. }
    ));
    let mut early = log.maker.next_incarnation();
    early.next_time = 5;
    assert!(matches!(
        log.refused(&early.data(1)),
        LogError::TimeReused { .. }
    ));
    assert!(TimeUs(5) < last);
}

#[test]
fn damaged_frames_are_refused() {
    let mut log = fixture();
    let next = log.maker.clone().data(1);
    for at in 0..next.len() {
        let mut damaged = next.clone();
        damaged[at] ^= 0x10;
        let error = log
            .writer
            .append(&damaged, false)
            .expect_err("must be refused");
        assert!(matches!(error, LogError::Format(_)), "byte {at}: {error}");
    }
    for length in (1..next.len()).step_by(97) {
        let error = log.refused(&next[..length]);
        let truncated = matches!(error, LogError::Format(FormatError::Truncated { .. }));
        assert!(truncated, "{length}: {error}");
    }
    let long = edited(&next, |header| header.cells_len = 3 << 20);
    assert!(matches!(log.refused(&long), LogError::Format(_)));
    // `trusted` skips the body's digest alone, not the header's checks.
    let mut body = next.clone();
    body[FRAME_HEADER_LEN + 100] ^= 1;
    let mut head = next.clone();
    head[70] ^= 1;
    assert!(log.writer.append(&head, true).is_err());
    log.goes_on();
    let mut log = fixture();
    log.writer.append(&body, true).unwrap();
}

#[test]
fn holes_are_refused_when_announced() {
    let mut log = fixture();
    let mut ahead = log.maker.clone();
    ahead.header.first_frame = FrameNo(11);
    let error = log.refused_begin(&ahead);
    assert!(
        matches!(
            error,
            LogError::OutOfOrder {
                expected: FrameNo(10),
                found: FrameNo(11)
            }
        ),
        "{error}"
    );
    // The source knows frame 10, which this log has never seen.
    let mut missed = log.maker.clone();
    missed.data(1);
    let error = log.refused_begin(&missed.next_incarnation());
    assert!(
        matches!(
            error,
            LogError::OutOfOrder {
                expected: FrameNo(10),
                found: FrameNo(11)
            }
        ),
        "{error}"
    );
    let mut middle = log.maker.next_incarnation();
    middle.header.first_frame = FrameNo(3);
    assert!(matches!(
        log.refused_begin(&middle),
        LogError::OutOfOrder { .. }
    ));
    // The source knows a frame of ours by another digest: it was rolled back.
    let mut cloned = log.maker.next_incarnation();
    if let Some(parent) = &mut cloned.header.parent {
        parent.frame_no = FrameNo(6);
    }
    let error = log.refused_begin(&cloned);
    assert!(
        matches!(error, LogError::Conflict { frame: FrameNo(6) }),
        "{error}"
    );
    let mut salted = log.maker.clone();
    salted.header.salt[0] ^= 1;
    let error = log.refused_begin(&salted);
    assert!(matches!(error, LogError::IncarnationConflict(_)), "{error}");
    log.goes_on();
}

#[test]
fn the_source_may_know_less_than_is_held() {
    let mut log = fixture();
    let mut behind = FrameMaker::new();
    for _ in 0..7 {
        behind.data(1);
    }
    let mut next = behind.next_incarnation();
    next.next_seq = log.maker.next_seq + 1000;
    next.next_time = log.maker.next_time + 1000;
    log.writer.begin(&next.header).unwrap();
    log.held.push(next.data(1));
    log.writer.append(&log.held[10], false).unwrap();
    assert_eq!(read_all(&log.directory, &log.writer.end()), log.held);
}

#[test]
fn a_log_of_another_group_is_refused() {
    let log = fixture();
    let Fixture {
        directory,
        mut writer,
        ..
    } = log;
    writer.seal().unwrap();
    let end = writer.end();
    drop(writer);
    let other = GroupId([8; 16]);
    let error = LogWriter::open(Arc::clone(&directory), other).unwrap_err();
    assert!(matches!(error, LogError::ForeignGroup { .. }), "{error}");
    let mut reader = LogReader::open(directory, other).unwrap();
    assert!(matches!(
        reader.next_batch(&end, 1),
        Err(LogError::ForeignGroup { .. })
    ));
}
