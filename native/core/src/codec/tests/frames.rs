//! Frames come back as they went, in every shape; no single flipped bit passes.

use proptest::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use super::*;
use crate::constants::FRAME_BLOCKS_MAX;
use crate::format::digest::sha256;
use crate::format::frame::{FrameFlags, verify_body};
use crate::format::record::{CellEncoding, read_table};

#[test]
fn a_frame_comes_back_whole() {
    for suite in SUITES {
        for effort in [Effort::Raw, Effort::Quick, Effort::Lz4] {
            for blocks in [1, 2, 15, 16, 17, 32, 300, FRAME_BLOCKS_MAX] {
                let mut payload = pages(blocks, 3);
                payload[blocks / 2 * BLOCK_SIZE..].copy_from_slice(&noise(blocks - blocks / 2, 4));
                let records = writes(blocks);
                let frame = encode(suite, &records, &[&payload], effort);
                let (header, bytes, digest) = frame.link([7; 32]);
                assert_eq!(FrameHeader::parse(&bytes), Ok(header.clone()));
                assert_eq!(header.prev, [7; 32]);
                assert_eq!(header.digest(), digest);
                assert_eq!(header.frame_len(), bytes.len());
                assert_eq!(verify_body(&header, &bytes[FRAME_HEADER_LEN..]), Ok(()));
                let table = &bytes[FRAME_HEADER_LEN..][..header.table_len as usize];
                let placed: Result<Vec<_>, _> = read_table(&header, table).collect();
                let back: Vec<Record> = placed.unwrap().into_iter().map(|p| p.record).collect();
                assert_eq!(back, records);
                let frames = one(5, bytes);
                let opened = open_all(&context(suite).key, &frames, 5).unwrap();
                assert!(opened == payload, "{suite:?} {effort:?} {blocks} blocks");
            }
        }
    }
}

#[test]
fn a_frame_without_payload_is_still_authenticated() {
    let body = RecordBody::Bookmark { label: "x".into() };
    let record = Record {
        seq: Seq(1),
        time: TimeUs(1),
        body,
    };
    let frame = encode(Suite::Aes256Gcm, &[record], &[], Effort::Lz4);
    let (header, bytes, _) = frame.link([1; 32]);
    assert!(header.flags.has(FrameFlags::EVENTS));
    assert_eq!((header.cells_len, header.directory_len), (0, 0));
    let map = FrameMap::parse(&bytes).unwrap();
    assert!(map.authenticate(&context(Suite::Aes256Gcm).key).is_ok());
    assert!(matches!(
        map.authenticate(&context(Suite::Sm4Gcm).key),
        Err(CodecError::Format(FormatError::Field {
            field: "suite",
            ..
        }))
    ));
}

#[test]
fn effort_and_content_decide_the_encoding() {
    let encodings = |payload: &[u8], effort| {
        let records = writes(payload.len() / BLOCK_SIZE);
        let frame = encode(Suite::Aes256Gcm, &records, &[payload], effort);
        let map = FrameMap::parse(&frame.link([0; 32]).1).unwrap();
        map.directory
            .iter()
            .map(|cell| cell.encoding)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        encodings(&pages(20, 1), Effort::Lz4),
        [CellEncoding::Lz4; 2]
    );
    assert_eq!(
        encodings(&pages(20, 1), Effort::Raw),
        [CellEncoding::Raw; 2]
    );
    assert_eq!(
        encodings(&noise(20, 1), Effort::Lz4),
        [CellEncoding::Raw; 2]
    );
    assert_eq!(encodings(&pages(1, 1), Effort::Lz4), [CellEncoding::Lz4]);
    assert_eq!(encodings(&noise(1, 1), Effort::Lz4), [CellEncoding::Raw]);
    // Most of the cell is noise, but not all.
    let mut mixed = noise(16, 1);
    mixed[12 * BLOCK_SIZE..].copy_from_slice(&pages(4, 1));
    assert_eq!(encodings(&mixed, Effort::Lz4), [CellEncoding::Lz4]);
}

