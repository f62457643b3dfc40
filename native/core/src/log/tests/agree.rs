//! A source that was rolled back must see it by the digests that its target names.
#![allow(clippy::cast_possible_truncation)]

use super::basics::memory;
use super::*;
use crate::format::frame::Digest;
use crate::log::testing::FrameMaker;
use crate::types::FrameNo;

fn agrees(directory: &Arc<dyn Directory>, end: &LogEnd, at: &FrameMaker) -> bool {
    agrees_with(directory, end, at, at.prev)
}

fn agrees_with(
    directory: &Arc<dyn Directory>,
    end: &LogEnd,
    at: &FrameMaker,
    digest: Digest,
) -> bool {
    let position = LogPosition {
        incarnation: at.header.incarnation,
        next_frame: FrameNo(at.next_frame),
    };
    let reader = LogReader::open(Arc::clone(directory), GROUP).unwrap();
    reader.agrees(&position, &digest, end).unwrap()
}

/// Appends `count` frames of two blocks; returns what the maker was behind each.
fn write(writer: &mut LogWriter, maker: &mut FrameMaker, count: usize) -> Vec<FrameMaker> {
    writer.begin(&maker.header).unwrap();
    let step = |_| {
        writer.append(&maker.data(2), true).unwrap();
        maker.clone()
    };
    (0..count).map(step).collect()
}

#[test]
fn every_place_of_a_log_agrees_and_another_digest_never() {
    let (_, directory) = memory();
    let (mut writer, _) = open(&directory);
    let mut maker = FrameMaker::new();
    let mut places = write(&mut writer, &mut maker, 7);
    maker = maker.next_incarnation();
    places.extend(write(&mut writer, &mut maker, 3));
    let end = writer.end();
    assert!(writer.manifest().segments.len() > 2, "several segments");
    for place in &places {
        assert!(agrees(&directory, &end, place));
        assert!(!agrees_with(&directory, &end, place, [8; 32]));
    }
}

#[test]
fn trimmed_end_of_an_incarnation_is_known_from_what_follows() {
    let (_, directory) = memory();
    let (mut writer, _) = open(&directory);
    let mut maker = FrameMaker::new();
    let first = write(&mut writer, &mut maker, 6);
    let last = first.last().unwrap().clone();
    maker = maker.next_incarnation();
    write(&mut writer, &mut maker, 6);
    writer.seal().unwrap();
    // Of the first incarnation its last segment stays; then nothing of it.
    let position = |incarnation, next_frame| LogPosition {
        incarnation,
        next_frame: FrameNo(next_frame),
    };
    writer.trim(&position(last.header.incarnation, 4)).unwrap();
    let end = writer.end();
    let oldest = writer.manifest().segments[0].first_frame as usize;
    assert!(oldest > 1, "something was trimmed");
    // The frame before the oldest held: its digest is that frame's `prev`.
    assert!(agrees(&directory, &end, &first[oldest - 1]));
    assert!(!agrees_with(&directory, &end, &first[oldest - 1], [8; 32]));
    // Behind what is held there is nothing to compare.
    assert!(agrees_with(&directory, &end, &first[0], [8; 32]));

    writer.trim(&position(maker.header.incarnation, 1)).unwrap();
    let end = writer.end();
    assert_eq!(writer.manifest().incarnations.len(), 1);
    assert!(agrees(&directory, &end, &last));
    assert!(!agrees_with(&directory, &end, &last, [8; 32]));
    assert!(agrees(&directory, &end, &first[2]), "before the parent");
}

#[test]
fn target_that_is_ahead_of_the_log_does_not_agree() {
    let (_, directory) = memory();
    let (mut writer, _) = open(&directory);
    let mut maker = FrameMaker::new();
    write(&mut writer, &mut maker, 3);
    // The target got more than the writer kept, in this incarnation,
    let mut ahead = maker.clone();
    ahead.data(1);
    assert!(!agrees(&directory, &writer.end(), &ahead));
    // also when the writer has begun another,
    let mut next = maker.next_incarnation();
    write(&mut writer, &mut next, 3);
    assert!(!agrees(&directory, &writer.end(), &ahead));
    // or a whole one that the writer does not know.
    let mut unknown = ahead.next_incarnation().next_incarnation();
    unknown.header.incarnation.0 = [0x77; 16];
    unknown.data(1);
    assert!(!agrees(&directory, &writer.end(), &unknown));
    // Numbers given again, as after a roll-back: the same place, other content.
    let mut other = maker.next_incarnation();
    assert_eq!(other.header.incarnation, next.header.incarnation);
    other.data(1);
    assert!(!agrees(&directory, &writer.end(), &other));
}

#[test]
fn damaged_headers_in_the_way_are_crossed() {
    let (memory, directory) = memory();
    let (mut writer, _) = open_as(
        &directory,
        LogOptions {
            segment_bytes_max: 1 << 20,
            ..INLINE
        },
    )
    .unwrap();
    let mut maker = FrameMaker::new();
    writer.begin(&maker.header).unwrap();
    let mut places = Vec::new();
    for _ in 0..5 {
        let offset = writer.end().committed_len.max(256);
        writer.append(&maker.data(2), true).unwrap();
        places.push((maker.clone(), offset));
    }
    let listed = directory.list().unwrap();
    let name = listed.iter().find(|name| name.contains(".open")).unwrap();
    let mut bytes = memory.content(name).unwrap();
    for number in [1, 3, 4] {
        bytes[places[number].1 as usize + 70] ^= 1;
    }
    memory.place(name, &bytes);
    let end = writer.end();
    // Before, at (known from the next), and behind a damaged header; then two in a row: unknown.
    for (place, _) in &places[..3] {
        assert!(agrees(&directory, &end, place));
        assert!(!agrees_with(&directory, &end, place, [8; 32]));
    }
    for (place, _) in &places[3..] {
        assert!(agrees_with(&directory, &end, place, [8; 32]));
    }
}
