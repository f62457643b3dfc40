//! Every fixed header: what is encoded is parsed, and every single flipped bit, every truncation
//! and every value beyond a limit is found.

use proptest::prelude::*;

use crate::constants::{FRAME_BLOCKS_MAX, FRAME_BYTES_MAX, FRAME_RECORDS_MAX};
use crate::format::FormatError;
use crate::format::frame::{
    self, FRAME_HEADER_LEN, FrameFlags, FrameHeader, frame_digest, verify_body,
};
use crate::format::manifest::{
    EventEntry, IncarnationEntry, MANIFEST_HEADER_LEN, Manifest, SegmentEntry, VolumeEntry,
};
use crate::format::segment::{Parent, SEGMENT_HEADER_LEN, SegmentHeader};
use crate::types::{FrameNo, Generation, GroupId, IncarnationId, Seq, TimeUs};

fn frame_header() -> FrameHeader {
    FrameHeader {
        flags: FrameFlags(FrameFlags::EVENTS),
        group: GroupId([1; 16]),
        generation: Generation {
            counter: 2,
            site: 3,
        },
        incarnation: IncarnationId([4; 16]),
        frame_no: FrameNo(5),
        suite: 1,
        first_seq: Seq(6),
        first_time: TimeUs(7_000_000),
        last_time: TimeUs(7_000_400),
        record_count: 20,
        payload_blocks: 17,
        table_len: 100,
        directory_len: 10,
        cells_len: 17 * 4096,
        ref_floor: FrameNo(4),
        table_digest: [8; 32],
        header_tag: [9; 16],
        body_digest: [10; 32],
        prev: [11; 32],
        nonce_random: 12,
    }
}

fn segment_header() -> SegmentHeader {
    SegmentHeader {
        group: GroupId([1; 16]),
        generation: Generation {
            counter: 2,
            site: 3,
        },
        incarnation: IncarnationId([4; 16]),
        salt: [5; 32],
        suite: 2,
        first_frame: FrameNo(6),
        created: TimeUs(7),
        first_seq: Seq(8),
        parent: Some(Parent {
            incarnation: IncarnationId([9; 16]),
            frame_no: FrameNo(10),
            digest: [11; 32],
        }),
    }
}

fn manifest() -> Manifest {
    Manifest {
        version: 7,
        group: GroupId([1; 16]).to_string(),
        volumes: vec![VolumeEntry {
            index: 0,
            name: "pg \u{6570}".into(),
            size: 1 << 40,
        }],
        incarnations: vec![IncarnationEntry {
            ordinal: 1,
            id: IncarnationId([4; 16]).to_string(),
            generation_counter: 2,
            generation_site: u64::MAX,
        }],
        segments: vec![SegmentEntry {
            ordinal: 1,
            first_frame: 0,
            last_frame: 9,
            first_seq: 1,
            end_seq: 99,
            first_time_us: 5,
            last_time_us: 105,
            bytes: 64 << 20,
            records: 98,
            last_digest: "ab".repeat(32),
            indexed: true,
        }],
        events: vec![EventEntry {
            seq: 3,
            time_us: 8,
            kind: "bookmark".into(),
            label: "before \"upgrade\"".into(),
            cause: None,
            gap_first_time_us: None,
            bytes: None,
            volume: None,
        }],
        horizon_seq: 0,
    }
}

/// Every single bit flip and every truncation of `bytes` is an error of `parse`.
fn assert_no_damage_passes<T>(bytes: &[u8], parse: impl Fn(&[u8]) -> Result<T, FormatError>) {
    assert!(parse(bytes).is_ok());
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.to_vec();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(parse(&damaged).is_err(), "bit {bit} flipped unnoticed");
    }
    for len in 0..bytes.len() {
        assert!(parse(&bytes[..len]).is_err(), "cut to {len} unnoticed");
    }
}

#[test]
fn damage_of_a_frame_header_is_found() {
    assert_no_damage_passes(&frame_header().encode(), FrameHeader::parse);
}

#[test]
fn damage_of_a_segment_header_is_found() {
    assert_no_damage_passes(&segment_header().encode(), SegmentHeader::parse);
}

#[test]
fn damage_of_a_manifest_is_found() {
    assert_no_damage_passes(&manifest().encode(), Manifest::parse);
    let mut longer = manifest().encode();
    longer.push(b' ');
    assert!(Manifest::parse(&longer).is_err());
}

