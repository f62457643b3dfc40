//! History against a plain model, points, damage, merging and crashes of the index.

use std::sync::Arc;

use proptest::prelude::*;

use super::testing::{GROUP, Recorder, differences, options};
use super::*;
use crate::crypto::Suite;
use crate::format::record::{Cause, RecordBody};
use crate::storage::{Directory, Fault, FaultyDirectory, Loss, MemoryDirectory};
use crate::types::{BlockIndex, TimeUs, VolumeIndex};

const BLOCKS: u64 = 96;
const SIZE: u64 = BLOCKS * 4096;

fn memory() -> Arc<dyn Directory> {
    Arc::new(MemoryDirectory::new())
}

fn recorder(segment_records: u64) -> Recorder {
    let mut recorder = Recorder::new(memory(), Suite::Aes256Gcm, options(segment_records));
    recorder.incarnation(&[SIZE, SIZE]);
    recorder
}

fn history(recorder: &Recorder) -> History {
    let end = recorder.journal.end();
    History::open(Arc::clone(&recorder.directory), GROUP, Some(&end)).unwrap()
}

/// The seq of the newest change of every block, by asking for runs of blocks as a view does.
fn versions(history: &History, volume: u16, blocks: u64, seq: Seq) -> Vec<u64> {
    let mut found = Vec::new();
    while (found.len() as u64) < blocks {
        let at = found.len() as u64;
        let single = history
            .lookup_within(VolumeIndex(volume), BlockIndex(at), seq, 1)
            .unwrap()
            .0;
        let (version, count) = history
            .lookup(VolumeIndex(volume), BlockIndex(at), seq)
            .unwrap();
        assert_eq!(single, version);
        assert!(count > 0);
        let (Version::Zero { seq } | Version::Discarded { seq } | Version::Stored { seq, .. }) =
            version;
        found.extend((0..count.min(blocks - at)).map(|_| seq.0));
    }
    found
}

/// The same from the model: changes that store what was there before do not count.
fn expected_versions(recorder: &Recorder, volume: u16, blocks: u64, seq: Seq) -> Vec<u64> {
    let mut state = vec![(0u64, 0u32); blocks as usize];
    for change in recorder
        .model
        .changes
        .iter()
        .take_while(|change| change.seq <= seq)
    {
        for offset in 0..change.extent.blocks.min(blocks) {
            let place = (change.extent.start.0 + offset) as usize;
            if change.extent.volume.0 != volume || place >= state.len() {
                continue;
            }
            let tag = change.tags.get(offset as usize).copied();
            if tag.is_none_or(|tag| tag == 0 || tag != state[place].1) {
                state[place] = (change.seq.0, tag.unwrap_or(0));
            }
        }
    }
    state.into_iter().map(|(seq, _)| seq).collect()
}

#[derive(Debug, Clone)]
enum Step {
    Write {
        volume: u16,
        start: u64,
        tags: Vec<u32>,
    },
    Clear {
        volume: u16,
        start: u64,
        blocks: u64,
        discard: bool,
    },
    Close,
    Incarnation,
}

fn step() -> impl Strategy<Value = Step> {
    let write = (0..2u16, 0..BLOCKS, prop::collection::vec(0..6u32, 1..20)).prop_map(
        |(volume, start, mut tags)| {
            tags.truncate((BLOCKS - start) as usize);
            Step::Write {
                volume,
                start,
                tags,
            }
        },
    );
    let clear = (0..2u16, 0..BLOCKS, 1..BLOCKS * 3, any::<bool>()).prop_map(
        |(volume, start, blocks, discard)| Step::Clear {
            volume,
            start,
            blocks,
            discard,
        },
    );
    prop_oneof![8 => write, 2 => clear, 3 => Just(Step::Close), 1 => Just(Step::Incarnation)]
}

