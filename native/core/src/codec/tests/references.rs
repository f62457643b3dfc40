//! References are followed, and bounded whatever a writer claims.

use xxhash_rust::xxh3::xxh3_64;

use super::*;
use crate::codec::encode::seal;
use crate::codec::lz4::reference::compress_with_dict;
use crate::constants::{CELL_BLOCKS, REFERENCE_CELLS_MAX};
use crate::format::digest::sha256;
use crate::format::frame::FrameFlags;
use crate::format::record::{CellEncoding, Reference, TableWriter, write_directory};

/// A frame whose cells are compressed against what `references` name; `dictionaries` are the raw
/// bytes that they mean.
pub(super) fn with_references(
    context: &FrameContext,
    (frame_no, floor): (u32, u32),
    records: &[Record],
    payload: &[u8],
    cells: &[(Vec<Reference>, Vec<u8>)],
) -> UnlinkedFrame {
    let mut table = TableWriter::default();
    for record in records {
        table.push(record).unwrap();
    }
    let mut entries = Vec::new();
    let mut body = Vec::new();
    for (raw, (references, dictionary)) in payload.chunks(CELL_BLOCKS * BLOCK_SIZE).zip(cells) {
        let start = body.len();
        body.extend_from_slice(&xxh3_64(raw).to_le_bytes());
        let encoding = if references.is_empty() {
            body.extend_from_slice(raw);
            CellEncoding::Raw
        } else {
            let block = compress_with_dict(raw, dictionary);
            assert!(
                block.len() < raw.len() / 2,
                "the dictionary was of no use: {}",
                block.len()
            );
            body.extend_from_slice(&block);
            CellEncoding::Lz4Refs
        };
        body.extend_from_slice(&[0; 16]);
        entries.push(CellEntry {
            sealed_len: u32::try_from(body.len() - start).unwrap(),
            encoding,
            references: references.clone(),
        });
    }
    let mut directory = Vec::new();
    write_directory(&entries, &mut directory);
    let clear = [table.bytes(), &directory].concat();
    let header = FrameHeader {
        flags: FrameFlags(0),
        group: context.group,
        generation: context.generation,
        incarnation: context.incarnation,
        frame_no: FrameNo(frame_no),
        suite: context.suite,
        first_seq: table.first_seq(),
        first_time: table.first_time(),
        last_time: table.last_time(),
        record_count: u32::try_from(table.records()).unwrap(),
        payload_blocks: u32::try_from(table.payload_blocks()).unwrap(),
        table_len: u32::try_from(table.bytes().len()).unwrap(),
        directory_len: u32::try_from(directory.len()).unwrap(),
        cells_len: u32::try_from(body.len()).unwrap(),
        ref_floor: FrameNo(floor),
        table_digest: sha256(&clear),
        header_tag: [0; 16],
        body_digest: [0; 32],
        prev: [0; 32],
        nonce_random: 77,
    };
    let bytes = [&[0; FRAME_HEADER_LEN][..], &clear, &body].concat();
    let cipher = context.key.frame(header.frame_no, header.nonce_random);
    seal(header, &cipher, &entries, bytes)
}

fn frame_with_references(
    frame_no: u32,
    floor: u32,
    payload: &[u8],
    cells: &[(Vec<Reference>, Vec<u8>)],
) -> Vec<u8> {
    let context = context(Suite::Aes256Gcm);
    let records = writes(payload.len() / BLOCK_SIZE);
    let frame = with_references(&context, (frame_no, floor), &records, payload, cells);
    frame.link([u8::from(frame_no != 0); 32]).1
}

fn reference(frames_back: u32, first_block: usize, blocks: u8) -> Reference {
    Reference {
        frames_back,
        first_block: u32::try_from(first_block).unwrap(),
        blocks,
    }
}