#[test]
fn headers_come_back_as_they_went() {
    assert_eq!(
        FrameHeader::parse(&frame_header().encode()),
        Ok(frame_header())
    );
    assert_eq!(
        SegmentHeader::parse(&segment_header().encode()),
        Ok(segment_header())
    );
    let orphan = SegmentHeader {
        parent: None,
        ..segment_header()
    };
    assert_eq!(SegmentHeader::parse(&orphan.encode()), Ok(orphan));
    assert_eq!(Manifest::parse(&manifest().encode()), Ok(manifest()));
}

#[test]
fn a_header_parses_with_its_body_behind_it() {
    let mut bytes = frame_header().encode().to_vec();
    bytes.extend_from_slice(&[0xee; 100]);
    assert_eq!(FrameHeader::parse(&bytes), Ok(frame_header()));
}

#[test]
fn findings_name_the_cause() {
    let bytes = frame_header().encode();
    let with = |at: usize, value: u8| {
        let mut bytes = bytes;
        bytes[at] = value;
        FrameHeader::parse(&bytes)
    };
    assert!(matches!(with(0, b'X'), Err(FormatError::Magic { .. })));
    assert!(matches!(
        with(8, 2),
        Err(FormatError::Version {
            found: 2,
            min: 1,
            max: 1,
            ..
        })
    ));
    assert!(matches!(
        with(10, 8),
        Err(FormatError::Field {
            field: "header_len",
            ..
        })
    ));
    assert!(matches!(
        with(70, 1),
        Err(FormatError::Field {
            field: "reserved_70",
            ..
        })
    ));
    assert!(matches!(
        with(240, 1),
        Err(FormatError::Field {
            field: "reserved_236",
            ..
        })
    ));
    assert!(matches!(with(40, 99), Err(FormatError::Checksum { .. })));
    assert_eq!(
        FrameHeader::parse(&bytes[..255]),
        Err(FormatError::Truncated {
            what: "frame header",
            need: 256,
            have: 255
        })
    );
}

/// A valid checksum does not excuse a value beyond its limit.
#[test]
fn values_beyond_the_limits_are_refused() {
    let refused = |name: &str, change: &dyn Fn(&mut FrameHeader)| {
        let mut header = frame_header();
        change(&mut header);
        assert!(FrameHeader::parse(&header.encode()).is_err(), "{name}");
    };
    refused("unknown flag", &|h| h.flags.0 = 1 << 9);
    refused("frame number", &|h| h.frame_no.0 = 1 << 31);
    refused("suite 0", &|h| h.suite = 0);
    refused("seq 0", &|h| h.first_seq.0 = 0);
    refused("seq overflow", &|h| h.first_seq.0 = u64::MAX - 19);
    refused("no records", &|h| h.record_count = 0);
    refused("too many records", &|h| {
        h.record_count = u32::try_from(FRAME_RECORDS_MAX).unwrap() + 1;
        h.table_len = h.record_count * 2;
        h.last_time.0 += 1 << 20;
    });
    refused("time runs backwards", &|h| {
        h.last_time.0 = h.first_time.0 - 1;
    });
    refused("two records at one time", &|h| {
        h.last_time.0 = h.first_time.0 + 18;
    });
    refused("too many blocks", &|h| {
        h.payload_blocks = u32::try_from(FRAME_BLOCKS_MAX).unwrap() + 1;
        h.directory_len = 200;
    });
    refused("table too long", &|h| h.table_len = u32::MAX);
    refused("directory too long", &|h| h.directory_len = u32::MAX);
    refused("cells too long", &|h| h.cells_len = u32::MAX);
    refused("frame too long", &|h| {
        h.table_len = u32::try_from(FRAME_BYTES_MAX).unwrap() - 10;
    });
    refused("table too short", &|h| h.table_len = 39);
    refused("directory too short", &|h| h.directory_len = 9);
    refused("directory without cells", &|h| {
        (h.payload_blocks, h.cells_len) = (0, 0);
    });
    refused("cells without payload", &|h| {
        (h.payload_blocks, h.directory_len) = (0, 0);
    });
    refused("cells longer than raw", &|h| h.cells_len = 17 * 4096 + 49);
    refused("cells too short", &|h| h.cells_len = 49);
    refused("floor above itself", &|h| h.ref_floor.0 = 6);
    refused("first frame with a predecessor", &|h| {
        (h.frame_no.0, h.ref_floor.0) = (0, 0);
    });

    let refused = |name: &str, change: &dyn Fn(&mut SegmentHeader)| {
        let mut header = segment_header();
        change(&mut header);
        assert!(SegmentHeader::parse(&header.encode()).is_err(), "{name}");
    };
    refused("suite 0", &|h| h.suite = 0);
    refused("incarnation 0", &|h| {
        h.incarnation = IncarnationId::default();
    });
    refused("frame number", &|h| h.first_frame.0 = 1 << 31);
    refused("seq 0", &|h| h.first_seq.0 = 0);
    refused("its own parent", &|h| {
        h.parent.as_mut().unwrap().incarnation = h.incarnation;
    });
    refused("parent 0", &|h| {
        h.parent.as_mut().unwrap().incarnation = IncarnationId::default();
    });

    let refused = |name: &str, change: &dyn Fn(&mut Manifest)| {
        let mut manifest = manifest();
        change(&mut manifest);
        assert!(Manifest::parse(&manifest.encode()).is_err(), "{name}");
    };
    refused("group not hex", &|m| m.group = "x".repeat(32));
    refused("group short", &|m| m.group.truncate(31));
    refused("incarnation", &|m| m.incarnations[0].id.clear());
    refused("ordinal 0", &|m| m.incarnations[0].ordinal = 0);
    refused("digest", &|m| m.segments[0].last_digest.truncate(63));
    refused("backwards", &|m| m.segments[0].end_seq = 1);
}