fn play(recorder: &mut Recorder, steps: &[Step]) {
    for step in steps {
        match step {
            Step::Write {
                volume,
                start,
                tags,
            } => {
                recorder.write(*volume, *start, tags, false);
            }
            Step::Clear {
                volume,
                start,
                blocks,
                discard,
            } => {
                recorder.clear(*volume, *start, *blocks, *discard);
            }
            Step::Close => recorder.close(),
            Step::Incarnation => recorder.incarnation(&[SIZE, SIZE]),
        }
    }
    recorder.close();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn lookups_agree_with_a_plain_model(
        steps in prop::collection::vec(step(), 1..160),
        segment_records in 1..24u64,
        points in prop::collection::vec(0..4000u64, 6),
        settle in any::<bool>(),
    ) {
        let mut recorder = recorder(segment_records);
        play(&mut recorder, &steps);
        if settle {
            recorder.settle();
        }
        let with_end = history(&recorder);
        let without = History::open(Arc::clone(&recorder.directory), GROUP, None).unwrap();
        for history in [&with_end, &without] {
            prop_assert_eq!(history.findings(), &[] as &[String]);
            let newest = recorder.seq;
            for seq in points.iter().map(|p| Seq(p % (newest.0 + 1))).chain([newest]) {
                for volume in 0..2 {
                    prop_assert_eq!(
                        versions(history, volume, BLOCKS, seq),
                        expected_versions(&recorder, volume, BLOCKS, seq),
                        "volume {} at {:?}", volume, seq
                    );
                }
            }
        }
    }
}

#[test]
fn sealed_merged_and_open_segments_answer_together_and_runs_stay_few() {
    let mut recorder = recorder(8);
    for round in 0..400u32 {
        recorder.write(0, u64::from(round * 7 % 90), &[round + 1, round + 2], false);
        recorder.close();
    }
    recorder.settle();
    let sealed = recorder.files(".seg").len();
    let runs = recorder.files(".run");
    assert!(sealed >= 45, "{sealed} segments");
    assert!(runs.len() <= 9, "{runs:?}");
    assert!(
        runs.iter().any(|name| name.len() > 35),
        "no merged run in {runs:?}"
    );
    let history = history(&recorder);
    // The runs, and the segment that is still open.
    assert!(history.run_count() <= runs.len() + 1);
    for seq in [1, 100, 250, 399, recorder.seq.0].map(Seq) {
        let found = versions(&history, 0, BLOCKS, seq);
        assert_eq!(
            found,
            expected_versions(&recorder, 0, BLOCKS, seq),
            "at {seq:?}"
        );
    }
    assert_eq!(recorder.files(".tmp"), Vec::<String>::new());
}

#[test]
fn a_discard_of_a_tebibyte_is_some_entries_and_one_answer() {
    let mut recorder = Recorder::new(memory(), Suite::Aes256Gcm, options(4));
    let blocks = 1u64 << 28;
    recorder.incarnation(&[blocks * 4096]);
    let (before, _) = recorder.clear(0, 0, blocks, false);
    recorder.write(0, 1 << 20, &[1, 2, 3], false);
    let (wide, _) = recorder.clear(0, 1, blocks - 2, true);
    recorder.write(0, 5, &[4], false);
    recorder.close();
    recorder.settle();
    let history = history(&recorder);
    let at = |block, seq| {
        history
            .lookup(VolumeIndex(0), BlockIndex(block), seq)
            .unwrap()
    };
    let newest = recorder.seq;
    assert_eq!(at(0, newest).0, Version::Zero { seq: before });
    assert_eq!(at(blocks - 1, newest).0, Version::Zero { seq: before });
    let (version, count) = at(1 << 27, newest);
    assert_eq!(version, Version::Discarded { seq: wide });
    assert!(count >= 1 << 26, "{count}");
    assert_eq!(
        at((1 << 20) + 1, newest).0,
        Version::Discarded { seq: wide }
    );
    assert!(matches!(
        at((1 << 20) + 1, Seq(wide.0 - 1)).0,
        Version::Stored {
            payload_block: 1,
            ..
        }
    ));
    assert_eq!(
        at(blocks, newest),
        (Version::Zero { seq: Seq(0) }, u64::MAX - blocks)
    );
}

fn seq_of(point: Result<Point, HistoryError>) -> Result<u64, HistoryError> {
    point.map(|point| point.seq.0)
}

