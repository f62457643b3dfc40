//! Segments committed under `tests/vectors/` are read, byte for byte, for ever; the oracle in
//! `tests/oracle/` reads the same files. `EBB_WRITE_VECTORS=1` makes them anew (nonces are random)
//! when a version is added; a released version's file is never made again.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::references::with_references;
use super::*;
use crate::format::digest::sha256;
use crate::format::frame::{FRAME_HEADER_LEN, FrameFlags, verify_body};
use crate::format::record::{Cause, CellEncoding, Reference, read_table};
use crate::format::segment::{Parent, SEGMENT_HEADER_LEN, SegmentHeader};

fn extent(volume: u16, start: u64, blocks: u64) -> Extent {
    Extent {
        volume: VolumeIndex(volume),
        start: BlockIndex(start),
        blocks,
    }
}

/// Records of the three frames: every kind, every payload mode.
fn records() -> [Vec<Record>; 3] {
    use BlockPayload::{Same, Stored, Zero};
    let all = Payload::All;
    let map = Payload::Map(vec![Stored, Zero, Same, Stored, Same]);
    let gap = RecordBody::Gap {
        cause: Cause::SpoolFull,
        first_seq: Seq(900),
        end_seq: Seq(950),
        first_time: TimeUs(1_700_000_000_000_000),
        bytes: 1 << 33,
    };
    let volume = |index, name: &str| RecordBody::Volume {
        volume: VolumeIndex(index),
        size: 1 << (30 + index),
        name: name.into(),
    };
    let bodies = [
        vec![
            volume(0, "data"),
            volume(1, "log \u{65e5}\u{5fd7}"),
            RecordBody::SpanBegin {
                cause: Cause::FirstCopy,
            },
            RecordBody::Resync {
                extent: extent(0, 100, 17),
                payload: all(Stored),
            },
            RecordBody::Resync {
                extent: extent(0, 117, 64),
                payload: all(Zero),
            },
            RecordBody::SpanEnd,
        ],
        vec![
            gap,
            RecordBody::Write {
                extent: extent(0, 99, 5),
                payload: map,
            },
            RecordBody::Write {
                extent: extent(1, 1 << 37, 1),
                payload: all(Stored),
            },
            RecordBody::Write {
                extent: extent(1, 3, 256),
                payload: all(Same),
            },
            RecordBody::Zero {
                extent: extent(1, 0, 1 << 38),
            },
            RecordBody::Discard {
                extent: extent(0, 7, 1),
            },
            RecordBody::Bookmark {
                label: "before the upgrade".into(),
            },
            RecordBody::ClockStep { us: -1_500_000 },
            RecordBody::Barrier,
        ],
        vec![RecordBody::Write {
            extent: extent(0, 16, 17),
            payload: all(Stored),
        }],
    ];
    let (mut seq, mut time) = (1000, 1_763_900_000_000_000);
    bodies.map(|bodies| {
        let mut records = Vec::new();
        for body in bodies {
            records.push(Record {
                seq: Seq(seq),
                time: TimeUs(time),
                body,
            });
            seq += 1;
            time += 1 + seq % 7 * 100;
        }
        records
    })
}

/// Payload streams of the three frames: compressed, raw and compressed against references.
fn payloads() -> [Vec<u8>; 3] {
    let mut first = pages(16, 1);
    first.extend_from_slice(&noise(1, 2));
    let second = [noise(1, 3), pages(1, 4), noise(1, 5)].concat();
    // What the references name, a little changed.
    let mut third = [&second[..BLOCK_SIZE], &first[16 * BLOCK_SIZE..]]
        .concat()
        .repeat(8);
    third.extend_from_slice(&second[..BLOCK_SIZE]);
    for at in (100..third.len()).step_by(9000) {
        third[at] ^= 0x55;
    }
    [first, second, third]
}

fn segment_header(suite: Suite) -> SegmentHeader {
    let context = context(suite);
    SegmentHeader {
        group: context.group,
        generation: context.generation,
        incarnation: context.incarnation,
        salt: [4; 32],
        suite: suite as u16,
        first_frame: FrameNo(0),
        created: TimeUs(1_763_900_000_000_000),
        first_seq: Seq(1000),
        parent: Some(Parent {
            incarnation: IncarnationId([7; 16]),
            frame_no: FrameNo(41),
            digest: [8; 32],
        }),
    }
}

fn make(suite: Suite) -> Vec<u8> {
    let context = context(suite);
    let (records, payloads) = (records(), payloads());
    let mut encoder = FrameEncoder::default();
    let mut encode = |number: u32, flags| {
        let at = number as usize;
        let payload = [&payloads[at][..]];
        let frame_no = FrameNo(number);
        encoder
            .encode(
                &context,
                frame_no,
                flags,
                &records[at],
                &payload,
                Effort::Lz4,
            )
            .unwrap()
    };
    let reference = |frames_back, first_block, blocks| Reference {
        frames_back,
        first_block,
        blocks,
    };
    let dictionary = [&payloads[1][..BLOCK_SIZE], &payloads[0][16 * BLOCK_SIZE..]].concat();
    let cells = [
        (vec![reference(1, 0, 1), reference(2, 16, 1)], dictionary),
        (
            vec![reference(0, 14, 1)],
            payloads[2][14 * BLOCK_SIZE..15 * BLOCK_SIZE].to_vec(),
        ),
    ];
    let last = with_references(&context, (2, 0), &records[2], &payloads[2], &cells);
    let mut bytes = segment_header(suite).encode().to_vec();
    let mut prev = [0; 32];
    for frame in [encode(0, 0), encode(1, 0), last] {
        let (_, frame, digest) = frame.link(prev);
        bytes.extend_from_slice(&frame);
        prev = digest;
    }
    bytes
}

