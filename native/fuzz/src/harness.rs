//! One function a format: takes any bytes, panics if the parser accepts what it should not.
//!
//! Checksums and digests would keep a fuzzer at the door, so harnesses make them right first; the
//! tests of `format` show that wrong ones are refused. What is accepted must encode to the same
//! bytes: each format has one form.

use std::sync::Arc;

use ebbtide_core::codec::{CodecError, FrameMap, FrameSource, open_cell};
use ebbtide_core::constants::{BLOCK_SIZE, FRAME_BYTES_MAX, REFERENCE_CELLS_MAX};
use ebbtide_core::crypto::{GroupKey, HEADER_CELL, IncarnationKey, Suite, TAG_LEN};
use ebbtide_core::format::digest::sha256;
use ebbtide_core::format::frame::{
    AAD_LEN, FRAME_HEADER_LEN, FrameFlags, FrameHeader, verify_body,
};
use ebbtide_core::format::manifest::{MANIFEST_HEADER_LEN, Manifest};
use ebbtide_core::format::record::{
    Record, TableWriter, read_directory, read_table, write_directory,
};
use ebbtide_core::format::segment::{SEGMENT_HEADER_LEN, SegmentHeader};
use ebbtide_core::types::{FrameNo, Generation, GroupId, IncarnationId, Seq, TimeUs};
use xxhash_rust::xxh3::xxh3_64;

/// Key of all frames that harnesses and their tests make.
pub fn key() -> IncarnationKey {
    let (group, incarnation) = (GroupId([2; 16]), IncarnationId([3; 16]));
    IncarnationKey::derive(
        Suite::Aes256Gcm,
        &GroupKey([1; 32]),
        group,
        incarnation,
        &[4; 32],
    )
}

/// Makes the checksum at the end of a fixed header right.
fn with_checksum(data: &[u8], header_len: usize) -> Option<Vec<u8>> {
    let mut bytes = data.to_vec();
    let (covered, checksum) = bytes.get_mut(..header_len)?.split_at_mut(header_len - 8);
    checksum.copy_from_slice(&xxh3_64(covered).to_le_bytes());
    Some(bytes)
}

pub fn frame_header(data: &[u8]) {
    let _ = FrameHeader::parse(data);
    let Some(bytes) = with_checksum(data, FRAME_HEADER_LEN) else {
        return;
    };
    if let Ok(header) = FrameHeader::parse(&bytes) {
        assert_eq!(header.encode()[..], bytes[..FRAME_HEADER_LEN]);
        assert!(header.frame_len() <= FRAME_BYTES_MAX);
        assert!(header.end_seq() > header.first_seq);
        assert!(header.head_len() <= header.frame_len());
    }
}

pub fn segment_header(data: &[u8]) {
    let _ = SegmentHeader::parse(data);
    let Some(bytes) = with_checksum(data, SEGMENT_HEADER_LEN) else {
        return;
    };
    if let Ok(header) = SegmentHeader::parse(&bytes) {
        assert_eq!(header.encode()[..], bytes[..SEGMENT_HEADER_LEN]);
    }
}

/// `data` is a file, or a body that gets its header made.
pub fn manifest(data: &[u8]) {
    let _ = Manifest::parse(data);
    let mut bytes = Manifest::default().encode();
    bytes.truncate(MANIFEST_HEADER_LEN);
    bytes[16..24].copy_from_slice(&(data.len() as u64).to_le_bytes());
    bytes[32..40].copy_from_slice(&xxh3_64(data).to_le_bytes());
    bytes.extend_from_slice(data);
    let bytes = with_checksum(&bytes, MANIFEST_HEADER_LEN).expect("a header was made");
    if let Ok(manifest) = Manifest::parse(&bytes) {
        assert_eq!(Manifest::parse(&manifest.encode()), Ok(manifest));
    }
}

/// A header whose sums come from the first bytes of `data`; the rest is left.
fn header_of(data: &[u8]) -> Option<(FrameHeader, &[u8])> {
    let (sums, rest) = data.split_first_chunk::<12>()?;
    let number = |at: usize| u16::from_le_bytes([sums[at], sums[at + 1]]);
    let header = FrameHeader {
        flags: FrameFlags(u32::from(sums[0] & 1)),
        group: GroupId([2; 16]),
        generation: Generation {
            counter: 1,
            site: 1,
        },
        incarnation: IncarnationId([3; 16]),
        frame_no: FrameNo(100),
        suite: 2,
        first_seq: Seq(1),
        first_time: TimeUs(1000),
        last_time: TimeUs(1000 + u64::from(number(2))),
        record_count: u32::from(number(4)).max(1),
        payload_blocks: u32::from(number(6)) % 512,
        table_len: u32::try_from(rest.len()).ok()?,
        directory_len: u32::try_from(rest.len()).ok()?,
        cells_len: u32::from(number(8)) * 37,
        ref_floor: FrameNo(u32::from(sums[10] % 101)),
        table_digest: [0; 32],
        header_tag: [0; 16],
        body_digest: [0; 32],
        prev: [0; 32],
        nonce_random: 0,
    };
    Some((header, rest))
}