#[test]
fn quick_effort_compresses_what_was_halved_and_notices_other_data() {
    let mut encoder = FrameEncoder::default();
    let mut lz4_cells = |payload: &[u8], effort| {
        let records = writes(payload.len() / BLOCK_SIZE);
        let frame = encoder
            .encode(
                &context(Suite::Aes256Gcm),
                FrameNo(5),
                0,
                &records,
                &[payload],
                effort,
            )
            .unwrap();
        let map = FrameMap::parse(&frame.link([1; 32]).1).unwrap();
        let is_lz4 = |cell: &&CellEntry| cell.encoding == CellEncoding::Lz4;
        map.directory.iter().filter(is_lz4).count()
    };
    // Half of each page shrinks to nothing, the rest is noise: compressed, but not halved.
    let mut hard = noise(16, 1);
    for block in hard.chunks_exact_mut(BLOCK_SIZE) {
        block[..BLOCK_SIZE / 4].fill(0);
    }
    assert_eq!(lz4_cells(&hard, Effort::Lz4), 1);
    assert_eq!(lz4_cells(&hard, Effort::Quick), 0);
    // Nothing is known to be easy yet: one cell of sixteen is tried, and then all are.
    assert_eq!(lz4_cells(&pages(16 * 14, 1), Effort::Quick), 0);
    assert_eq!(lz4_cells(&pages(16 * 14, 1), Effort::Quick), 14);
    assert_eq!(lz4_cells(&noise(16 * 30, 1), Effort::Quick), 0);
    assert_eq!(lz4_cells(&pages(16, 1), Effort::Quick), 0);
}

#[test]
fn payload_that_disagrees_with_the_records_is_refused() {
    let encode = |records: &[Record], payload: &[&[u8]]| {
        FrameEncoder::default().encode(
            &context(Suite::Aes256Gcm),
            FrameNo(0),
            0,
            records,
            payload,
            Effort::Lz4,
        )
    };
    let payload = noise(2, 1);
    assert!(encode(&writes(2), &[&payload]).is_ok());
    assert!(encode(&writes(1), &[&payload]).is_err(), "a block too many");
    assert!(encode(&writes(3), &[&payload]).is_err(), "a block too few");
    assert!(
        encode(&writes(2), &[&payload[..4095], &payload[4095..]]).is_err(),
        "half blocks"
    );
    assert!(encode(&[], &[]).is_err(), "no records");
    assert!(
        encode(&[write(0, 1), write(0, 1)], &[&payload]).is_err(),
        "one seq twice"
    );
}

/// The encoder keeps scratch memory, nothing else, from frame to frame.
#[test]
fn an_encoder_forgets_the_frame_before_also_a_refused_one() {
    let mut encoder = FrameEncoder::default();
    let context = context(Suite::Aes256Gcm);
    let payload = pages(40, 1);
    let mut encode = |records: &[Record], payload: &[&[u8]]| {
        encoder.encode(&context, FrameNo(5), 0, records, payload, Effort::Lz4)
    };
    encode(&writes(40), &[&payload]).unwrap();
    assert!(encode(&writes(41), &[&payload]).is_err());
    let small = noise(1, 2);
    let frame = encode(&writes(1), &[&small]).unwrap();
    let bytes = frame.link([1; 32]).1;
    assert!(open_all(&context.key, &one(5, bytes), 5).unwrap() == small);
}

/// Every bit of a frame is covered by something that needs no key.
#[test]
fn no_flipped_bit_passes_parse_and_verify() {
    let payload = pages(2, 1);
    let frame = encode(Suite::Aes256Gcm, &writes(2), &[&payload], Effort::Lz4);
    let bytes = frame.link([9; 32]).1;
    let verify = |bytes: &[u8]| {
        let header = FrameHeader::parse(bytes)?;
        verify_body(&header, &bytes[FRAME_HEADER_LEN..])
    };
    assert_eq!(verify(&bytes), Ok(()));
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(verify(&damaged).is_err(), "bit {bit}");
    }
    for len in 0..bytes.len() {
        assert!(verify(&bytes[..len]).is_err(), "cut to {len}");
    }
}