#[test]
fn every_time_resolves_to_the_newest_record_before_it() {
    let mut recorder = recorder(10);
    for round in 0..100u32 {
        recorder.write(0, u64::from(round % 50), &[round + 1], false);
        if round % 3 == 0 {
            recorder.close();
        }
        if round == 60 {
            recorder.incarnation(&[SIZE, SIZE]);
        }
    }
    recorder.close();
    let history = history(&recorder);
    let first = &recorder.model.changes[0];
    for (change, next) in recorder
        .model
        .changes
        .iter()
        .zip(&recorder.model.changes[1..])
    {
        let asked = |time| seq_of(history.resolve(&PointSpec::At(TimeUs(time)), true));
        assert_eq!(asked(change.time.0).unwrap(), change.seq.0);
        let between = asked(next.time.0 - 1).unwrap();
        assert!((change.seq.0..next.seq.0).contains(&between));
        let point = history
            .resolve(&PointSpec::AtSeq(change.seq), true)
            .unwrap();
        assert_eq!(
            point,
            Point {
                seq: change.seq,
                time: change.time
            }
        );
    }
    // A seq that was never given out stands for the one before it.
    let hole = Seq(recorder.model.changes[70].seq.0 - 500);
    let resolved = history.resolve(&PointSpec::AtSeq(hole), true).unwrap();
    assert!(resolved.seq < hole && resolved.seq >= recorder.model.changes[59].seq);
    let newest = history.resolve(&PointSpec::Newest, true).unwrap();
    assert_eq!((newest.seq, newest.time), (recorder.seq, recorder.time));
    let future = history.resolve(&PointSpec::At(TimeUs(recorder.time.0 + 1)), false);
    assert!(
        matches!(future, Err(HistoryError::InFuture { newest, .. }) if newest == recorder.time)
    );
    let past = history.resolve(&PointSpec::At(TimeUs(first.time.0 - 1)), false);
    assert!(
        matches!(past, Err(HistoryError::BeforeHorizon { horizon, .. }) if horizon == first.time)
    );
    let long_past = history.resolve(&PointSpec::At(TimeUs(1)), false);
    assert!(matches!(long_past, Err(HistoryError::BeforeHorizon { .. })));
    let beyond = history.resolve(&PointSpec::AtSeq(Seq(recorder.seq.0 + 1)), false);
    assert!(matches!(beyond, Err(HistoryError::SeqOutside { .. })));
}

