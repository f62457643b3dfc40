//! Record table and cell directory: what is written is read, and nothing else is read.

use proptest::prelude::*;

use crate::constants::{FRAME_BLOCKS_MAX, LABEL_BYTES_MAX, RECORD_BLOCKS_MAX, VOLUME_BYTES_MAX};
use crate::format::FormatError;
use crate::format::frame::{CELL_OVERHEAD, FrameFlags, FrameHeader};
use crate::format::record::{
    BlockPayload, Cause, CellEncoding, CellEntry, Payload, PlacedRecord, Record, RecordBody,
    Reference, TableWriter, read_directory, read_table, write_directory,
};
use crate::types::{BlockIndex, Extent, FrameNo, GroupId, IncarnationId, Seq, TimeUs, VolumeIndex};

const VOLUME_BLOCKS_MAX: u64 = VOLUME_BYTES_MAX / 4096;

fn extent(blocks_max: u64) -> impl Strategy<Value = Extent> {
    let start = prop_oneof![0u64..1000, 0..VOLUME_BLOCKS_MAX];
    let volume = prop_oneof![Just(0u16), Just(1), 0..1024u16];
    (volume, start, 1..=blocks_max).prop_map(|(volume, start, blocks)| Extent {
        volume: VolumeIndex(volume),
        start: BlockIndex(start.min(VOLUME_BLOCKS_MAX - blocks)),
        blocks,
    })
}

fn block_payload() -> impl Strategy<Value = BlockPayload> {
    prop_oneof![
        Just(BlockPayload::Stored),
        Just(BlockPayload::Zero),
        Just(BlockPayload::Same)
    ]
}

fn write() -> impl Strategy<Value = (Extent, Payload)> {
    let all = (extent(RECORD_BLOCKS_MAX as u64), block_payload())
        .prop_map(|(extent, payload)| (extent, Payload::All(payload)));
    let map =
        (extent(40), prop::collection::vec(block_payload(), 40)).prop_map(|(extent, mut map)| {
            map.truncate(usize::try_from(extent.blocks).unwrap());
            (extent, Payload::Map(map))
        });
    prop_oneof![all, map]
}

fn cause() -> impl Strategy<Value = Cause> {
    (1u8..=9).prop_map(|value| Cause::from_u8(value).unwrap())
}

pub(crate) fn body() -> impl Strategy<Value = RecordBody> {
    prop_oneof![
        4 => write().prop_map(|(extent, payload)| RecordBody::Write { extent, payload }),
        2 => write().prop_map(|(extent, payload)| RecordBody::Resync { extent, payload }),
        1 => extent(VOLUME_BLOCKS_MAX).prop_map(|extent| RecordBody::Zero { extent }),
        1 => extent(1 << 20).prop_map(|extent| RecordBody::Discard { extent }),
        1 => "\\PC{0,60}".prop_map(|label| RecordBody::Bookmark { label }),
        1 => Just(RecordBody::Barrier),
        1 => cause().prop_map(|cause| RecordBody::SpanBegin { cause }),
        1 => Just(RecordBody::SpanEnd),
        1 => (cause(), any::<[u64; 4]>()).prop_map(|(cause, [a, b, first_time, bytes])| {
            let (first_seq, end_seq) = (Seq(a.min(b)), Seq(a.max(b)));
            RecordBody::Gap { cause, first_seq, end_seq, first_time: TimeUs(first_time), bytes }
        }),
        1 => any::<i64>().prop_map(|us| RecordBody::ClockStep { us }),
        1 => (0u16..1024, 0..=VOLUME_BYTES_MAX, "\\PC{0,60}").prop_map(|(volume, size, name)| {
            RecordBody::Volume { volume: VolumeIndex(volume), size, name }
        }),
    ]
}