/// Someone without the key makes all checksums and digests right again: the seals still find it.
#[test]
fn no_flipped_bit_passes_the_seals() {
    let payload = pages(2, 1);
    let records = writes(2);
    for suite in SUITES {
        let key = context(suite).key;
        let bytes = encode(suite, &records, &[&payload], Effort::Lz4)
            .link([9; 32])
            .1;
        let parsed = FrameHeader::parse(&bytes).unwrap();
        let clear = parsed.head_len();
        for bit in 0..bytes.len() * 8 {
            let at = bit / 8;
            let mut forged = bytes.clone();
            forged[at] ^= 1 << (bit % 8);
            if (200..232).contains(&at) || (168..200).contains(&at) || (248..256).contains(&at) {
                // `prev`, `body_digest` and the checksum: no seal covers them. `prev` is the
                // chain's to check, the others are recomputed here anyway.
                continue;
            }
            if at >= FRAME_HEADER_LEN {
                let digest = sha256(&forged[FRAME_HEADER_LEN..clear]);
                forged[120..152].copy_from_slice(&digest);
                let digest = sha256(&forged[FRAME_HEADER_LEN..]);
                forged[168..200].copy_from_slice(&digest);
            }
            let sum = xxh3_64(&forged[..248]);
            forged[248..256].copy_from_slice(&sum.to_le_bytes());
            let read = open_all(&key, &one(5, forged), 5);
            assert!(read.is_err(), "{suite:?} bit {bit}");
        }
    }
}

#[test]
fn frames_do_not_open_in_each_others_place() {
    let key = context(Suite::Aes256Gcm).key;
    let payload = noise(32, 1);
    let frame = encode(Suite::Aes256Gcm, &writes(32), &[&payload], Effort::Lz4);
    let mut bytes = frame.link([1; 32]).1;
    let map = FrameMap::parse(&bytes).unwrap();
    let (a, b) = (map.cell_offsets[0] as usize, map.cell_offsets[1] as usize);
    let (first, second) = bytes[a..].split_at_mut(b - a);
    first.swap_with_slice(second);
    let frames = one(5, bytes);
    let mut raw = Vec::new();
    for cell in 0..2 {
        let opened = open_cell(&key, &frames, FrameNo(5), cell, &mut raw);
        assert!(matches!(opened, Err(CodecError::Cell { cell: at, .. }) if at == cell));
    }
    assert!(
        open_cell(&key, &frames, FrameNo(5), 2, &mut raw).is_err(),
        "behind the last"
    );
    assert!(
        open_cell(&key, &frames, FrameNo(6), 0, &mut raw).is_err(),
        "no such frame"
    );
}