#[test]
fn no_point_inside_a_span_is_offered() {
    let mut recorder = recorder(4);
    recorder.span_begin(Cause::FirstCopy);
    recorder.write(0, 0, &[1], true);
    recorder.close();
    let spec_newest = PointSpec::Newest;
    assert!(matches!(
        history(&recorder).resolve(&spec_newest, false),
        Err(HistoryError::Empty)
    ));
    assert_eq!(history(&recorder).timeline().unwrap().newest, None);

    recorder.write(0, 1, &[2], true);
    let inside_first = recorder.time;
    recorder.event(RecordBody::Bookmark {
        label: "too early".into(),
    });
    let (copied, copied_at) = recorder.event(RecordBody::SpanEnd);
    let (written, _) = recorder.write(0, 2, &[3], false);
    recorder.event(RecordBody::Bookmark {
        label: "good".into(),
    });
    let (last_good, last_good_at) = recorder.event(RecordBody::Barrier);
    recorder.incarnation(&[SIZE, SIZE]);
    let before_span = recorder.seq;
    let (begun, _) = recorder.span_begin(Cause::UncleanStop);
    let (resynced, resynced_at) = recorder.write(0, 3, &[4], true);
    recorder.event(RecordBody::Bookmark {
        label: "inside".into(),
    });
    recorder.close();
    let open = history(&recorder);
    let at = |history: &History, spec: &PointSpec, exact| seq_of(history.resolve(spec, exact));
    // Not the VOLUME records at the head: their time lies behind what history shows there.
    assert_eq!(at(&open, &spec_newest, true).unwrap(), last_good.0);
    let bookmark = |label: &str| PointSpec::Bookmark(label.into());
    assert_eq!(at(&open, &bookmark("inside"), false).unwrap(), last_good.0);
    assert_eq!(
        at(&open, &PointSpec::AtSeq(before_span), false).unwrap(),
        last_good.0
    );
    let refused = open.resolve(&bookmark("inside"), true);
    assert!(
        matches!(refused, Err(HistoryError::InsideSpan { last: Some(p) }) if p.seq == last_good)
    );
    // Older points open at all times.
    assert_eq!(
        at(&open, &PointSpec::AtSeq(written), true).unwrap(),
        written.0
    );
    assert_eq!(at(&open, &bookmark("good"), true).unwrap(), last_good.0 - 1);
    assert_eq!(
        at(&open, &PointSpec::AtSeq(last_good), true).unwrap(),
        last_good.0
    );
    // Nothing lies before the end of the first copy.
    for exact in [false, true] {
        let refused = open.resolve(&PointSpec::At(inside_first), exact);
        assert!(
            matches!(refused, Err(HistoryError::InsideSpan { last: None })),
            "{refused:?}"
        );
    }
    let refused = open.resolve(&bookmark("too early"), false);
    assert!(matches!(
        refused,
        Err(HistoryError::InsideSpan { last: None })
    ));
    assert!(matches!(
        open.resolve(&bookmark("none"), false),
        Err(HistoryError::NoBookmark(_))
    ));
    let timeline = open.timeline().unwrap();
    assert_eq!(
        timeline.oldest,
        Some(Point {
            seq: copied,
            time: copied_at
        })
    );
    let newest = Point {
        seq: last_good,
        time: last_good_at,
    };
    assert_eq!(timeline.newest, Some(newest));
    assert_eq!(
        timeline.last_record.map(|point| point.seq),
        Some(recorder.seq)
    );
    let exact: Vec<bool> = timeline
        .bookmarks
        .iter()
        .map(|bookmark| bookmark.exact)
        .collect();
    assert_eq!(exact, [false, true, false]);
    assert_eq!(timeline.spans.len(), 2);
    assert_eq!(timeline.spans[0].first.seq, Seq(0));
    assert_eq!(
        (timeline.spans[1].first.seq, timeline.spans[1].last),
        (Seq(begun.0 - 2), None),
        "from the first VOLUME record on"
    );
    assert_eq!(timeline.incarnations.len(), 2);

    let (ended, _) = recorder.event(RecordBody::SpanEnd);
    recorder.close();
    let closed = history(&recorder);
    assert_eq!(at(&closed, &spec_newest, true).unwrap(), ended.0);
    assert_eq!(
        at(&closed, &PointSpec::At(resynced_at), false).unwrap(),
        last_good.0
    );
    assert_eq!(
        at(&closed, &PointSpec::AtSeq(resynced), false).unwrap(),
        last_good.0
    );
}

#[test]
fn a_gap_hides_everything_until_what_was_missed_is_copied() {
    let mut recorder = recorder(100);
    let (good, good_at) = recorder.write(0, 0, &[1], false);
    let first_time = TimeUs(good_at.0 + 10);
    recorder.time.0 += 5000;
    recorder.incarnation(&[SIZE, SIZE]);
    let gap = RecordBody::Gap {
        cause: Cause::SpoolFull,
        first_seq: Seq(good.0 + 1),
        end_seq: recorder.seq,
        first_time,
        bytes: 77,
    };
    let (gap_seq, gap_at) = recorder.event(gap);
    recorder.write(0, 1, &[2], false);
    recorder.span_begin(Cause::SpoolFull);
    recorder.write(0, 2, &[3], true);
    let (ended, _) = recorder.event(RecordBody::SpanEnd);
    recorder.close();
    let history = history(&recorder);
    let at = |spec: PointSpec, exact| seq_of(history.resolve(&spec, exact));
    assert_eq!(at(PointSpec::Newest, true).unwrap(), ended.0);
    assert_eq!(
        at(PointSpec::AtSeq(Seq(ended.0 - 1)), false).unwrap(),
        good.0
    );
    assert_eq!(
        at(PointSpec::AtSeq(Seq(gap_seq.0 + 1)), false).unwrap(),
        good.0
    );
    let in_gap = PointSpec::At(TimeUs(first_time.0 + 1));
    assert_eq!(at(in_gap.clone(), false).unwrap(), good.0);
    let refused = history.resolve(&in_gap, true);
    assert!(matches!(refused, Err(HistoryError::InsideSpan { last: Some(p) }) if p.seq == good));
    assert_eq!(at(PointSpec::At(good_at), true).unwrap(), good.0);
    let timeline = history.timeline().unwrap();
    let expected = Gap {
        at: Point {
            seq: gap_seq,
            time: gap_at,
        },
        first_time,
        bytes: 77,
        cause: Cause::SpoolFull as u8,
    };
    assert_eq!(timeline.gaps, [expected]);
}