/// A record as the oracle gives it.
fn described(record: &Record, payload_block: u32) -> Value {
    let mut fields = match &record.body {
        RecordBody::Write { .. } => json!({"kind": "WRITE"}),
        RecordBody::Resync { .. } => json!({"kind": "RESYNC"}),
        RecordBody::Zero { .. } => json!({"kind": "ZERO"}),
        RecordBody::Discard { .. } => json!({"kind": "DISCARD"}),
        RecordBody::Bookmark { label } => json!({"kind": "BOOKMARK", "label": label}),
        RecordBody::Barrier => json!({"kind": "BARRIER"}),
        RecordBody::SpanBegin { cause } => json!({"kind": "SPAN_BEGIN", "cause": *cause as u8}),
        RecordBody::SpanEnd => json!({"kind": "SPAN_END"}),
        RecordBody::Gap {
            cause,
            first_seq,
            end_seq,
            first_time,
            bytes,
        } => json!({
            "kind": "GAP", "cause": *cause as u8, "first_seq": first_seq.0, "end_seq": end_seq.0,
            "first_time_us": first_time.0, "bytes": bytes,
        }),
        RecordBody::ClockStep { us } => json!({"kind": "CLOCK_STEP", "us": us}),
        RecordBody::Volume { volume, size, name } => {
            json!({"kind": "VOLUME", "volume": volume.0, "size": size, "name": name})
        }
    };
    let mut add = |name: &str, value: Value| fields[name] = value;
    add("seq", json!(record.seq.0));
    add("time_us", json!(record.time.0));
    if let Some(extent) = record.body.extent() {
        add("volume", json!(extent.volume.0));
        add("start", json!(extent.start.0));
        add("blocks", json!(extent.blocks));
    }
    if let Some((extent, payload)) = record.body.extent().zip(record.body.payload()) {
        let blocks = usize::try_from(extent.blocks).unwrap();
        let letters = (0..blocks).map(|at| match payload.get(at) {
            BlockPayload::Stored => 'D',
            BlockPayload::Zero => '0',
            BlockPayload::Same => '=',
        });
        add("payload", json!(letters.collect::<String>()));
        add("payload_block", json!(payload_block));
    }
    fields
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

/// Reads a segment, checks everything in it, and says what it holds.
fn read(suite: Suite, segment: &[u8]) -> Value {
    assert_eq!(SegmentHeader::parse(segment), Ok(segment_header(suite)));
    let key = context(suite).key;
    let mut frames = Frames::default();
    let mut rest = &segment[SEGMENT_HEADER_LEN..];
    let mut described_frames = Vec::new();
    let mut prev = [0; 32];
    for number in 0..3 {
        let header = FrameHeader::parse(rest).unwrap();
        assert_eq!((header.frame_no, header.prev), (FrameNo(number), prev));
        let (frame, behind) = rest.split_at(header.frame_len());
        assert_eq!(verify_body(&header, &frame[FRAME_HEADER_LEN..]), Ok(()));
        frames.frames.insert(number, frame.to_vec());
        let payload = open_all(&key, &frames, number).unwrap();
        assert!(payload == payloads()[number as usize]);
        let table = &frame[FRAME_HEADER_LEN..][..header.table_len as usize];
        let records: Vec<Value> = read_table(&header, table)
            .map(|placed| placed.unwrap())
            .map(|placed| described(&placed.record, placed.payload_block))
            .collect();
        prev = header.digest();
        described_frames.push(json!({
            "frame_no": number,
            "events": header.flags.has(FrameFlags::EVENTS),
            "digest": hex(&prev),
            "payload_sha256": hex(&sha256(&payload)),
            "records": records,
        }));
        rest = behind;
    }
    assert!(rest.is_empty());
    let map = frames.map(FrameNo(2)).unwrap();
    assert!(
        map.directory
            .iter()
            .all(|cell| cell.encoding == CellEncoding::Lz4Refs)
    );
    json!({"group_key": hex(&[1; 32]), "frames": described_frames})
}

#[test]
fn committed_segments_are_read_for_ever() {
    let vectors = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors");
    for (suite, name) in [
        (Suite::Sm4Gcm, "segment-v1-sm4"),
        (Suite::Aes256Gcm, "segment-v1-aes"),
    ] {
        let path = |extension: &str| vectors.join(format!("{name}.{extension}"));
        if std::env::var_os("EBB_WRITE_VECTORS").is_some() {
            let segment = make(suite);
            let text = serde_json::to_string_pretty(&read(suite, &segment)).unwrap();
            fs::write(path("seg"), segment).unwrap();
            fs::write(path("json"), text + "\n").unwrap();
        }
        let expected: Value =
            serde_json::from_str(&fs::read_to_string(path("json")).unwrap()).unwrap();
        assert_eq!(read(suite, &fs::read(path("seg")).unwrap()), expected);
        let records: Vec<Value> = expected["frames"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|frame| frame["records"].as_array().unwrap().clone())
            .collect();
        assert_eq!(records.len(), records_of_all().len());
        for (described, record) in records.iter().zip(records_of_all()) {
            assert_eq!(described["seq"], json!(record.seq.0));
            assert_eq!(described["kind"], self::described(&record, 0)["kind"]);
        }
    }
}

fn records_of_all() -> Vec<Record> {
    records().into_iter().flatten().collect()
}