pub fn record_table(data: &[u8]) {
    let Some((header, table)) = header_of(data) else {
        return;
    };
    let mut again = TableWriter::default();
    let mut next_block = 0;
    for placed in read_table(&header, table) {
        let Ok(placed) = placed else { return };
        assert_eq!(placed.payload_block as usize, next_block);
        next_block += placed.record.body.stored_blocks();
        let before = again.bytes().len();
        again
            .push(&placed.record)
            .expect("what is read can be written");
        assert!(again.bytes().len() - before <= placed.record.body.encoded_len_max());
    }
    assert_eq!(again.bytes(), table);
    assert_eq!(again.last_time(), header.last_time);
    assert_eq!(next_block, header.payload_blocks as usize);
}

pub fn cell_directory(data: &[u8]) {
    let Some((header, directory)) = header_of(data) else {
        return;
    };
    if let Ok(cells) = read_directory(&header, directory) {
        let mut again = Vec::new();
        write_directory(&cells, &mut again);
        assert_eq!(again, directory);
        assert_eq!(cells.len(), header.cell_count());
    }
}

/// Serves one frame under every number.
struct OneFrame {
    map: Arc<FrameMap>,
    bytes: Vec<u8>,
}

impl FrameSource for OneFrame {
    fn map(&self, _: FrameNo) -> Result<Arc<FrameMap>, CodecError> {
        Ok(Arc::clone(&self.map))
    }

    fn sealed(&self, frame: &FrameMap, cell: u32, out: &mut Vec<u8>) -> Result<(), CodecError> {
        let from = frame.cell_offsets[cell as usize] as usize;
        let len = frame.directory[cell as usize].sealed_len as usize;
        out.clear();
        out.extend_from_slice(&self.bytes[from..from + len]);
        Ok(())
    }
}

/// Makes checksum and digests of a whole frame right, as far as its lengths allow.
fn with_digests(data: &[u8]) -> Option<Vec<u8>> {
    let bytes = with_checksum(data, FRAME_HEADER_LEN)?;
    let header = FrameHeader::parse(&bytes).ok()?;
    let body = bytes.get(FRAME_HEADER_LEN..header.frame_len())?;
    let clear = &body[..header.head_len() - FRAME_HEADER_LEN];
    let header = FrameHeader {
        table_digest: sha256(clear),
        body_digest: sha256(body),
        ..header.clone()
    };
    Some([&header.encode()[..], body].concat())
}

pub fn frame(data: &[u8]) {
    let _ = FrameMap::parse(data);
    let Some(bytes) = with_digests(data) else {
        return;
    };
    let header = FrameHeader::parse(&bytes).expect("it did before its digests were set");
    assert_eq!(verify_body(&header, &bytes[FRAME_HEADER_LEN..]), Ok(()));
    let table = &bytes[FRAME_HEADER_LEN..][..header.table_len as usize];
    let records: Vec<Record> = read_table(&header, table)
        .map_while(Result::ok)
        .map(|placed| placed.record)
        .collect();
    assert!(records.len() <= header.record_count as usize);
    let Ok(map) = FrameMap::parse(&bytes) else {
        return;
    };
    let genuine = map.authenticate(&key()).is_ok();
    let opened = open_all(map, bytes);
    assert!(genuine || opened == 0, "a cell opens under a forged header");
}

/// Opens every cell; returns how many do.
fn open_all(map: FrameMap, bytes: Vec<u8>) -> usize {
    let key = key();
    let header = map.header.clone();
    let source = OneFrame {
        map: Arc::new(map),
        bytes,
    };
    let mut raw = Vec::new();
    let opens = |cell: &usize| {
        let index = u32::try_from(*cell).expect("a frame has few cells");
        let opened = open_cell(&key, &source, header.frame_no, index, &mut raw);
        if let Ok(opened) = opened {
            assert!(opened <= REFERENCE_CELLS_MAX);
            assert_eq!(raw.len(), header.cell_blocks(*cell) * BLOCK_SIZE);
        }
        opened.is_ok()
    };
    (0..header.cell_count()).filter(opens).count()
}

/// Seals header and cells: as if the owner of the key had written what lies in `data` in the clear.
fn with_seals(data: &[u8]) -> Option<Vec<u8>> {
    let bytes = with_digests(data)?;
    let mut header = FrameHeader::parse(&bytes).ok()?;
    let directory = FrameMap::parse(&bytes).ok()?.directory;
    let mut body = bytes[FRAME_HEADER_LEN..].to_vec();
    let aad = &bytes[..AAD_LEN];
    let cipher = key().frame(header.frame_no, header.nonce_random);
    let (_, mut rest) = body.split_at_mut(header.head_len() - FRAME_HEADER_LEN);
    for (index, entry) in (0..).zip(&directory) {
        let (cell, behind) = rest.split_at_mut(entry.sealed_len as usize);
        let (text, tag) = cell.split_at_mut(cell.len() - TAG_LEN);
        tag.copy_from_slice(&cipher.seal(index, aad, text));
        rest = behind;
    }
    header.header_tag = cipher.seal(HEADER_CELL, aad, &mut []);
    header.body_digest = sha256(&body);
    Some([&header.encode()[..], &body].concat())
}

/// `data` is a frame with its cells in the clear: a fuzzer gets past the tags to what they guard.
pub fn sealed_frame(data: &[u8]) {
    let Some(bytes) = with_seals(data) else {
        return;
    };
    let map = FrameMap::parse(&bytes).expect("it did before it was sealed");
    let ours = Suite::try_from(map.header.suite) == Ok(key().suite());
    assert_eq!(map.authenticate(&key()).is_ok(), ours);
    let opened = open_all(map, bytes);
    assert!(ours || opened == 0, "a cell opens under another suite");
}