/// A span that does not open its incarnation leaves every point before it.
#[test]
fn a_span_amid_an_incarnation_begins_with_its_first_record() {
    let mut recorder = recorder(100);
    let (good, _) = recorder.write(0, 0, &[1], false);
    let (begun, _) = recorder.span_begin(Cause::BackingError);
    recorder.write(0, 2, &[3], true);
    recorder.close();
    let history = history(&recorder);
    let newest = seq_of(history.resolve(&PointSpec::Newest, true)).unwrap();
    assert_eq!(newest, good.0);
    let spans = history.timeline().unwrap().spans;
    assert_eq!(spans[0].first.seq, begun);
}

#[test]
fn an_empty_history_and_one_without_data_have_no_point() {
    let directory = memory();
    let empty = History::open(Arc::clone(&directory), GROUP, None).unwrap();
    assert!(matches!(
        empty.resolve(&PointSpec::Newest, false),
        Err(HistoryError::Empty)
    ));
    assert_eq!(empty.timeline().unwrap(), Timeline::default());
    let mut recorder = recorder(10);
    recorder.close();
    let blank = history(&recorder);
    assert!(matches!(
        blank.resolve(&PointSpec::Newest, false),
        Err(HistoryError::Empty)
    ));
    assert_eq!(blank.volumes(recorder.seq).len(), 2);
}

#[test]
fn another_group_is_refused() {
    let mut recorder = recorder(2);
    recorder.write(0, 0, &[1], false);
    recorder.close();
    recorder.settle();
    recorder.journal.seal().unwrap();
    let other = crate::types::GroupId([9; 16]);
    let refused = History::open(Arc::clone(&recorder.directory), other, None);
    assert!(matches!(
        refused,
        Err(HistoryError::Log(crate::log::LogError::ForeignGroup { .. }))
    ));
}

#[test]
fn volumes_have_the_size_they_had_at_the_point() {
    let mut recorder = recorder(3);
    let (old, _) = recorder.write(0, 0, &[1], false);
    let name = "volume0".to_owned();
    let (grown, _) = recorder.event(RecordBody::Volume {
        volume: VolumeIndex(0),
        size: 2 * SIZE,
        name,
    });
    recorder.write(0, BLOCKS, &[2], false);
    recorder.close();
    let history = history(&recorder);
    let size = |seq| history.volumes(seq)[0].2;
    assert_eq!((size(old), size(grown)), (SIZE, 2 * SIZE));
    assert_eq!(history.volumes(Seq(0)), []);
}

#[test]
fn records_of_a_range_of_time_are_listed() {
    let mut recorder = recorder(7);
    for round in 0..60u32 {
        recorder.write(0, u64::from(round), &[round + 1], false);
        if round % 4 == 0 {
            recorder.close();
        }
    }
    recorder.close();
    let history = history(&recorder);
    let changes = &recorder.model.changes;
    let list = |from: TimeUs, to: TimeUs, limit: usize| {
        let mut seqs = Vec::new();
        let mut each = |record: &crate::format::record::Record| {
            seqs.push(record.seq);
            seqs.len() < limit
        };
        history.records(from, to, &mut each).unwrap();
        seqs
    };
    let expected: Vec<Seq> = changes[10..=40].iter().map(|change| change.seq).collect();
    assert_eq!(
        list(changes[10].time, changes[40].time, usize::MAX),
        expected
    );
    assert_eq!(list(changes[10].time, changes[40].time, 5), expected[..5]);
    let just_behind = TimeUs(changes[20].time.0 + 1);
    assert_eq!(list(just_behind, TimeUs(u64::MAX), 1), [changes[21].seq]);
    assert_eq!(list(TimeUs(0), TimeUs(10), usize::MAX), []);
    assert_eq!(
        list(TimeUs(recorder.time.0 + 1), TimeUs(u64::MAX), usize::MAX),
        []
    );
}

