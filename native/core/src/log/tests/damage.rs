//! Changed bits, cut and missing files: found, located, and never answered by throwing away frames.

use std::sync::Arc;

use super::*;
use crate::format::FormatError;
use crate::format::frame::FrameHeader;
use crate::format::segment::SEGMENT_HEADER_LEN;
use crate::log::testing::FrameMaker;
use crate::log::{LogPosition, names, verify};
use crate::storage::{Loss, MemoryDirectory};
use crate::types::FrameNo;

struct Fixture {
    memory: MemoryDirectory,
    frames: Vec<Vec<u8>>,
    maker: FrameMaker,
    end: LogEnd,
}

/// A log with sealed segments and an open one; of the open one, four frames are synced.
fn fixture() -> Fixture {
    let memory = MemoryDirectory::new();
    let directory: Arc<dyn Directory> = Arc::new(memory.clone());
    let (mut writer, _) = open(&directory);
    let mut maker = FrameMaker::new();
    writer.begin(&maker.header).unwrap();
    let mut frames = Vec::new();
    for round in 0..14 {
        frames.push(if round % 4 == 0 {
            maker.data(1)
        } else {
            maker.bookmark("here")
        });
        writer.append(frames.last().unwrap(), false).unwrap();
        if round == 4 || round == 7 {
            writer.seal().unwrap();
        }
        if round == 11 {
            writer.sync_handle().unwrap().sync().unwrap();
        }
    }
    let end = writer.end();
    drop(writer);
    Fixture {
        memory,
        frames,
        maker,
        end,
    }
}

impl Fixture {
    fn names(&self, extension: &str) -> Vec<String> {
        let names = self.memory.list().unwrap();
        names
            .into_iter()
            .filter(|name| name.ends_with(extension))
            .collect()
    }

    /// A copy with one bit changed.
    fn flipped(&self, name: &str, at: usize) -> (MemoryDirectory, Arc<dyn Directory>) {
        let copy = self.memory.fork().crash(Loss::Nothing);
        let mut content = copy.content(name).unwrap();
        content[at] ^= 1 << (at % 8);
        copy.place(name, &content);
        (copy.clone(), Arc::new(copy))
    }
}

/// Places of header and frames of a segment, and its length.
fn places(content: &[u8]) -> Vec<usize> {
    let mut places = vec![0];
    let mut at = SEGMENT_HEADER_LEN;
    while at < content.len() {
        places.push(at);
        at += FrameHeader::parse(&content[at..]).unwrap().frame_len();
    }
    places
}

fn place_of(places: &[usize], at: usize) -> usize {
    *places.iter().rfind(|place| **place <= at).unwrap()
}

#[test]
fn a_changed_bit_in_a_sealed_segment_is_located() {
    let log = fixture();
    let sealed = log.names(".seg");
    assert_eq!(sealed.len(), 2);
    for name in &sealed {
        let content = log.memory.content(name).unwrap();
        let places = places(&content);
        for at in 0..content.len() {
            // Long bodies are sampled; headers and short frames are tried byte by byte.
            let inside = at - place_of(&places, at);
            if inside > 400 && at % 61 != 0 {
                continue;
            }
            let (copy, directory) = log.flipped(name, at);
            let place = place_of(&places, at);
            let findings = verify(&directory, GROUP).unwrap();
            assert!(
                findings
                    .iter()
                    .any(|f| f.file == *name && f.offset == place as u64),
                "{name} byte {at}: {findings:?}"
            );
            let read = read_from(&directory, &log.end, None);
            let located = matches!(&read, Err(LogError::Damaged { segment, offset, .. })
                if segment == name && *offset == place as u64);
            assert!(located, "{name} byte {at}: {read:?}");
            let (_, report) = open(&directory);
            if at < SEGMENT_HEADER_LEN {
                assert!(report.damage[0].starts_with(&format!("segment {name} at byte 0")));
            }
            assert_eq!(
                copy.content(name).map(|content| content.len()),
                Some(content.len())
            );
        }
    }
}

