//! The fuzz harnesses of `native/fuzz`, without a fuzzer: real frames, cut and changed at random.

#[path = "../../fuzz/src/harness.rs"]
mod harness;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use ebbtide_core::codec::{Effort, FrameContext, FrameEncoder, FrameMap};
use ebbtide_core::crypto::TAG_LEN;
use ebbtide_core::format::digest::sha256;
use ebbtide_core::format::frame::{FRAME_HEADER_LEN, FrameHeader};
use ebbtide_core::format::record::{BlockPayload, Payload, Record, RecordBody};
use ebbtide_core::format::segment::{SEGMENT_HEADER_LEN, SegmentHeader};
use ebbtide_core::types::{
    BlockIndex, Extent, FrameNo, Generation, GroupId, IncarnationId, Seq, TimeUs, VolumeIndex,
};
use proptest::prelude::*;

/// One frame for all tests: its nonce is random.
fn frame() -> Vec<u8> {
    static FRAME: LazyLock<Vec<u8>> = LazyLock::new(make_frame);
    FRAME.clone()
}

/// A frame of the harness' key: some records, two cells.
fn make_frame() -> Vec<u8> {
    let write = |start: u64, blocks: u64, payload| RecordBody::Write {
        extent: Extent {
            volume: VolumeIndex(1),
            start: BlockIndex(start),
            blocks,
        },
        payload,
    };
    let map = vec![BlockPayload::Stored, BlockPayload::Zero, BlockPayload::Same];
    let bodies = [
        RecordBody::Volume {
            volume: VolumeIndex(1),
            size: 1 << 30,
            name: "data".into(),
        },
        write(7, 17, Payload::All(BlockPayload::Stored)),
        write(3, 3, Payload::Map(map)),
        RecordBody::Bookmark {
            label: "here".into(),
        },
        RecordBody::Barrier,
    ];
    let records: Vec<Record> = (1..)
        .zip(bodies)
        .map(|(at, body)| Record {
            seq: Seq(at),
            time: TimeUs(999 + at),
            body,
        })
        .collect();
    let payload: Vec<u8> = (0..18 * 512u64)
        .flat_map(|at| (at / 7).to_le_bytes())
        .collect();
    let context = FrameContext {
        group: GroupId([2; 16]),
        generation: Generation {
            counter: 1,
            site: 1,
        },
        incarnation: IncarnationId([3; 16]),
        suite: 2,
        key: harness::key(),
    };
    FrameEncoder::default()
        .encode(&context, FrameNo(3), 0, &records, &[&payload], Effort::Lz4)
        .unwrap()
        .link([5; 32])
        .1
}

fn segment() -> Vec<u8> {
    let header = SegmentHeader {
        group: GroupId([2; 16]),
        generation: Generation {
            counter: 1,
            site: 1,
        },
        incarnation: IncarnationId([3; 16]),
        salt: [4; 32],
        suite: 2,
        first_frame: FrameNo(0),
        created: TimeUs(1),
        first_seq: Seq(1),
        parent: None,
    };
    header.encode().to_vec()
}

/// The frame with its cells in the clear, as `harness::sealed_frame` takes it.
fn clear_frame() -> Vec<u8> {
    let mut bytes = frame();
    let map = FrameMap::parse(&bytes).unwrap();
    let cipher = harness::key().frame(map.header.frame_no, map.header.nonce_random);
    for ((index, entry), from) in (0..).zip(&map.directory).zip(&map.cell_offsets) {
        let cell = &mut bytes[*from as usize..][..entry.sealed_len as usize];
        let (text, tag) = cell.split_at_mut(entry.sealed_len as usize - TAG_LEN);
        let tag: &[u8; TAG_LEN] = (&*tag).try_into().unwrap();
        cipher.open(index, &map.aad, text, tag).unwrap();
    }
    bytes
}

const MANIFEST: &[u8] = br#"{"version":0,"group":"02020202020202020202020202020202",
"volumes":[{"index":0,"name":"a","size":4096}],"incarnations":[],"segments":[],
"events":[{"seq":1,"time_us":2,"kind":"gap","cause":3,"bytes":4}],"horizon_seq":0}"#;

/// `bytes` with some of them changed and a tail cut off.
fn damaged(bytes: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let change = (any::<prop::sample::Index>(), any::<u8>());
    // Most of a frame is cells: half of the changes go to what is parsed.
    let early = (0usize..400, any::<u8>());
    (
        prop::collection::vec(change, 0..3),
        prop::collection::vec(early, 0..3),
        0usize..20,
    )
        .prop_map(move |(anywhere, early, cut)| {
            let mut bytes = bytes.clone();
            let len = bytes.len();
            for (at, value) in anywhere {
                bytes[at.index(len)] = value;
            }
            for (at, value) in early {
                bytes[at % len] = value;
            }
            bytes.truncate(len - cut.saturating_sub(10));
            bytes
        })
}

/// The sums that `harness::record_table` takes from its first bytes, then a table.
fn table(flags: u8, table: &[u8]) -> Vec<u8> {
    [&[flags, 0, 4, 0, 5, 0, 18, 0, 0, 0, 0, 0], table].concat()
}