#[test]
fn a_damaged_run_is_replaced_by_the_segment_and_built_anew() {
    let directory = MemoryDirectory::new();
    let shared: Arc<dyn Directory> = Arc::new(directory.clone());
    let mut recorder = Recorder::new(shared, Suite::Aes256Gcm, options(5));
    recorder.incarnation(&[SIZE]);
    for round in 0..11u32 {
        recorder.write(0, u64::from(round), &[round + 1], false);
        recorder.close();
    }
    recorder.settle();
    let name = recorder.files(".run")[0].clone();
    let whole = directory.content(&name).unwrap();
    let good = expected_versions(&recorder, 0, BLOCKS, recorder.seq);
    // The header, the tail.
    for place in [40, whole.len() - 20] {
        let mut bytes = whole.clone();
        bytes[place] ^= 1;
        directory.place(&name, &bytes);
        let history = history(&recorder);
        assert_eq!(history.findings().len(), 1, "{place}");
        assert_eq!(versions(&history, 0, BLOCKS, recorder.seq), good);
    }
    // A page is read when it is needed, and then located.
    let mut bytes = whole.clone();
    bytes[4096 + 30] ^= 1;
    directory.place(&name, &bytes);
    let paged = history(&recorder);
    let found = paged.lookup(VolumeIndex(0), BlockIndex(0), recorder.seq);
    let Err(HistoryError::Log(crate::log::LogError::Damaged {
        segment, offset, ..
    })) = found
    else {
        panic!("{found:?}");
    };
    assert_eq!((segment, offset), (name.clone(), 4096));
    // A truncated one is not used; the journal builds it anew.
    directory.place(&name, &whole[..whole.len() - 1]);
    let Recorder { journal, .. } = recorder;
    drop(journal);
    let (journal, _) = Journal::open_with(Arc::new(directory.clone()), GROUP, options(5)).unwrap();
    assert!(journal.wait_indexed(std::time::Duration::from_secs(20)));
    assert_eq!(directory.content(&name).unwrap(), whole);
}

#[test]
fn a_crash_while_runs_are_written_leaves_what_can_be_indexed_again() {
    let directory = MemoryDirectory::new();
    let shared: Arc<dyn Directory> = Arc::new(directory.clone());
    let mut recorder = Recorder::new(shared, Suite::Aes256Gcm, options(3));
    recorder.incarnation(&[SIZE]);
    for round in 0..30u32 {
        recorder.write(0, u64::from(round % 9), &[round + 1, round + 2], false);
        recorder.close();
    }
    recorder.journal.seal().unwrap();
    recorder.settle();
    let expected = expected_versions(&recorder, 0, BLOCKS, recorder.seq);
    let bare = directory.fork().crash(Loss::Nothing);
    for name in recorder.files(".run") {
        bare.remove(&name).unwrap();
    }
    bare.sync().unwrap();
    let wait = std::time::Duration::from_secs(20);
    for operation in 1.. {
        let memory = bare.fork();
        let faulty = Arc::new(FaultyDirectory::new(Arc::new(memory.clone())));
        faulty.fail_change(operation, Fault::Stop);
        let opened = Journal::open_with(Arc::<FaultyDirectory>::clone(&faulty), GROUP, options(3));
        if let Ok((journal, _)) = &opened {
            while !journal.wait_indexed(std::time::Duration::from_millis(5)) {
                if journal.index_error().is_some() {
                    break;
                }
            }
        }
        let over = !faulty.stopped();
        drop(opened);
        let losses = [Loss::Nothing, Loss::Everything, Loss::Random(operation)];
        for loss in losses {
            let after: Arc<dyn Directory> = Arc::new(memory.fork().crash(loss));
            let before_repair = History::open(Arc::clone(&after), GROUP, None).unwrap();
            let found = versions(&before_repair, 0, BLOCKS, recorder.seq);
            assert_eq!(found, expected, "operation {operation}, {loss:?}");
            let (journal, _) = Journal::open_with(Arc::clone(&after), GROUP, options(3)).unwrap();
            assert!(journal.wait_indexed(wait), "{:?}", journal.index_error());
            let repaired = History::open(Arc::clone(&after), GROUP, None).unwrap();
            assert_eq!(repaired.findings(), &[] as &[String]);
            assert!(repaired.run_count() < 7, "{} runs", repaired.run_count());
            assert_eq!(versions(&repaired, 0, BLOCKS, recorder.seq), expected);
            let left = after.list().unwrap();
            assert!(!left.iter().any(|name| name.contains(".tmp")), "{left:?}");
        }
        if over {
            assert!(operation > 30, "{operation}");
            return;
        }
    }
}

