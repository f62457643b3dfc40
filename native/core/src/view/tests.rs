//! Views against a plain model, byte for byte; the overlay through crashes; damage.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::constants::CELL_SIZE;
use crate::crypto::Suite;
use crate::device::{Allocation, DeviceError, RequestFlags};
use crate::index::PointSpec;
use crate::index::testing::{GROUP, Recorder, content, differences, key, options};
use crate::storage::{Fault, FaultyDirectory, Loss, MemoryDirectory};
use crate::types::{BlockIndex, Seq, TimeUs};

const NONE: RequestFlags = RequestFlags {
    fua: false,
    nowait: false,
    no_hole: false,
};
const BLOCK: usize = BLOCK_SIZE;
/// The last block is partial.
const SIZE: u64 = 80 * 4096 + 1024;
const BLOCKS: u64 = 81;

fn bytes_of(tags: &[u32], size: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = tags.iter().flat_map(|tag| content(*tag)).collect();
    bytes.truncate(size as usize);
    bytes
}

fn history(recorder: &Recorder) -> Arc<History> {
    let end = recorder.journal.end();
    Arc::new(History::open(Arc::clone(&recorder.directory), GROUP, Some(&end)).unwrap())
}

fn view_at(history: &Arc<History>, seq: Seq, overlay: Option<Arc<dyn Directory>>) -> View {
    let point = Point {
        seq,
        time: TimeUs(0),
    };
    open_view(history, point, overlay, u64::MAX).unwrap()
}

fn open_view(
    history: &Arc<History>,
    point: Point,
    overlay: Option<Arc<dyn Directory>>,
    limit: u64,
) -> Result<View, HistoryError> {
    let directory = Arc::clone(history.directory());
    View::open(
        Arc::clone(history),
        directory,
        key(),
        point,
        overlay,
        limit,
        4 << 20,
    )
}

fn read_all(device: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0xee; device.info().size as usize];
    device.read(&mut bytes, 0, NONE).unwrap();
    bytes
}