/// Records of one frame, within its limits.
pub(crate) fn records() -> impl Strategy<Value = Vec<Record>> {
    let entry = (body(), 1u64..1 << 30);
    (
        1u64..1 << 60,
        0u64..1 << 60,
        prop::collection::vec(entry, 1..40),
    )
        .prop_map(|(seq, time, entries)| {
            let mut time = time;
            let mut blocks = 0;
            let mut records = Vec::new();
            for (body, delta) in entries {
                blocks += body.stored_blocks();
                if blocks > FRAME_BLOCKS_MAX {
                    break;
                }
                time += delta;
                records.push(Record {
                    seq: Seq(seq + records.len() as u64),
                    time: TimeUs(time),
                    body,
                });
            }
            records
        })
}

/// A header that agrees with the table; its other fields are of no matter here.
fn header_of(table: &TableWriter) -> FrameHeader {
    FrameHeader {
        flags: FrameFlags(if table.has_events() {
            FrameFlags::EVENTS
        } else {
            0
        }),
        group: GroupId([1; 16]),
        generation: crate::types::Generation {
            counter: 1,
            site: 1,
        },
        incarnation: IncarnationId([2; 16]),
        frame_no: FrameNo(100),
        suite: 1,
        first_seq: table.first_seq(),
        first_time: table.first_time(),
        last_time: table.last_time(),
        record_count: u32::try_from(table.records()).unwrap(),
        payload_blocks: u32::try_from(table.payload_blocks()).unwrap(),
        table_len: u32::try_from(table.bytes().len()).unwrap(),
        directory_len: 0,
        cells_len: 0,
        ref_floor: FrameNo(100),
        table_digest: [0; 32],
        header_tag: [0; 16],
        body_digest: [0; 32],
        prev: [0; 32],
        nonce_random: 0,
    }
}

fn written(records: &[Record]) -> TableWriter {
    let mut table = TableWriter::default();
    for record in records {
        let before = table.bytes().len();
        table.push(record).unwrap();
        assert!(table.bytes().len() - before <= record.body.encoded_len_max());
    }
    table
}

fn read(header: &FrameHeader, bytes: &[u8]) -> Result<Vec<PlacedRecord>, FormatError> {
    read_table(header, bytes).collect()
}

/// The form that a reader gives back: a map of one kind is that kind for all.
fn normal(mut record: Record) -> Record {
    if let RecordBody::Write { payload, .. } | RecordBody::Resync { payload, .. } = &mut record.body
        && let Some(uniform) = payload.uniform()
    {
        *payload = Payload::All(uniform);
    }
    record
}

fn some_records() -> Vec<Record> {
    let at = |volume, start, blocks| Extent {
        volume: VolumeIndex(volume),
        start: BlockIndex(start),
        blocks,
    };
    let map = vec![BlockPayload::Stored, BlockPayload::Same, BlockPayload::Zero];
    let bodies = vec![
        RecordBody::Volume {
            volume: VolumeIndex(0),
            size: 1 << 30,
            name: "data".into(),
        },
        RecordBody::SpanBegin {
            cause: Cause::FirstCopy,
        },
        RecordBody::Write {
            extent: at(0, 500, 3),
            payload: Payload::All(BlockPayload::Stored),
        },
        RecordBody::Resync {
            extent: at(0, 2, 3),
            payload: Payload::Map(map),
        },
        RecordBody::Write {
            extent: at(7, 9, 1),
            payload: Payload::All(BlockPayload::Same),
        },
        RecordBody::Zero {
            extent: at(7, 10, 1 << 30),
        },
        RecordBody::Discard {
            extent: at(0, 0, 1),
        },
        RecordBody::Bookmark {
            label: "before".into(),
        },
        RecordBody::SpanEnd,
        RecordBody::Barrier,
        RecordBody::Gap {
            cause: Cause::SpoolFull,
            first_seq: Seq(1),
            end_seq: Seq(9),
            first_time: TimeUs(3),
            bytes: 1 << 33,
        },
        RecordBody::ClockStep { us: -5_000_000 },
    ];
    let numbered = bodies.into_iter().zip(10..);
    numbered
        .map(|(body, at)| Record {
            seq: Seq(at),
            time: TimeUs(at * 3),
            body,
        })
        .collect()
}

