//! Invariant 8: the events of a manifest are bounded, and what goes is what is missed least.

use super::basics::memory;
use super::*;
use crate::constants::{EVENTS_MAX, VOLUME_CHANGES_MAX};
use crate::format::FormatError;
use crate::format::manifest::{EventEntry, Manifest};
use crate::format::record::{Cause, RecordBody};
use crate::log::events::publish;
use crate::log::testing::FrameMaker;
use crate::types::VolumeIndex;

fn event(seq: usize, kind: &str) -> EventEntry {
    EventEntry {
        seq: seq as u64,
        time_us: 1000 * seq as u64,
        kind: kind.to_owned(),
        label: String::new(),
        cause: (kind == "span_begin").then_some(Cause::UncleanStop as u8),
        gap_first_time_us: None,
        bytes: None,
        volume: None,
    }
}

fn kinds(events: &[EventEntry], kind: &str) -> usize {
    events.iter().filter(|event| event.kind == kind).count()
}

#[test]
fn steps_of_the_clock_go_before_names_and_names_before_points() {
    let mut manifest = Manifest::default();
    let mut seq = 0;
    let mut add = |manifest: &mut Manifest, kind: &str| {
        seq += 1;
        publish(manifest, vec![event(seq, kind)]);
    };
    for _ in 0..EVENTS_MAX / 4 {
        add(&mut manifest, "clock_step");
        add(&mut manifest, "bookmark");
    }
    for _ in 0..EVENTS_MAX / 4 {
        add(&mut manifest, "span_begin");
        add(&mut manifest, "span_end");
    }
    assert_eq!(manifest.events.len(), EVENTS_MAX);
    add(&mut manifest, "span_begin");
    let steps = kinds(&manifest.events, "clock_step");
    assert!(manifest.events.len() <= EVENTS_MAX / 8 * 7);
    assert!(steps < EVENTS_MAX / 4);
    assert_eq!(kinds(&manifest.events, "bookmark"), EVENTS_MAX / 4);
    for _ in 0..EVENTS_MAX / 2 {
        add(&mut manifest, "gap");
        add(&mut manifest, "span_begin");
        add(&mut manifest, "span_end");
        assert!(manifest.events.len() <= EVENTS_MAX);
    }
    assert_eq!(kinds(&manifest.events, "clock_step"), 0);
    assert!(kinds(&manifest.events, "bookmark") < EVENTS_MAX / 4);
    let newest = manifest.events.last().unwrap();
    assert_eq!((newest.kind.as_str(), newest.seq), ("span_end", seq as u64));
}

/// Whether a seq lies in a span, from begin to before its end, by these events.
fn covered(events: &[EventEntry], seq: u64) -> bool {
    let before = events.iter().rev().filter(|event| event.seq <= seq);
    let mut ends = before.filter(|event| event.kind.starts_with("span"));
    ends.next().is_some_and(|event| event.kind == "span_begin")
}

#[test]
fn joined_spans_cover_what_they_covered_and_an_open_one_stays_open() {
    let mut manifest = Manifest::default();
    let mut all = Vec::new();
    let mut seq = 0;
    for round in 0..EVENTS_MAX {
        // Every tenth pair lies near to the one before.
        seq += if round % 10 == 0 { 2 } else { 40 };
        let mut begin = event(seq, "span_begin");
        if round == 5 * EVENTS_MAX / 10 {
            begin.cause = Some(Cause::FirstCopy as u8);
        }
        seq += 3;
        for event in [begin, event(seq, "span_end")] {
            all.push(event.clone());
            publish(&mut manifest, vec![event]);
        }
        assert!(manifest.events.len() <= EVENTS_MAX);
    }
    let open = event(seq + 7, "span_begin");
    all.push(open.clone());
    publish(&mut manifest, vec![open.clone()]);
    assert_eq!(manifest.events.last(), Some(&open));
    let mut left = 0;
    for seq in (0..seq as u64).step_by(997) {
        let (was, is) = (covered(&all, seq), covered(&manifest.events, seq));
        assert!(is || !was, "a point in a span is offered at {seq}");
        left += usize::from(!is);
    }
    assert!(left > 100, "{left} points are left");
    let copies = |event: &EventEntry| event.cause == Some(Cause::FirstCopy as u8);
    assert_eq!(manifest.events.iter().filter(|e| copies(e)).count(), 1);
}

#[test]
fn volumes_that_change_too_often_are_refused_and_known_ones_never() {
    let (_, directory) = memory();
    let (mut writer, _) = open(&directory);
    let mut maker = FrameMaker::new();
    writer.begin(&maker.header).unwrap();
    let volume = |size: u64| RecordBody::Volume {
        volume: VolumeIndex(3),
        size: size * 4096,
        name: "disk".into(),
    };
    let mut appended = 0;
    let refused = loop {
        let sizes: Vec<_> = (1..=1024).map(|step| volume(appended + step)).collect();
        match writer.append(&maker.frame(&sizes), false) {
            Ok(_) => appended += 1024,
            Err(error) => break error,
        }
        assert!(appended < 2 * VOLUME_CHANGES_MAX as u64, "never refused");
        writer.seal().unwrap();
        assert!(writer.manifest().events.len() <= EVENTS_MAX);
    };
    assert_eq!(appended, VOLUME_CHANGES_MAX as u64);
    let LogError::Format(FormatError::Limit { field, .. }) = refused else {
        panic!("{refused}");
    };
    assert_eq!(field, "volume changes");
    // The next incarnation repeats what is known.
    let (mut writer, _) = {
        drop(writer);
        open(&directory)
    };
    let mut next = FrameMaker::new();
    (next.next_seq, next.next_time) = (maker.next_seq, maker.next_time);
    next.header.incarnation.0 = [9; 16];
    next.header.first_seq.0 = next.next_seq;
    writer.begin(&next.header).unwrap();
    writer
        .append(&next.frame(&[volume(appended)]), false)
        .unwrap();
}