fn assert_shows(view: &View, recorder: &Recorder, volume: u16, seq: Seq) {
    let device = view.device(VolumeIndex(volume)).unwrap();
    let expected = bytes_of(
        &recorder.model.state(VolumeIndex(volume), BLOCKS, seq),
        SIZE,
    );
    let found = read_all(device.as_ref());
    if found != expected {
        let first = found
            .iter()
            .zip(&expected)
            .position(|(a, b)| a != b)
            .unwrap();
        panic!(
            "volume {volume} at {seq:?} differs from byte {first}, block {}",
            first / BLOCK
        );
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write {
        volume: u16,
        start: u64,
        tags: Vec<u32>,
        resync: bool,
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
    let volume = || 0..2u16;
    let write = (
        volume(),
        0..BLOCKS,
        prop::collection::vec(0..9u32, 1..40),
        any::<bool>(),
    );
    let write = write.prop_map(|(volume, start, mut tags, resync)| {
        tags.truncate((BLOCKS - start) as usize);
        Step::Write {
            volume,
            start,
            tags,
            resync,
        }
    });
    let clear = (volume(), 0..BLOCKS, 1..BLOCKS, any::<bool>()).prop_map(
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
    recorder.incarnation(&[SIZE, SIZE]);
    for step in steps {
        match step {
            Step::Write {
                volume,
                start,
                tags,
                resync,
            } => {
                recorder.write(*volume, *start, tags, *resync);
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
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_view_equals_the_model_byte_for_byte_at_any_point(
        steps in prop::collection::vec(step(), 1..80),
        segment_records in 1..20u64,
        aes in any::<bool>(),
        points in prop::collection::vec(any::<prop::sample::Index>(), 3),
    ) {
        let suite = if aes { Suite::Aes256Gcm } else { Suite::Sm4Gcm };
        let directory: Arc<dyn Directory> = Arc::new(MemoryDirectory::new());
        let mut recorder = Recorder::new(directory, suite, options(segment_records));
        play(&mut recorder, &steps);
        let history = history(&recorder);
        let last = recorder.seq;
        let mut asked = vec![last];
        if !recorder.model.changes.is_empty() {
            // A write, and the state just before it, by their times.
            for point in &points {
                let change = point.get(&recorder.model.changes);
                let spec = PointSpec::At(change.time);
                let at = history.resolve(&spec, true).unwrap();
                prop_assert_eq!(at.seq, change.seq);
                asked.extend([change.seq, Seq(change.seq.0 - 1)]);
            }
        }
        for seq in asked {
            let view = view_at(&history, seq, None);
            for volume in 0..2 {
                assert_shows(&view, &recorder, volume, seq);
            }
            prop_assert_eq!(view.findings(), vec![]);
        }
    }

    #[test]
    fn an_overlay_behaves_like_a_disk(
        steps in prop::collection::vec(step(), 1..20),
        requests in prop::collection::vec(request(), 1..80),
    ) {
        let directory: Arc<dyn Directory> = Arc::new(MemoryDirectory::new());
        let mut recorder = Recorder::new(directory, Suite::Aes256Gcm, options(6));
        play(&mut recorder, &steps);
        let history = history(&recorder);
        let overlay: Arc<dyn Directory> = Arc::new(MemoryDirectory::new());
        let mut view = view_at(&history, recorder.seq, Some(Arc::clone(&overlay)));
        let mut disk = bytes_of(&recorder.model.state(VolumeIndex(0), BLOCKS, recorder.seq), SIZE);
        for request in &requests {
            let device = view.device(VolumeIndex(0)).unwrap();
            apply(request, device.as_ref(), &mut disk);
            if let Request::Reopen = request {
                device.flush(NONE).unwrap();
                drop((device, view));
                view = view_at(&history, recorder.seq, Some(Arc::clone(&overlay)));
            }
            let device = view.device(VolumeIndex(0)).unwrap();
            prop_assert!(read_all(device.as_ref()) == disk, "after {:?}", request);
            prop_assert_eq!(allocated_zeroes(device.as_ref(), &disk), Ok(()));
        }
        // History and the other volume are what they were.
        assert_shows(&view_at(&history, recorder.seq, None), &recorder, 0, recorder.seq);
        assert_shows(&view, &recorder, 1, recorder.seq);
    }
}

#[derive(Debug, Clone)]
enum Request {
    Write {
        offset: u64,
        length: u64,
        byte: u8,
        fua: bool,
    },
    Zero {
        offset: u64,
        length: u64,
        no_hole: bool,
    },
    Trim {
        offset: u64,
        length: u64,
    },
    Flush,
    Reopen,
}

fn request() -> impl Strategy<Value = Request> {
    let range = || {
        let aligned =
            (0..BLOCKS, 1..8u64).prop_map(|(start, blocks)| (start * 4096, blocks * 4096));
        let any = (0..SIZE, 1..20_000u64);
        let sector = (0..SIZE / 512, 1..9u64).prop_map(|(at, count)| (at * 512, count * 512));
        prop_oneof![aligned, any, sector]
            .prop_map(|(offset, length)| (offset, length.min(SIZE - offset.min(SIZE))))
    };
    prop_oneof![
        6 => (range(), 1..255u8, any::<bool>()).prop_map(|((offset, length), byte, fua)| {
            Request::Write { offset, length, byte, fua }
        }),
        2 => (range(), any::<bool>()).prop_map(|((offset, length), no_hole)| {
            Request::Zero { offset, length, no_hole }
        }),
        2 => range().prop_map(|(offset, length)| Request::Trim { offset, length }),
        1 => Just(Request::Flush),
        1 => Just(Request::Reopen),
    ]
}

fn apply(request: &Request, device: &dyn BlockDevice, disk: &mut [u8]) {
    let mut fill = |offset: u64, length: u64, byte: u8| {
        disk[offset as usize..(offset + length) as usize].fill(byte);
    };
    match *request {
        Request::Write {
            offset,
            length,
            byte,
            fua,
        } => {
            let data = vec![byte; length as usize];
            device
                .write(&data, offset, RequestFlags { fua, ..NONE })
                .unwrap();
            fill(offset, length, byte);
        }
        Request::Zero {
            offset,
            length,
            no_hole,
        } => {
            device
                .zero(offset, length, RequestFlags { no_hole, ..NONE })
                .unwrap();
            fill(offset, length, 0);
        }
        Request::Trim { offset, length } => {
            device.trim(offset, length, NONE).unwrap();
            fill(offset, length, 0);
        }
        Request::Flush => device.flush(NONE).unwrap(),
        Request::Reopen => {}
    }
}

/// What is called zero must be zero, and the runs must cover the device.
fn allocated_zeroes(device: &dyn BlockDevice, disk: &[u8]) -> Result<(), String> {
    let mut at = 0;
    let mut wrong = None;
    let mut each = |run: Allocation| {
        let bytes = &disk[at..at + run.length as usize];
        if run.zero && bytes.iter().any(|byte| *byte != 0) {
            wrong = Some(format!("{} bytes at {at} are called zero", run.length));
        }
        at += run.length as usize;
        true
    };
    device
        .allocation(0, disk.len() as u64, &mut each)
        .map_err(|error| error.to_string())?;
    if at != disk.len() {
        return Err(format!("runs end at {at}"));
    }
    wrong.map_or(Ok(()), Err)
}

fn small_history() -> (Recorder, Arc<History>) {
    let directory: Arc<dyn Directory> = Arc::new(MemoryDirectory::new());
    let mut recorder = Recorder::new(directory, Suite::Aes256Gcm, options(100));
    recorder.incarnation(&[SIZE, SIZE]);
    let tags: Vec<u32> = (1..=40).collect();
    recorder.write(0, 0, &tags, false);
    recorder.close();
    let history = history(&recorder);
    (recorder, history)
}

#[test]
fn requests_outside_or_against_the_kind_of_device_are_refused() {
    let (recorder, history) = small_history();
    let view = view_at(&history, recorder.seq, None);
    let device = view.device(VolumeIndex(0)).unwrap();
    assert!(device.info().read_only);
    assert_eq!(device.write(&[1], 0, NONE), Err(DeviceError::ReadOnly));
    assert_eq!(device.trim(0, 1, NONE), Err(DeviceError::ReadOnly));
    assert_eq!(device.zero(0, 1, NONE), Err(DeviceError::ReadOnly));
    assert_eq!(device.flush(NONE), Ok(()));
    assert_eq!(
        device.read(&mut [0; 2], SIZE - 1, NONE),
        Err(DeviceError::OutOfRange)
    );
    assert_eq!(
        device.read(&mut [0; 2], u64::MAX, NONE),
        Err(DeviceError::OutOfRange)
    );
    assert!(matches!(
        view.device(VolumeIndex(9)),
        Err(HistoryError::NoVolume(_))
    ));
    let overlay: Arc<dyn Directory> = Arc::new(MemoryDirectory::new());
    let view = view_at(&history, recorder.seq, Some(overlay));
    let device = view.device(VolumeIndex(0)).unwrap();
    for refused in [
        device.write(&[1, 2], SIZE - 1, NONE),
        device.trim(1, SIZE, NONE),
        device.zero(u64::MAX, 2, NONE),
    ] {
        assert_eq!(refused, Err(DeviceError::OutOfRange));
    }
}

#[test]
fn what_may_wait_is_not_done_without_leave_and_a_cached_read_is() {
    let (recorder, history) = small_history();
    let view = view_at(&history, recorder.seq, None);
    let device = view.device(VolumeIndex(0)).unwrap();
    let nowait = RequestFlags {
        nowait: true,
        ..NONE
    };
    let mut buffer = vec![0u8; BLOCK];
    assert_eq!(
        device.read(&mut buffer, 4096, nowait),
        Err(DeviceError::WouldBlock)
    );
    device.read(&mut buffer, 4096, NONE).unwrap();
    buffer.fill(0);
    assert_eq!(device.read(&mut buffer, 4096, nowait), Ok(()));
    assert_eq!(buffer, content(2));
}

#[test]
fn several_views_and_many_readers_go_on_side_by_side() {
    let (mut recorder, old) = small_history();
    let then = recorder.seq;
    recorder.write(0, 5, &[77; 20], false);
    recorder.close();
    let new = history(&recorder);
    let overlay: Arc<dyn Directory> = Arc::new(MemoryDirectory::new());
    let views = [
        (view_at(&old, then, None), then),
        (view_at(&new, then, None), then),
        (view_at(&new, recorder.seq, None), recorder.seq),
        (view_at(&new, recorder.seq, Some(overlay)), recorder.seq),
    ];
    std::thread::scope(|scope| {
        for (view, seq) in &views {
            for _ in 0..3 {
                scope.spawn(|| assert_shows(view, &recorder, 0, *seq));
            }
        }
    });
    // Every cell was opened once, however many asked for it.
    let cells = (40 * BLOCK).div_ceil(CELL_SIZE) as u64;
    assert_eq!(views[0].0.cells_opened(), cells);
}

#[test]
fn a_full_overlay_refuses_new_blocks_only() {
    let (recorder, history) = small_history();
    let overlay: Arc<dyn Directory> = Arc::new(MemoryDirectory::new());
    let point = Point {
        seq: recorder.seq,
        time: TimeUs(0),
    };
    let view = open_view(&history, point, Some(overlay), 3 * BLOCK as u64).unwrap();
    let device = view.device(VolumeIndex(0)).unwrap();
    let other = view.device(VolumeIndex(1)).unwrap();
    device.write(&[1; 2 * BLOCK], 0, NONE).unwrap();
    assert_eq!(view.overlay_bytes(), 2 * BLOCK as u64);
    // The limit is the view's, not a volume's.
    assert_eq!(
        other.write(&[1; 2 * BLOCK], 0, NONE),
        Err(DeviceError::NoSpace)
    );
    other.write(&[1; BLOCK], 0, NONE).unwrap();
    assert_eq!(
        device.write(&[2; 100], 5 * 4096, NONE),
        Err(DeviceError::NoSpace)
    );
    // What is there can be changed, and given back.
    device.write(&[3; BLOCK], 4096, NONE).unwrap();
    device.trim(0, 4096, NONE).unwrap();
    assert_eq!(view.overlay_bytes(), 2 * BLOCK as u64);
    device.write(&[4; BLOCK], 6 * 4096, NONE).unwrap();
    let mut buffer = vec![0u8; BLOCK];
    device.read(&mut buffer, 5 * 4096, NONE).unwrap();
    assert_eq!(buffer, content(6));
}

#[test]
fn an_overlay_of_another_point_or_of_an_open_view_is_refused() {
    let (mut recorder, old) = small_history();
    let then = recorder.seq;
    let overlay: Arc<dyn Directory> = Arc::new(MemoryDirectory::new());
    let first = view_at(&old, then, Some(Arc::clone(&overlay)));
    let point = Point {
        seq: then,
        time: TimeUs(0),
    };
    let second = open_view(&old, point, Some(Arc::clone(&overlay)), u64::MAX);
    assert!(matches!(
        second,
        Err(HistoryError::Overlay {
            source: LogError::Locked,
            ..
        })
    ));
    drop(first);
    recorder.write(0, 5, &[77], false);
    recorder.close();
    let new = history(&recorder);
    let point = Point {
        seq: recorder.seq,
        time: TimeUs(0),
    };
    let refused = open_view(&new, point, Some(Arc::clone(&overlay)), u64::MAX);
    let Err(HistoryError::Overlay {
        file,
        source: LogError::Format(error),
    }) = refused
    else {
        panic!("{refused:?}");
    };
    assert_eq!(file, "volume-0000.map");
    assert!(
        matches!(error, FormatError::Field { field: "seq", .. }),
        "{error}"
    );
    view_at(&new, then, Some(overlay));
}

/// One block's content over time, as flushes see it.
#[derive(Clone)]
struct Expectation {
    /// Contents that may be found: the flushed one and everything written since.
    allowed: Vec<Vec<Vec<u8>>>,
}

impl Expectation {
    fn change(&mut self, block: usize, content: Vec<u8>) {
        self.allowed[block].push(content);
    }

    fn flushed(&mut self) {
        for block in &mut self.allowed {
            let newest = block.pop().unwrap();
            *block = vec![newest];
        }
    }
}

/// Requests of a crash test; stops at the first failure. Returns what may be found afterwards.
fn run_until_failure(view: &View, base: &[u8]) -> Expectation {
    let blocks = base
        .chunks(BLOCK)
        .map(|block| vec![block.to_vec()])
        .collect();
    let mut expected = Expectation { allowed: blocks };
    let device = view.device(VolumeIndex(0)).unwrap();
    for round in 1..12u8 {
        let at = usize::from(round) * 3 % 60;
        // Before the attempt: a request that fails may have been done, in part.
        expected.change(at, vec![round; BLOCK]);
        expected.change(at + 1, vec![round; BLOCK]);
        if device
            .write(&vec![round; 2 * BLOCK], (at * BLOCK) as u64, NONE)
            .is_err()
        {
            return expected;
        }
        if round % 3 == 0 {
            let cleared = usize::from(round) * 3 % 60 + 1;
            expected.change(cleared, vec![0; BLOCK]);
            if device
                .trim((cleared * BLOCK) as u64, BLOCK as u64, NONE)
                .is_err()
            {
                return expected;
            }
        }
        if round % 2 == 0 {
            let mut part = expected.allowed[70].last().unwrap().clone();
            part[100..300].fill(round);
            expected.change(70, part);
            if device
                .write(&[round; 200], 70 * BLOCK as u64 + 100, NONE)
                .is_err()
            {
                return expected;
            }
            if device.flush(NONE).is_err() {
                return expected;
            }
            expected.flushed();
        }
    }
    expected
}

#[test]
fn nothing_that_was_flushed_is_lost_whatever_the_moment_of_the_crash() {
    let (recorder, history) = small_history();
    let base = bytes_of(
        &recorder.model.state(VolumeIndex(0), BLOCKS, recorder.seq),
        SIZE,
    );
    let point = Point {
        seq: recorder.seq,
        time: TimeUs(0),
    };
    let losses = [
        Loss::Nothing,
        Loss::Everything,
        Loss::Random(1),
        Loss::Random(2),
        Loss::Random(3),
    ];
    let counted = Arc::new(FaultyDirectory::new(Arc::new(MemoryDirectory::new())));
    let whole = open_view(&history, point, Some(counted.clone()), u64::MAX).unwrap();
    run_until_failure(&whole, &base);
    let operations = counted.changes();
    assert!(operations > 40, "{operations}");
    for operation in 1..=operations + 1 {
        for loss in losses {
            let context = format!("operation {operation}, {loss:?}");
            let memory = MemoryDirectory::new();
            let faulty = FaultyDirectory::new(Arc::new(memory.clone()));
            faulty.fail_change(operation, Fault::Stop);
            let opened = open_view(&history, point, Some(Arc::new(faulty)), u64::MAX);
            let unchanged = || {
                base.chunks(BLOCK)
                    .map(|block| vec![block.to_vec()])
                    .collect()
            };
            let expected = match &opened {
                Ok(view) => run_until_failure(view, &base),
                Err(_) => Expectation {
                    allowed: unchanged(),
                },
            };
            let after: Arc<dyn Directory> = Arc::new(memory.crash(loss));
            drop(opened);
            let view = open_view(&history, point, Some(after), u64::MAX)
                .unwrap_or_else(|error| panic!("{context}: {error}"));
            let found = read_all(view.device(VolumeIndex(0)).unwrap().as_ref());
            for (block, found) in found.chunks(BLOCK).enumerate() {
                let allowed = &expected.allowed[block];
                assert!(
                    is_among(found, allowed),
                    "{context}: block {block} was never that"
                );
            }
        }
    }
}

/// Writes that were cut or reordered leave each byte as one of the allowed contents has it. Where a
/// flush was answered only one content is allowed.
fn is_among(found: &[u8], allowed: &[Vec<u8>]) -> bool {
    found
        .iter()
        .enumerate()
        .all(|(at, byte)| allowed.iter().any(|content| content[at] == *byte))
}

#[test]
fn an_overlay_whose_sync_failed_accepts_nothing_more() {
    let (recorder, history) = small_history();
    let memory = MemoryDirectory::new();
    let faulty = Arc::new(FaultyDirectory::new(Arc::new(memory)));
    let overlay: Arc<dyn Directory> = Arc::<FaultyDirectory>::clone(&faulty);
    let view = view_at(&history, recorder.seq, Some(overlay));
    let device = view.device(VolumeIndex(0)).unwrap();
    device.write(&[1; BLOCK], 0, NONE).unwrap();
    faulty.fail_change(1, Fault::Error);
    let eio = Err(DeviceError::Io(libc::EIO));
    assert_eq!(device.flush(NONE), eio);
    assert_eq!(device.flush(NONE), eio);
    assert_eq!(device.write(&[1; BLOCK], 0, NONE), eio);
}

#[test]
fn damage_is_an_error_with_its_place_and_the_rest_is_readable() {
    let directory = MemoryDirectory::new();
    let shared: Arc<dyn Directory> = Arc::new(directory.clone());
    let mut recorder = Recorder::new(shared, Suite::Sm4Gcm, options(100));
    recorder.incarnation(&[SIZE]);
    let tags: Vec<u32> = (1..=64).map(|tag| tag * 3).collect();
    recorder.write(0, 0, &tags, false);
    recorder.close();
    let name = recorder.files(".open")[0].clone();
    let mut bytes = directory.content(&name).unwrap();
    // The last byte of the last cell, blocks 48 to 63.
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    directory.place(&name, &bytes);
    let history = history(&recorder);
    let view = view_at(&history, recorder.seq, None);
    let device = view.device(VolumeIndex(0)).unwrap();
    let mut buffer = vec![0u8; BLOCK];
    for block in [50u64, 63] {
        assert_eq!(
            device.read(&mut buffer, block * 4096, NONE),
            Err(DeviceError::Io(libc::EIO))
        );
    }
    device.read(&mut buffer, 47 * 4096, NONE).unwrap();
    assert_eq!(buffer, content(48 * 3));
    let findings = view.findings();
    assert_eq!(findings.len(), 2);
    assert_eq!(
        (findings[0].volume, findings[0].block),
        (VolumeIndex(0), BlockIndex(50))
    );
    assert!(findings[0].what.contains(&name), "{findings:?}");
    // A wrong key is found out at the first read, too.
    let point = Point {
        seq: recorder.seq,
        time: TimeUs(0),
    };
    let wrong = View::open(
        Arc::clone(&history),
        Arc::clone(history.directory()),
        GroupKey([9; 32]),
        point,
        None,
        0,
        1 << 20,
    )
    .unwrap();
    let read = wrong
        .device(VolumeIndex(0))
        .unwrap()
        .read(&mut buffer, 0, NONE);
    assert_eq!(read, Err(DeviceError::Io(libc::EIO)));
}

#[test]
fn a_damaged_map_is_located_and_a_torn_slot_is_not_damage() {
    let (recorder, history) = small_history();
    let memory = MemoryDirectory::new();
    let overlay: Arc<dyn Directory> = Arc::new(memory.clone());
    let point = Point {
        seq: recorder.seq,
        time: TimeUs(0),
    };
    let view = view_at(&history, recorder.seq, Some(Arc::clone(&overlay)));
    let device = view.device(VolumeIndex(0)).unwrap();
    for round in 1..=2u8 {
        device
            .write(&[round; BLOCK], u64::from(round) * 4096, NONE)
            .unwrap();
        device.flush(NONE).unwrap();
    }
    drop((device, view));
    let whole = memory.content("volume-0000.map").unwrap();
    let slots = presence::SLOTS_OFFSET as usize;
    let second = slots + presence::PAIR_LEN as usize / 2;
    // The newest slot, torn: the state of the flush before stands.
    let mut torn = whole.clone();
    torn[second + 256..second + 512].fill(0);
    memory.place("volume-0000.map", &torn);
    let view = view_at(&history, recorder.seq, Some(Arc::clone(&overlay)));
    let found = read_all(view.device(VolumeIndex(0)).unwrap().as_ref());
    assert_eq!(found[BLOCK], 1);
    assert_eq!(found[2 * BLOCK..3 * BLOCK], content(3));
    drop(view);
    // Both: damage, with its place.
    torn[slots + 5] ^= 1;
    memory.place("volume-0000.map", &torn);
    let refused = open_view(&history, point, Some(overlay), u64::MAX);
    let Err(HistoryError::Overlay {
        file,
        source: LogError::Damaged { offset, .. },
    }) = refused
    else {
        panic!("{refused:?}");
    };
    assert_eq!(
        (file.as_str(), offset),
        ("volume-0000.map", presence::SLOTS_OFFSET)
    );
}

#[test]
fn models_differ_where_they_do() {
    assert!(differences(&[1], &[1]).is_empty());
}