#[test]
fn every_kind_round_trips_and_payload_positions_are_running_sums() {
    let records = some_records();
    let table = written(&records);
    let placed = read(&header_of(&table), table.bytes()).unwrap();
    let back: Vec<Record> = placed.iter().map(|placed| placed.record.clone()).collect();
    assert_eq!(back, records);
    let positions: Vec<u32> = placed.iter().map(|placed| placed.payload_block).collect();
    assert_eq!(positions, [0, 0, 0, 3, 4, 4, 4, 4, 4, 4, 4, 4]);
}

/// At deltas of 150 bytes a fixed 40-byte entry would be a tax: sequential and nearby writes must
/// take a few bytes.
#[test]
fn a_common_write_takes_few_bytes() {
    let records: Vec<Record> = (0..1000u64)
        .map(|at| Record {
            seq: Seq(at + 1),
            time: TimeUs(1_700_000_000_000_000 + at * 90),
            body: RecordBody::Write {
                extent: Extent {
                    volume: VolumeIndex(0),
                    start: BlockIndex(at * 7919 % (1 << 18)),
                    blocks: 1,
                },
                payload: Payload::All(BlockPayload::Same),
            },
        })
        .collect();
    let table = written(&records);
    assert!(
        table.bytes().len() <= 6 * records.len(),
        "{} bytes",
        table.bytes().len()
    );
}

#[test]
fn sums_that_disagree_with_the_header_are_found() {
    let table = written(&some_records());
    let header = header_of(&table);
    let refused = |name: &str, change: &dyn Fn(&mut FrameHeader)| {
        let mut header = header.clone();
        change(&mut header);
        assert!(read(&header, table.bytes()).is_err(), "{name}");
    };
    refused("one record less", &|h| h.record_count -= 1);
    refused("one record more", &|h| h.record_count += 1);
    refused("payload less", &|h| h.payload_blocks -= 1);
    refused("payload more", &|h| h.payload_blocks += 1);
    refused("time less", &|h| h.last_time.0 -= 1);
    refused("time more", &|h| h.last_time.0 += 1);
    refused("no events flag", &|h| h.flags.0 = 0);
    let mut longer = table.bytes().to_vec();
    longer.push(0);
    assert!(read(&header, &longer).is_err());
    for len in 0..table.bytes().len() {
        assert!(
            read(&header, &table.bytes()[..len]).is_err(),
            "cut to {len}"
        );
    }
}

#[test]
fn the_reader_ends_after_the_first_error() {
    let table = written(&some_records());
    let mut header = header_of(&table);
    header.payload_blocks = 2;
    let items: Vec<_> = read_table(&header, table.bytes()).collect();
    assert_eq!(items.len(), 3);
    assert!(items[..2].iter().all(Result::is_ok) && items[2].is_err());
}