#[test]
fn references_are_followed_within_and_across_frames() {
    let key = context(Suite::Aes256Gcm).key;
    let block = |payload: &[u8], at: usize| payload[at * BLOCK_SIZE..][..BLOCK_SIZE].to_vec();
    // Frame 0: noise. Frame 1: cell 0 repeats blocks 14..18 of it (two cells), cell 1 repeats
    // cell 0 of its own frame and block 3 of frame 0.
    let base = noise(20, 1);
    let cell = base[14 * BLOCK_SIZE..18 * BLOCK_SIZE].repeat(4);
    let mut payload = cell.clone();
    payload[100] ^= 0xff;
    let mut second = payload[..BLOCK_SIZE].to_vec();
    second.extend_from_slice(&block(&base, 3));
    payload.extend_from_slice(&second);
    let dictionary_0 = base[14 * BLOCK_SIZE..18 * BLOCK_SIZE].to_vec();
    let dictionary_1 = [block(&payload, 0), block(&base, 3)].concat();
    let mut frames = Frames::default();
    frames.frames.insert(
        0,
        frame_with_references(0, 0, &base, &[(vec![], vec![]), (vec![], vec![])]),
    );
    frames.frames.insert(
        1,
        frame_with_references(
            1,
            0,
            &payload,
            &[
                (vec![reference(1, 14, 4)], dictionary_0),
                (vec![reference(0, 0, 1), reference(1, 3, 1)], dictionary_1),
            ],
        ),
    );
    let mut raw = Vec::new();
    assert_eq!(
        open_cell(&key, &frames, FrameNo(1), 0, &mut raw).unwrap(),
        3
    );
    assert!(raw == payload[..16 * BLOCK_SIZE]);
    // Cell 1, cell 0, both cells of frame 0; the shared one is opened once.
    *frames.cells_read.borrow_mut() = 0;
    assert_eq!(
        open_cell(&key, &frames, FrameNo(1), 1, &mut raw).unwrap(),
        4
    );
    assert_eq!(*frames.cells_read.borrow(), 4);
    assert!(raw == payload[16 * BLOCK_SIZE..]);

    frames.frames.remove(&0);
    let missing = open_cell(&key, &frames, FrameNo(1), 0, &mut raw);
    assert!(matches!(missing, Err(CodecError::Source(_))));
}

#[test]
fn a_chain_of_references_is_bounded() {
    let key = context(Suite::Aes256Gcm).key;
    let payload = noise(1, 1);
    let mut frames = Frames::default();
    frames.frames.insert(
        0,
        frame_with_references(0, 0, &payload, &[(vec![], vec![])]),
    );
    let limit = u32::try_from(REFERENCE_CELLS_MAX).unwrap();
    for frame_no in 1..=limit {
        let cells = [(vec![reference(1, 0, 1)], payload.clone())];
        frames.frames.insert(
            frame_no,
            frame_with_references(frame_no, 0, &payload, &cells),
        );
    }
    let mut raw = Vec::new();
    let opened = open_cell(&key, &frames, FrameNo(limit - 1), 0, &mut raw).unwrap();
    assert_eq!(opened, REFERENCE_CELLS_MAX);
    assert!(raw == payload);
    *frames.cells_read.borrow_mut() = 0;
    let refused = open_cell(&key, &frames, FrameNo(limit), 0, &mut raw);
    assert!(matches!(refused, Err(CodecError::Cell { .. })));
    assert_eq!(
        *frames.cells_read.borrow(),
        0,
        "nothing is read on the way to a refusal"
    );
}

/// Wide and deep at once: without a memory of what is open this would be 16^8 cells.
#[test]
fn a_bush_of_references_is_bounded() {
    let key = context(Suite::Aes256Gcm).key;
    let payload = noise(32, 1);
    let mut frames = Frames::default();
    let raw_cells = [(vec![], vec![]), (vec![], vec![])];
    frames
        .frames
        .insert(0, frame_with_references(0, 0, &payload, &raw_cells));
    for frame_no in 1..=30 {
        // Both cells refer to both cells of the frame before.
        let both = |at: usize| {
            let other = 16 - at;
            (
                vec![reference(1, other, 1), reference(1, at, 15)],
                [
                    &payload[other * BLOCK_SIZE..][..BLOCK_SIZE],
                    &payload[at * BLOCK_SIZE..][..15 * BLOCK_SIZE],
                ]
                .concat(),
            )
        };
        let mut own = payload.clone();
        own[15 * BLOCK_SIZE..16 * BLOCK_SIZE].fill(0);
        own[31 * BLOCK_SIZE..].fill(0);
        let cells = [both(0), both(16)];
        frames
            .frames
            .insert(frame_no, frame_with_references(frame_no, 0, &own, &cells));
    }
    let mut raw = Vec::new();
    let opened = open_cell(&key, &frames, FrameNo(8), 0, &mut raw).unwrap();
    assert_eq!(opened, 1 + 2 * 8);
    assert!(raw[..15 * BLOCK_SIZE] == payload[..15 * BLOCK_SIZE]);
    assert!(open_cell(&key, &frames, FrameNo(30), 0, &mut raw).is_err());
}

#[test]
fn a_reference_behind_the_end_of_a_frame_is_an_error() {
    let key = context(Suite::Aes256Gcm).key;
    let payload = noise(1, 1);
    for first_block in [1, 16, 400] {
        let mut frames = Frames::default();
        frames.frames.insert(
            0,
            frame_with_references(0, 0, &payload, &[(vec![], vec![])]),
        );
        let cells = [(vec![reference(1, first_block, 1)], payload.clone())];
        frames
            .frames
            .insert(1, frame_with_references(1, 0, &payload, &cells));
        let opened = open_cell(&key, &frames, FrameNo(1), 0, &mut Vec::new());
        assert!(
            matches!(opened, Err(CodecError::Cell { .. })),
            "{first_block}"
        );
    }
}