#[test]
fn the_frame_digest_covers_all_but_the_checksum() {
    let bytes = frame_header().encode();
    assert_eq!(frame_header().digest(), frame_digest(&bytes));
    for at in 0..FRAME_HEADER_LEN {
        let mut other = bytes;
        other[at] ^= 1;
        assert_eq!(
            frame_digest(&other) != frame_digest(&bytes),
            at < frame::DIGEST_COVERS
        );
    }
}

#[test]
fn a_body_must_be_whole_and_unchanged() {
    use crate::format::digest::sha256;
    let mut header = frame_header();
    let body: Vec<u8> = (0..header.body_len())
        .map(|at| u8::try_from(at % 251).unwrap())
        .collect();
    header.body_digest = sha256(&body);
    header.table_digest = sha256(&body[..110]);
    assert_eq!(verify_body(&header, &body), Ok(()));
    assert!(matches!(
        verify_body(&header, &body[..body.len() - 1]),
        Err(FormatError::Truncated { .. })
    ));
    let mut longer = body.clone();
    longer.push(0);
    assert!(matches!(
        verify_body(&header, &longer),
        Err(FormatError::Limit { .. })
    ));
    for at in [0, 99, 100, 109, 110, body.len() - 1] {
        let mut damaged = body.clone();
        damaged[at] ^= 0x10;
        assert!(matches!(
            verify_body(&header, &damaged),
            Err(FormatError::Digest { .. })
        ));
    }
    // Made by someone who can compute the outer digest: the inner one disagrees.
    header.table_digest[0] ^= 1;
    assert!(matches!(
        verify_body(&header, &body),
        Err(FormatError::Digest { .. })
    ));
}

#[test]
fn an_unknown_manifest_field_is_refused() {
    let text = manifest().encode()[MANIFEST_HEADER_LEN..].to_vec();
    let text = String::from_utf8(text)
        .unwrap()
        .replace("\"horizon_seq\"", "\"horizon_sec\"");
    assert!(serde_json::from_str::<Manifest>(&text).is_err());
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = FrameHeader::parse(&bytes);
        let _ = SegmentHeader::parse(&bytes);
        let _ = Manifest::parse(&bytes);
    }

    /// Bytes with magic, version, length and checksum right: the limits alone decide, and what
    /// they accept encodes to the same bytes.
    #[test]
    fn what_parses_encodes_to_the_same_bytes(
        fill in prop::collection::vec(any::<u8>(), 256),
        keep in prop::collection::vec(any::<bool>(), 256),
    ) {
        let mut bytes = frame_header().encode();
        for at in (12..70).chain(72..236) {
            if keep[at] && at % 3 == 0 {
                bytes[at] = fill[at];
            }
        }
        let sum = xxhash_rust::xxh3::xxh3_64(&bytes[..248]);
        bytes[248..].copy_from_slice(&sum.to_le_bytes());
        if let Ok(header) = FrameHeader::parse(&bytes) {
            prop_assert_eq!(header.encode(), bytes);
        }
        let mut bytes = segment_header().encode();
        for at in (16..98).chain(100..140).chain(144..176) {
            if keep[at] && at % 2 == 0 {
                bytes[at] = fill[at];
            }
        }
        let sum = xxhash_rust::xxh3::xxh3_64(&bytes[..SEGMENT_HEADER_LEN - 8]);
        bytes[248..].copy_from_slice(&sum.to_le_bytes());
        if let Ok(header) = SegmentHeader::parse(&bytes) {
            prop_assert_eq!(header.encode(), bytes);
        }
    }
}