#[test]
fn malformed_entries_are_refused() {
    let write = |extent_blocks: u64, payload: Payload| Record {
        seq: Seq(1),
        time: TimeUs(1),
        body: RecordBody::Write {
            extent: Extent {
                volume: VolumeIndex(0),
                start: BlockIndex(0),
                blocks: extent_blocks,
            },
            payload,
        },
    };
    let one = written(&[write(1, Payload::All(BlockPayload::Stored))]);
    let header = header_of(&one);
    assert_eq!(one.bytes(), [0x81, 0, 0, 1]);
    let refused = |name: &str, bytes: &[u8]| {
        assert!(read(&header, bytes).is_err(), "{name}");
    };
    refused("kind 0", &[0x80, 0, 0, 1]);
    refused("kind 12", &[0x8c, 0, 0, 1]);
    refused("payload mode 4", &[0xc1, 0, 0, 1]);
    refused("time of the first", &[0x81, 1, 0, 1]);
    refused("start below 0", &[0x81, 0, 1, 1]);
    refused("no blocks", &[0x81, 0, 0, 0]);
    refused("too many blocks", &[0x81, 0, 0, 0x81, 2]);
    refused("named volume is the one before", &[0x01, 0, 0, 0, 1]);
    refused("volume 1024", &[0x01, 0, 0x80, 8, 0, 1]);
    refused("overlong varint", &[0x81, 0, 0, 0x81, 0]);
    refused("map with unknown code", &[0xb1, 0, 0, 2, 0b1100]);
    refused("map of one kind", &[0xb1, 0, 0, 1, 0b00]);
    refused("map with padding", &[0xb1, 0, 0, 2, 0b01_01_00]);
    refused("barrier with a volume", &[0x86, 0]);
    refused("barrier with a mode", &[0x16, 0]);
    refused("zero with a mode", &[0x93, 0, 0, 1]);
    refused("span of no cause", &[0x07, 0, 0]);
    refused("bookmark not UTF-8", &[0x05, 0, 1, 0xff]);

    let mut table = TableWriter::default();
    let mut refused = |name: &str, record: &Record| {
        assert!(table.push(record).is_err(), "{name}");
        assert!(table.bytes().is_empty(), "{name}");
    };
    refused("empty", &write(0, Payload::All(BlockPayload::Same)));
    refused("huge", &write(u64::MAX, Payload::All(BlockPayload::Stored)));
    refused("too long", &write(257, Payload::All(BlockPayload::Same)));
    refused(
        "map too short",
        &write(2, Payload::Map(vec![BlockPayload::Zero])),
    );
    refused(
        "label",
        &Record {
            seq: Seq(1),
            time: TimeUs(1),
            body: RecordBody::Bookmark {
                label: "x".repeat(LABEL_BYTES_MAX + 1),
            },
        },
    );
    let mut table = written(&[write(1, Payload::All(BlockPayload::Same))]);
    let again = write(1, Payload::All(BlockPayload::Same));
    assert!(table.push(&again).is_err(), "a seq twice");
    assert!(
        table
            .push(&Record {
                seq: Seq(2),
                ..again.clone()
            })
            .is_err(),
        "a time twice"
    );
    assert!(
        table
            .push(&Record {
                seq: Seq(2),
                time: TimeUs(2),
                ..again
            })
            .is_ok()
    );
}

fn directory_header(payload_blocks: u32, frame_no: u32, floor: u32) -> FrameHeader {
    let mut header = header_of(&written(&some_records()));
    header.payload_blocks = payload_blocks;
    header.frame_no = FrameNo(frame_no);
    header.ref_floor = FrameNo(floor);
    header
}

fn cell(sealed_len: usize, encoding: CellEncoding, references: Vec<Reference>) -> CellEntry {
    CellEntry {
        sealed_len: u32::try_from(sealed_len).unwrap(),
        encoding,
        references,
    }
}

fn directory(header: &mut FrameHeader, cells: &[CellEntry]) -> Result<Vec<CellEntry>, FormatError> {
    let mut bytes = Vec::new();
    write_directory(cells, &mut bytes);
    header.directory_len = u32::try_from(bytes.len()).unwrap();
    header.cells_len = cells.iter().map(|cell| cell.sealed_len).sum();
    read_directory(header, &bytes)
}

#[test]
fn a_directory_round_trips() {
    let mut header = directory_header(35, 100, 40);
    let references = vec![
        Reference {
            frames_back: 60,
            first_block: 500,
            blocks: 11,
        },
        Reference {
            frames_back: 0,
            first_block: 11,
            blocks: 5,
        },
    ];
    let cells = [
        cell(65536 + CELL_OVERHEAD, CellEncoding::Raw, vec![]),
        cell(300, CellEncoding::Lz4Refs, references),
        cell(3 * 4096 + CELL_OVERHEAD - 1, CellEncoding::Lz4, vec![]),
    ];
    assert_eq!(directory(&mut header, &cells), Ok(cells.to_vec()));
    let mut bytes = Vec::new();
    write_directory(&cells, &mut bytes);
    for len in 0..bytes.len() {
        assert!(
            read_directory(&header, &bytes[..len]).is_err(),
            "cut to {len}"
        );
    }
    bytes.push(0);
    assert!(read_directory(&header, &bytes).is_err(), "one byte more");
    header.cells_len += 1;
    assert!(
        read_directory(&header, &bytes[..bytes.len() - 1]).is_err(),
        "another sum"
    );
}