#[test]
fn a_changed_bit_in_the_manifest_is_reported_and_the_manifest_rebuilt() {
    let log = fixture();
    let content = log.memory.content(names::MANIFEST).unwrap();
    for at in 0..content.len() {
        let (copy, directory) = log.flipped(names::MANIFEST, at);
        let findings = verify(&directory, GROUP).unwrap();
        assert!(
            findings
                .iter()
                .any(|f| f.file == names::MANIFEST && f.offset == 0),
            "byte {at}"
        );
        let (writer, report) = open(&directory);
        assert_eq!(report.damage.len(), 1, "byte {at}: {report:?}");
        assert!(report.damage[0].starts_with("segment MANIFEST at byte 0"));
        assert_eq!(read_all(&directory, &writer.end()), log.frames);
        assert_eq!(writer.manifest().events.len(), 10);
        assert!(copy.content(names::MANIFEST_DAMAGED).is_some());
        drop(writer);
        assert_eq!(open(&directory).1, RecoveryReport::default());
    }
}

#[test]
fn damage_below_what_is_durable_is_reported_and_never_cut() {
    let log = fixture();
    let name = &log.names(".open")[0];
    let content = log.memory.content(name).unwrap();
    let places = places(&content);
    assert_eq!(places.len(), 7);
    let durable = places[5];
    for at in 0..content.len() {
        if at - place_of(&places, at) > 400 && at % 61 != 0 {
            continue;
        }
        let (copy, directory) = log.flipped(name, at);
        let (writer, report) = open(&directory);
        let place = place_of(&places, at);
        if at >= durable {
            // Never synced: a torn tail.
            assert_eq!(report.damage, Vec::<String>::new(), "byte {at}");
            assert_eq!(report.torn_bytes, (content.len() - place) as u64);
            let held = read_all(&directory, &writer.end());
            assert!(held.len() < 14 && log.frames.starts_with(&held));
            continue;
        }
        let located = format!("segment {name} at byte {place}: ");
        assert!(
            report.damage[0].starts_with(&located),
            "byte {at}: {report:?}"
        );
        let longest = copy
            .list()
            .unwrap()
            .iter()
            .filter(|file| file.starts_with(&name[..17]))
            .map(|file| copy.content(file).unwrap().len())
            .max();
        assert_eq!(longest, Some(content.len()), "byte {at}: nothing is cut");
        // What lies behind the bad frame can still be read.
        if at >= SEGMENT_HEADER_LEN {
            let bad = places.iter().rposition(|p| *p == place).unwrap() - 1;
            assert_eq!(writer.end().last_frame, Some(FrameNo(13)), "byte {at}");
            let next_frame = FrameNo(u32::try_from(8 + bad + 1).unwrap());
            let incarnation = log.maker.header.incarnation;
            let position = LogPosition {
                incarnation,
                next_frame,
            };
            let rest = read_from(&directory, &writer.end(), Some(&position)).unwrap();
            assert_eq!(rest, log.frames[8 + bad + 1..], "byte {at}");
        }
    }
}

#[test]
fn a_frame_lost_at_the_durable_end_is_asked_for_again() {
    let log = fixture();
    let name = &log.names(".open")[0];
    let content = log.memory.content(name).unwrap();
    let places = places(&content);
    // The synced frames are 8 to 11; 11 has lost its header, and nothing follows.
    let copy = log.memory.fork().crash(Loss::Nothing);
    let mut cut = content[..places[5]].to_vec();
    cut[places[4] + 20] ^= 1;
    copy.place(name, &cut);
    let directory: Arc<dyn Directory> = Arc::new(copy.clone());
    let (mut writer, report) = open(&directory);
    assert_eq!(report.damage.len(), 1);
    assert_eq!(report.torn_bytes, 0);
    assert_eq!(writer.end().last_frame, Some(FrameNo(10)));
    writer.append(&log.frames[11..].concat(), false).unwrap();
    assert_eq!(read_all(&directory, &writer.end()), log.frames);
    let kept = copy.list().unwrap();
    assert!(
        kept.iter().any(|file| copy.content(file).unwrap() == cut),
        "the tail is kept"
    );
}