/// The sums of a header, as `table` has them.
fn with_sums(header: &FrameHeader, bytes: &[u8]) -> Vec<u8> {
    let sums = [
        header.flags.0,
        u32::try_from(header.last_time.0 - header.first_time.0).unwrap(),
        header.record_count,
        header.payload_blocks,
        header.cells_len.div_ceil(37),
        header.ref_floor.0,
    ];
    let sums = sums.map(|sum| u16::try_from(sum & 0xffff).unwrap().to_le_bytes());
    [sums.as_flattened(), bytes].concat()
}

const NONCE_RANDOM_AT: usize = 232;

/// What a fuzzer starts from, by target: the committed segments in parts, and what is made here.
fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors");
    let mut seeds = vec![
        ("manifest", MANIFEST.to_vec()),
        ("segment_header", segment()),
        ("sealed_frame", clear_frame()),
    ];
    let mut frames = vec![frame()];
    for name in ["segment-v1-sm4.seg", "segment-v1-aes.seg"] {
        let segment = fs::read(vectors.join(name)).unwrap();
        let (header, mut rest) = segment.split_at(SEGMENT_HEADER_LEN);
        seeds.push(("segment_header", header.to_vec()));
        while !rest.is_empty() {
            let (frame, behind) = rest.split_at(FrameHeader::parse(rest).unwrap().frame_len());
            frames.push(frame.to_vec());
            // A cell opens under any header tag, and the harness' key sealed the AES segment too.
            // With another nonce nothing opens, as `harness::frame` asserts.
            let mut unopened = frame.to_vec();
            unopened[NONCE_RANDOM_AT] ^= 1;
            seeds.push(("frame", unopened));
            rest = behind;
        }
    }
    for frame in frames {
        let header = FrameHeader::parse(&frame).unwrap();
        let clear = &frame[FRAME_HEADER_LEN..header.head_len()];
        let (table, directory) = clear.split_at(header.table_len as usize);
        seeds.push(("frame_header", frame[..FRAME_HEADER_LEN].to_vec()));
        seeds.push(("record_table", with_sums(&header, table)));
        seeds.push(("cell_directory", with_sums(&header, directory)));
    }
    seeds
}

/// With `EBB_WRITE_CORPUS=1` also leaves them where `cargo fuzz` looks.
#[test]
fn seeds_pass_their_harness() {
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (target, seed) in seeds() {
        let run = match target {
            "frame" => harness::frame,
            "sealed_frame" => harness::sealed_frame,
            "frame_header" => harness::frame_header,
            "segment_header" => harness::segment_header,
            "manifest" => harness::manifest,
            "record_table" => harness::record_table,
            "cell_directory" => harness::cell_directory,
            _ => panic!("no harness {target}"),
        };
        run(&seed);
        if std::env::var_os("EBB_WRITE_CORPUS").is_some() {
            let folder = corpus.join(target);
            fs::create_dir_all(&folder).unwrap();
            let digest = sha256(&seed)[..8]
                .iter()
                .fold(String::new(), |name, byte| format!("{name}{byte:02x}"));
            fs::write(folder.join(digest), &seed).unwrap();
        }
    }
}

#[test]
fn whole_inputs_reach_the_end_of_each_harness() {
    let frame = frame();
    harness::frame(&frame);
    harness::sealed_frame(&clear_frame());
    harness::frame_header(&frame);
    harness::segment_header(&segment());
    harness::manifest(MANIFEST);
    let header = FrameHeader::parse(&frame).unwrap();
    let table_bytes = &frame[256..][..header.table_len as usize];
    harness::record_table(&table(1, table_bytes));
    harness::cell_directory(&[&[0; 12][..], &frame[header.head_len() - 10..][..10]].concat());
}

/// A harness that accepted everything would find nothing.
#[test]
fn a_harness_notices_a_second_form() {
    let frame = frame();
    let header = FrameHeader::parse(&frame).unwrap();
    let mut bytes = table(1, &frame[256..][..header.table_len as usize]);
    bytes[2] = 3; // The sums no longer agree: the reader, not the harness, says so.
    harness::record_table(&bytes);
    let forged = std::panic::catch_unwind(|| {
        let mut other = frame.clone();
        other[152] ^= 1; // The header tag, which cells do not cover.
        harness::frame(&other);
    });
    assert!(forged.is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes(data in prop::collection::vec(any::<u8>(), 0..700)) {
        harness::frame(&data);
        harness::sealed_frame(&data);
        harness::frame_header(&data);
        harness::segment_header(&data);
        harness::manifest(&data);
        harness::record_table(&data);
        harness::cell_directory(&data);
    }

    #[test]
    fn damaged_headers(frame in damaged(frame()[..256].to_vec()), segment in damaged(segment())) {
        harness::frame_header(&frame);
        harness::segment_header(&segment);
    }

    #[test]
    fn damaged_manifests(data in damaged(MANIFEST.to_vec())) {
        harness::manifest(&data);
    }

    #[test]
    fn damaged_tables(data in damaged({
        let frame = frame();
        let header = FrameHeader::parse(&frame).unwrap();
        table(1, &frame[256..][..header.table_len as usize])
    })) {
        harness::record_table(&data);
        harness::cell_directory(&data);
    }

    #[test]
    fn damaged_frames(data in damaged(frame())) {
        // The header tag alone is not what a cell proves: see `a_harness_notices_a_second_form`.
        let mut data = data;
        data[152..168].copy_from_slice(&frame()[152..168]);
        harness::frame(&data);
    }

    #[test]
    fn damaged_cells(data in damaged(clear_frame())) {
        harness::sealed_frame(&data);
    }
}