#[test]
fn hostile_directories_are_refused() {
    let refs = |frames_back, first_block, blocks| {
        vec![Reference {
            frames_back,
            first_block,
            blocks,
        }]
    };
    let refused = |name: &str, second: CellEntry| {
        let mut header = directory_header(17, 100, 98);
        let cells = [
            cell(65536 + CELL_OVERHEAD, CellEncoding::Raw, vec![]),
            second,
        ];
        assert!(directory(&mut header, &cells).is_err(), "{name}");
    };
    let good = cell(100, CellEncoding::Lz4Refs, refs(2, 0, 16));
    let mut header = directory_header(17, 100, 98);
    let cells = [cell(65536 + CELL_OVERHEAD, CellEncoding::Raw, vec![]), good];
    assert!(directory(&mut header, &cells).is_ok());
    refused("raw too short", cell(4096, CellEncoding::Raw, vec![]));
    refused(
        "raw too long",
        cell(4096 + CELL_OVERHEAD + 1, CellEncoding::Raw, vec![]),
    );
    refused(
        "LZ4 not shorter than raw",
        cell(4096 + CELL_OVERHEAD, CellEncoding::Lz4, vec![]),
    );
    refused(
        "LZ4 of nothing",
        cell(CELL_OVERHEAD, CellEncoding::Lz4, vec![]),
    );
    refused(
        "LZ4 with references",
        cell(100, CellEncoding::Lz4, refs(1, 0, 1)),
    );
    refused("no references", cell(100, CellEncoding::Lz4Refs, vec![]));
    refused(
        "below the floor",
        cell(100, CellEncoding::Lz4Refs, refs(3, 0, 1)),
    );
    refused("no blocks", cell(100, CellEncoding::Lz4Refs, refs(1, 0, 0)));
    refused(
        "more than a dictionary",
        cell(100, CellEncoding::Lz4Refs, refs(1, 0, 17)),
    );
    refused(
        "behind a frame's end",
        cell(100, CellEncoding::Lz4Refs, refs(1, 511, 1)),
    );
    refused("itself", cell(100, CellEncoding::Lz4Refs, refs(0, 16, 1)));
    refused(
        "into itself",
        cell(100, CellEncoding::Lz4Refs, refs(0, 15, 2)),
    );
    let mut header = directory_header(1, 100, 99);
    let alone = [cell(100, CellEncoding::Lz4, vec![])];
    assert!(
        directory(&mut header, &alone).is_err(),
        "a floor without a reference"
    );
}

proptest! {
    #[test]
    fn tables_round_trip(records in records()) {
        let table = written(&records);
        let placed = read(&header_of(&table), table.bytes());
        let expected: Vec<Record> = records.into_iter().map(normal).collect();
        let back: Result<Vec<Record>, _> =
            placed.map(|placed| placed.into_iter().map(|placed| placed.record).collect());
        prop_assert_eq!(back, Ok(expected));
    }

    /// One list of records has one table: what hostile bytes decode to encodes to the same bytes.
    #[test]
    fn what_a_table_decodes_to_encodes_to_the_same_bytes(
        records in records(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let table = written(&records);
        let mut bytes = table.bytes().to_vec();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(placed) = read(&header_of(&table), &bytes) {
            let back: Vec<Record> = placed.into_iter().map(|placed| placed.record).collect();
            let again = written(&back);
            prop_assert_eq!(again.bytes(), &bytes[..]);
        }
    }

    #[test]
    fn any_bytes_are_read_without_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        count in 1u32..200,
        blocks in 0u32..512,
    ) {
        let mut header = header_of(&written(&some_records()));
        (header.record_count, header.payload_blocks) = (count, blocks);
        header.last_time = TimeUs(u64::MAX);
        let _ = read(&header, &bytes);
        let _ = read_directory(&header, &bytes);
    }
}