/// A sealed cell may still hold a hostile LZ4 block: whoever has the key may be wrong too.
#[test]
fn an_lz4_block_of_another_length_is_an_error() {
    let raw = pages(1, 1);
    let mut good = Vec::new();
    assert!(lz4::compress_append(&raw, raw.len(), &mut good));
    let mut out = vec![0; raw.len()];
    assert!(lz4::decompress(&good, &[], &mut out) && out == raw);
    assert!(!lz4::decompress(&good, &[], &mut out[1..]), "too long");
    assert!(
        !lz4::decompress(&good, &[], &mut vec![0; raw.len() + 1]),
        "too short"
    );
    assert!(
        !lz4::decompress(&good[..good.len() - 1], &[], &mut out),
        "cut"
    );
    assert!(!lz4::decompress(&[], &[], &mut out), "empty");
    assert!(
        !lz4::decompress(&[0xff; 40], &[], &mut out),
        "length beyond the block"
    );
    assert!(
        !lz4::decompress(&[0x10, b'a', 0xff, 0xff], &[], &mut out),
        "before the start"
    );
    let mut short = vec![1, 2, 3];
    assert!(!lz4::compress_append(&noise(1, 1), 4000, &mut short));
    assert_eq!(short, [1, 2, 3]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Any cut of the payload into pieces gives the same content.
    #[test]
    fn pieces_of_any_size_are_one_stream(
        cuts in prop::collection::vec(0usize..40, 1..20),
        seed in any::<u32>(),
        suite in prop::sample::select(&SUITES[..]),
        effort in prop::sample::select(&[Effort::Raw, Effort::Quick, Effort::Lz4][..]),
    ) {
        let blocks: usize = cuts.iter().sum::<usize>().min(FRAME_BLOCKS_MAX);
        prop_assume!(blocks > 0);
        let stream = if seed % 2 == 0 {
            pages(blocks, u64::from(seed))
        } else {
            noise(blocks, u64::from(seed))
        };
        let mut rest = &stream[..];
        let mut pieces = Vec::new();
        for cut in cuts {
            let (piece, behind) = rest.split_at((cut * BLOCK_SIZE).min(rest.len()));
            pieces.push(piece);
            rest = behind;
        }
        let bytes = encode(suite, &writes(blocks), &pieces, effort).link([1; 32]).1;
        let opened = open_all(&context(suite).key, &one(5, bytes), 5).unwrap();
        prop_assert!(opened == stream);
    }

    #[test]
    fn any_records_make_a_frame_that_verifies(
        records in crate::format::tests::table::records(),
    ) {
        let blocks: usize = records.iter().map(|record| record.body.stored_blocks()).sum();
        let payload = pages(blocks, 1);
        let bytes = encode(Suite::Aes256Gcm, &records, &[&payload], Effort::Lz4).link([1; 32]).1;
        let header = FrameHeader::parse(&bytes).unwrap();
        prop_assert_eq!(verify_body(&header, &bytes[FRAME_HEADER_LEN..]), Ok(()));
        let table = &bytes[FRAME_HEADER_LEN..][..header.table_len as usize];
        prop_assert!(read_table(&header, table).all(|placed| placed.is_ok()));
        let opened = open_all(&context(Suite::Aes256Gcm).key, &one(5, bytes), 5).unwrap();
        prop_assert!(opened == payload);
    }

    #[test]
    fn any_bytes_parse_to_a_map_without_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let payload = pages(20, 1);
        let frame = encode(Suite::Aes256Gcm, &writes(20), &[&payload], Effort::Lz4);
        let mut bytes = frame.link([1; 32]).1;
        let clear = FrameHeader::parse(&bytes).unwrap().head_len();
        for (at, value) in changes {
            bytes[at.index(clear)] = value;
        }
        let digest = sha256(&bytes[FRAME_HEADER_LEN..clear]);
        bytes[120..152].copy_from_slice(&digest);
        let sum = xxh3_64(&bytes[..248]);
        bytes[248..256].copy_from_slice(&sum.to_le_bytes());
        if let Ok(map) = FrameMap::parse(&bytes) {
            let key = context(Suite::Aes256Gcm).key;
            let frames = one(map.header.frame_no.0, bytes);
            let _ = open_all(&key, &frames, map.header.frame_no.0);
        }
    }
}

#[test]
fn lz4_blocks_made_by_hand_are_read() {
    let file: serde_json::Value =
        serde_json::from_str(include_str!("../../../../../tests/vectors/lz4.json")).unwrap();
    for case in file["cases"].as_array().unwrap() {
        let hex = |field: &str| -> Vec<u8> {
            let digits = case[field].as_str().unwrap().as_bytes().chunks(2);
            let text = digits.map(|pair| std::str::from_utf8(pair).unwrap());
            text.map(|pair| u8::from_str_radix(pair, 16).unwrap())
                .collect()
        };
        let mut out = vec![0; hex("raw").len()];
        assert!(
            lz4::decompress(&hex("block"), &hex("dictionary"), &mut out),
            "{case}"
        );
        assert_eq!(out, hex("raw"), "{case}");
    }
}