#[test]
fn missing_and_shortened_segments_are_reported_at_each_open() {
    let log = fixture();
    let name = &log.names(".seg")[0];
    let content = log.memory.content(name).unwrap();
    for length in [None, Some(0), Some(100), Some(content.len() - 1)] {
        let copy = log.memory.fork().crash(Loss::Nothing);
        match length {
            None => copy.remove(name).unwrap(),
            Some(length) => copy.place(name, &content[..length]),
        }
        let directory: Arc<dyn Directory> = Arc::new(copy);
        for _ in 0..2 {
            let (writer, report) = open(&directory);
            assert!(
                report.damage.iter().any(|damage| damage.contains(name)),
                "{length:?}: {report:?}"
            );
            assert_eq!(writer.end().last_frame, Some(FrameNo(13)));
        }
        let findings = verify(&directory, GROUP).unwrap();
        assert!(
            findings.iter().any(|finding| finding.file == *name),
            "{length:?}"
        );
    }
}

#[test]
fn a_sealed_segment_that_follows_nothing_is_put_aside() {
    let log = fixture();
    let copy = log.memory.fork().crash(Loss::Nothing);
    let sealed = log.names(".seg");
    let stray = "00000001-00000100-00000103.seg";
    copy.place(stray, &copy.content(&sealed[1]).unwrap());
    let directory: Arc<dyn Directory> = Arc::new(copy.clone());
    for round in 0..2 {
        let (writer, report) = open(&directory);
        assert_eq!(report.damage.len(), 1, "{report:?}");
        assert!(report.damage[0].contains(stray));
        assert_eq!(
            read_all(&directory, &writer.end()),
            log.frames,
            "round {round}"
        );
    }
    assert!(copy.content(&format!("{stray}.aside")).is_some());
}

/// Sets the version of a header and makes its checksum right.
fn newer(content: &mut [u8], at: usize, header_len: usize) {
    content[at + 8] += 1;
    let covered = at + header_len - 8;
    let checksum = xxhash_rust::xxh3::xxh3_64(&content[at..covered]);
    content[covered..covered + 8].copy_from_slice(&checksum.to_le_bytes());
}

#[test]
fn what_a_newer_program_wrote_is_refused_and_left_alone() {
    let log = fixture();
    let open_name = log.names(".open").remove(0);
    let torn = places(&log.memory.content(&open_name).unwrap())[6];
    for (name, at, header_len) in [
        (names::MANIFEST.to_owned(), 0, 64),
        (log.names(".seg").remove(0), 0, 256),
        (open_name.clone(), 0, 256),
        (open_name, torn, 256),
    ] {
        let copy = log.memory.fork().crash(Loss::Nothing);
        let mut content = copy.content(&name).unwrap();
        newer(&mut content, at, header_len);
        copy.place(&name, &content);
        let before = copy.list().unwrap();
        let directory: Arc<dyn Directory> = Arc::new(copy.clone());
        let refused = open_as(&directory, INLINE);
        assert!(
            matches!(
                &refused,
                Err(LogError::Format(FormatError::Version { .. })
                    | LogError::Damaged {
                        source: FormatError::Version { .. },
                        ..
                    })
            ),
            "{name} at {at}: {refused:?}"
        );
        assert_eq!(copy.list().unwrap(), before);
        assert_eq!(copy.content(&name).unwrap(), content);
    }
}

#[test]
fn arbitrary_bytes_in_every_file_never_panic() {
    let log = fixture();
    for name in log.memory.list().unwrap() {
        let length = log.memory.content(&name).unwrap().len();
        for seed in 0..20u8 {
            let copy = log.memory.fork().crash(Loss::Nothing);
            let noise: Vec<u8> = (0..length.min(9000))
                .map(|i| (i as u64 * 131 + u64::from(seed) * 977).to_le_bytes()[0] ^ seed)
                .collect();
            copy.place(&name, &noise);
            let directory: Arc<dyn Directory> = Arc::new(copy);
            let _ = verify(&directory, GROUP);
            let _ = read_from(&directory, &log.end, None);
            if let Ok((writer, _)) = open_as(&directory, INLINE) {
                let _ = read_from(&directory, &writer.end(), None);
            }
        }
    }
}