fn is_run(name: &str) -> bool {
    name.strip_suffix(".run").is_some()
}

#[test]
fn an_indexer_beside_the_writer_builds_what_the_journal_builds() {
    let directory = MemoryDirectory::new();
    let shared: Arc<dyn Directory> = Arc::new(directory.clone());
    let mut recorder = Recorder::new(shared, Suite::Aes256Gcm, options(3));
    recorder.incarnation(&[SIZE]);
    let bare = MemoryDirectory::new();
    let indexer = Indexer::new(Arc::new(bare.clone()), GROUP);
    assert_eq!(indexer.index_sealed().unwrap(), 0);
    let mut sealed = 0;
    for round in 0..30u32 {
        recorder.write(0, u64::from(round % 9), &[round + 1, round + 2], false);
        recorder.close();
        if round % 7 != 6 {
            continue;
        }
        // What another process would find: the log as it is now, and the runs made so far.
        recorder.journal.seal().unwrap();
        recorder.settle();
        for name in directory.list().unwrap() {
            if !is_run(&name) {
                bare.place(&name, &directory.content(&name).unwrap());
            }
        }
        let before = sealed;
        sealed = indexer.index_sealed().unwrap();
        assert!(sealed > before, "{sealed} segments after round {round}");
        let history = History::open(Arc::new(bare.clone()), GROUP, None).unwrap();
        let expected = expected_versions(&recorder, 0, BLOCKS, recorder.seq);
        assert_eq!(versions(&history, 0, BLOCKS, recorder.seq), expected);
        assert_eq!(history.findings(), &[] as &[String]);
        assert!(history.run_count() <= 6, "{} runs", history.run_count());
    }
    let listed = bare.list().unwrap();
    let runs = listed.iter().filter(|name| is_run(name));
    assert!(runs.count() < sealed, "runs were merged: {listed:?}");
    indexer.stop();
    let name = listed.iter().find(|name| is_run(name)).unwrap();
    bare.remove(name).unwrap();
    assert!(indexer.index_sealed().is_err(), "a stopped indexer builds");
}

#[test]
fn damage_in_a_table_without_a_run_is_located_and_older_points_open() {
    let directory = MemoryDirectory::new();
    let shared: Arc<dyn Directory> = Arc::new(directory.clone());
    let mut recorder = Recorder::new(shared, Suite::Aes256Gcm, options(1000));
    recorder.incarnation(&[SIZE]);
    let mut ends = Vec::new();
    for round in 0..4u32 {
        recorder.write(0, u64::from(round), &[round + 1], false);
        recorder.close();
        ends.push((recorder.seq, recorder.journal.end().committed_len));
    }
    let name = recorder.files(".open")[0].clone();
    let mut bytes = directory.content(&name).unwrap();
    // The record table of the third frame.
    let at = ends[1].1 as usize + 256;
    bytes[at] ^= 0x40;
    directory.place(&name, &bytes);
    let history = history(&recorder);
    let older = history.resolve(&PointSpec::AtSeq(ends[1].0), true).unwrap();
    assert_eq!(older.seq, ends[1].0);
    for spec in [
        PointSpec::Newest,
        PointSpec::AtSeq(ends[2].0),
        PointSpec::At(recorder.time),
    ] {
        let refused = history.resolve(&spec, false);
        let Err(HistoryError::Log(crate::log::LogError::Damaged {
            segment, offset, ..
        })) = refused
        else {
            panic!("{refused:?}");
        };
        assert_eq!((segment, offset), (name.clone(), ends[1].1));
    }
    // Without a writer that vouches for the bytes it is a torn tail, and history just ends there.
    let torn = History::open(Arc::new(directory), GROUP, None).unwrap();
    assert_eq!(
        torn.resolve(&PointSpec::Newest, true).unwrap().seq,
        ends[1].0
    );
    assert_eq!(torn.findings().len(), 1);
}

/// A copy in which no manifest names the segments yet, and no run indexes them.
fn without_manifest(directory: &MemoryDirectory, recorder: &Recorder) -> MemoryDirectory {
    let bare = directory.fork();
    bare.remove("MANIFEST").unwrap();
    for run in recorder.files(".run") {
        bare.remove(&run).unwrap();
    }
    bare
}

#[test]
fn a_segment_that_rolled_over_since_the_end_was_published_has_no_hole() {
    let directory = MemoryDirectory::new();
    let shared: Arc<dyn Directory> = Arc::new(directory.clone());
    let mut recorder = Recorder::new(shared, Suite::Aes256Gcm, options(1000));
    recorder.incarnation(&[SIZE, SIZE]);
    recorder.write(0, 1, &[11], false);
    recorder.close();
    let published = recorder.journal.end();
    let (behind, _) = recorder.write(0, 2, &[12], false);
    recorder.close();
    recorder.journal.seal().unwrap();
    recorder.write(0, 3, &[13], false);
    recorder.close();
    recorder.settle();
    // The segment waits to be sealed: no manifest names it yet.
    let bare = without_manifest(&directory, &recorder);
    let history = History::open(Arc::new(bare), GROUP, Some(&published)).unwrap();
    let newest = history.resolve(&PointSpec::Newest, false).unwrap().seq;
    assert!(newest > behind);
    assert_eq!(
        versions(&history, 0, BLOCKS, newest),
        expected_versions(&recorder, 0, BLOCKS, newest)
    );
}

#[test]
fn damage_amid_segments_that_nobody_vouches_for_is_no_torn_tail() {
    let directory = MemoryDirectory::new();
    let shared: Arc<dyn Directory> = Arc::new(directory.clone());
    let mut recorder = Recorder::new(shared, Suite::Aes256Gcm, options(4));
    recorder.incarnation(&[SIZE]);
    let mut seqs = Vec::new();
    for round in 0..12u32 {
        seqs.push(recorder.write(0, u64::from(round), &[round + 1], false).0);
        recorder.close();
    }
    recorder.settle();
    // Sealed a moment ago: the manifest does not name them yet.
    let bare = without_manifest(&directory, &recorder);
    let open = |directory: &MemoryDirectory| {
        History::open(Arc::new(directory.clone()), GROUP, None).unwrap()
    };
    let newest = open(&bare).resolve(&PointSpec::Newest, true).unwrap();
    assert_eq!(newest.seq, recorder.seq);
    let segments = recorder.files(".seg");
    assert!(segments.len() > 2, "{segments:?}");
    let mut bytes = bare.content(&segments[1]).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    bare.place(&segments[1], &bytes);
    let history = open(&bare);
    let refused = history.resolve(&PointSpec::Newest, false);
    let Err(HistoryError::Log(crate::log::LogError::Damaged { segment, .. })) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(segment, segments[1]);
    let older = history.resolve(&PointSpec::AtSeq(seqs[2]), true).unwrap();
    assert_eq!(older.seq, seqs[2]);
}

#[test]
fn differences_are_shown() {
    assert_eq!(differences(&[1, 2], &[1, 3]).len(), 1);
}
