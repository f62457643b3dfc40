//! Records and raw blocks to a sealed frame.
//!
//! Everything is appended to one buffer, the frame itself: cells are compressed into it, then
//! sealed where they lie. Sealing needs `table_digest`, the directory needs the cells' lengths;
//! without references its own length is known beforehand.

use xxhash_rust::xxh3::xxh3_64;

use super::{CodecError, Effort, FrameContext, UnlinkedFrame, lz4};
use crate::constants::{BLOCK_SIZE, CELL_BLOCKS, CELL_SIZE};
use crate::crypto::{FrameCipher, HEADER_CELL, TAG_LEN, random_bytes};
use crate::format::FormatError;
use crate::format::digest::sha256;
use crate::format::frame::{
    AAD_LEN, CELL_OVERHEAD, DIRECTORY_ENTRY_LEN, FRAME_HEADER_LEN, FrameFlags, FrameHeader,
};
use crate::format::record::{CellEncoding, CellEntry, Record, TableWriter, write_directory};
use crate::types::FrameNo;

/// Bytes of the content digest at the head of a cell's plaintext.
pub(super) const CONTENT_DIGEST_LEN: usize = 8;
const _: () = assert!(CONTENT_DIGEST_LEN + TAG_LEN == CELL_OVERHEAD);

/// A cell must shrink by 1/20 to be worth the reader's decompression.
const GAIN_SHARE: usize = 20;
/// A cell of at least so many blocks is sampled first, unless the one before was worth it: of each
/// block this share, in one piece.
const SAMPLE_BLOCKS_MIN: usize = 4;
const SAMPLE_LEN: usize = BLOCK_SIZE / 4;
/// Under `Effort::Quick` a cell is compressed if the one tried last shrank to this share. What LZ4
/// halves it takes in at some GB/s, and hash, cipher, spool and wire are spared the other half;
/// what hardly shrinks it takes in at a tenth of that.
const QUICK_SHARE: usize = 2;
/// One cell in so many is tried all the same, so that other data is noticed.
const QUICK_PROBE: u32 = 16;

/// Encodes and seals one frame. Scratch memory is kept between frames.
#[derive(Debug, Default)]
pub struct FrameEncoder {
    table: TableWriter,
    cells: Vec<CellEntry>,
    directory: Vec<u8>,
    compressor: Compressor,
    /// Blocks of a cell that several pieces hold.
    gathered: Vec<u8>,
}

impl FrameEncoder {
    /// `payload` is the stream of stored blocks in record order, in pieces of whole blocks; a cell
    /// that one piece covers is not copied. `flags` says `IN_SPAN` and `COMPACTED`; `EVENTS`
    /// follows from the records. Refuses records and payload that disagree, and a frame beyond the
    /// limits.
    #[allow(clippy::too_many_arguments)]
    pub fn encode(
        &mut self,
        context: &FrameContext,
        frame_no: FrameNo,
        flags: u32,
        records: &[Record],
        payload: &[&[u8]],
        effort: Effort,
    ) -> Result<UnlinkedFrame, CodecError> {
        self.table.clear();
        for record in records {
            self.table.push(record)?;
        }
        let blocks = self.table.payload_blocks();
        check_payload(blocks, payload)?;
        let cell_count = blocks.div_ceil(CELL_BLOCKS);
        let table = self.table.bytes();
        let cells_at = FRAME_HEADER_LEN + table.len() + cell_count * DIRECTORY_ENTRY_LEN;

        let cells_max = blocks * BLOCK_SIZE + cell_count * CELL_OVERHEAD;
        let mut bytes = Vec::with_capacity(cells_at + cells_max);
        bytes.resize(FRAME_HEADER_LEN, 0);
        bytes.extend_from_slice(table);
        bytes.resize(cells_at, 0);
        self.cells.clear();
        let mut pieces = Pieces {
            rest: payload,
            at: 0,
        };
        let mut left = blocks * BLOCK_SIZE;
        while left > 0 {
            let raw = pieces.next(left.min(CELL_SIZE), &mut self.gathered);
            left -= raw.len();
            self.cells
                .push(self.compressor.append_cell(raw, effort, &mut bytes));
        }
        self.directory.clear();
        write_directory(&self.cells, &mut self.directory);
        bytes[cells_at - self.directory.len()..cells_at].copy_from_slice(&self.directory);

        let header = self.header(context, frame_no, flags, &bytes, cells_at)?;
        let cipher = context.key.frame(frame_no, header.nonce_random);
        Ok(seal(header, &cipher, &self.cells, bytes))
    }

    /// The header, as far as it is known before the seals.
    fn header(
        &self,
        context: &FrameContext,
        frame_no: FrameNo,
        flags: u32,
        bytes: &[u8],
        cells_at: usize,
    ) -> Result<FrameHeader, CodecError> {
        let events = if self.table.has_events() {
            FrameFlags::EVENTS
        } else {
            0
        };
        let header = FrameHeader {
            flags: FrameFlags(flags & !FrameFlags::EVENTS | events),
            group: context.group,
            generation: context.generation,
            incarnation: context.incarnation,
            frame_no,
            suite: context.suite,
            first_seq: self.table.first_seq(),
            first_time: self.table.first_time(),
            last_time: self.table.last_time(),
            record_count: length("record_count", self.table.records())?,
            payload_blocks: length("payload_blocks", self.table.payload_blocks())?,
            table_len: length("table_len", self.table.bytes().len())?,
            directory_len: length("directory_len", self.directory.len())?,
            cells_len: length("cells_len", bytes.len() - cells_at)?,
            ref_floor: frame_no,
            table_digest: sha256(&bytes[FRAME_HEADER_LEN..cells_at]),
            header_tag: [0; TAG_LEN],
            body_digest: [0; 32],
            prev: [0; 32],
            nonce_random: u32::from_le_bytes(random_bytes()?),
        };
        header.check()?;
        Ok(header)
    }
}

fn length(field: &'static str, value: usize) -> Result<u32, FormatError> {
    u32::try_from(value).map_err(|_| FormatError::Limit {
        what: "frame header",
        field,
        value: value as u64,
        limit: u64::from(u32::MAX),
    })
}

/// The pieces must be whole blocks and as many as the records say.
fn check_payload(blocks: usize, payload: &[&[u8]]) -> Result<(), FormatError> {
    let error = |reason| FormatError::Field {
        what: "frame payload",
        field: "pieces",
        reason,
    };
    if payload.iter().any(|piece| piece.len() % BLOCK_SIZE != 0) {
        return Err(error("a piece is not of whole blocks"));
    }
    if payload
        .iter()
        .map(|piece| piece.len() / BLOCK_SIZE)
        .sum::<usize>()
        != blocks
    {
        return Err(error("not as many blocks as the records store"));
    }
    Ok(())
}

/// Seals the cells of a frame in place, then computes tag and digest of the whole. `bytes` holds
/// header space, table, directory and cells with space for their tags; `header` has all fields of
/// the additional data.
pub(super) fn seal(
    mut header: FrameHeader,
    cipher: &FrameCipher,
    cells: &[CellEntry],
    mut bytes: Vec<u8>,
) -> UnlinkedFrame {
    let encoded = header.encode();
    let aad = &encoded[..AAD_LEN];
    let mut rest = &mut bytes[header.head_len()..];
    for (index, cell) in (0u32..).zip(cells) {
        let (sealed, behind) = rest.split_at_mut(cell.sealed_len as usize);
        let (text, tag) = sealed.split_at_mut(sealed.len() - TAG_LEN);
        tag.copy_from_slice(&cipher.seal(index, aad, text));
        rest = behind;
    }
    header.header_tag = cipher.seal(HEADER_CELL, aad, &mut []);
    header.body_digest = sha256(&bytes[FRAME_HEADER_LEN..]);
    UnlinkedFrame { header, bytes }
}

/// Cuts the payload stream into cells.
struct Pieces<'a> {
    rest: &'a [&'a [u8]],
    /// Bytes of the first piece that are taken.
    at: usize,
}

impl<'a> Pieces<'a> {
    /// The next `len` bytes; the pieces hold at least so many. `gathered` is used if no single
    /// piece has them.
    fn next<'b>(&mut self, len: usize, gathered: &'b mut Vec<u8>) -> &'b [u8]
    where
        'a: 'b,
    {
        self.skip_taken();
        if let Some(whole) = self.rest[0].get(self.at..self.at + len) {
            self.at += len;
            return whole;
        }
        gathered.clear();
        while gathered.len() < len {
            self.skip_taken();
            let piece = &self.rest[0][self.at..];
            let taken = piece.len().min(len - gathered.len());
            gathered.extend_from_slice(&piece[..taken]);
            self.at += taken;
        }
        gathered
    }

    fn skip_taken(&mut self) {
        while self.at == self.rest[0].len() {
            self.rest = &self.rest[1..];
            self.at = 0;
        }
    }
}

/// Chooses an encoding for each cell.
#[derive(Debug, Default)]
struct Compressor {
    /// The cell before was worth compressing; then most often this one is, too.
    trusting: bool,
    /// The cell compressed last shrank to `QUICK_SHARE`.
    quick: bool,
    /// Cells stored under `Effort::Quick` since one was tried.
    untried: u32,
    sample: Vec<u8>,
    sample_out: Vec<u8>,
}

impl Compressor {
    /// Appends content digest, encoded bytes and space for the tag.
    fn append_cell(&mut self, raw: &[u8], effort: Effort, bytes: &mut Vec<u8>) -> CellEntry {
        let start = bytes.len();
        bytes.extend_from_slice(&xxh3_64(raw).to_le_bytes());
        let tried = self.tries(effort);
        let compressed =
            tried && self.promising(raw) && lz4::compress_append(raw, len_max(raw.len()), bytes);
        self.trusting = compressed;
        if tried {
            self.quick = compressed && (bytes.len() - start) * QUICK_SHARE <= raw.len();
        }
        let encoding = if compressed {
            CellEncoding::Lz4
        } else {
            bytes.extend_from_slice(raw);
            CellEncoding::Raw
        };
        bytes.resize(bytes.len() + TAG_LEN, 0);
        let sealed_len = u32::try_from(bytes.len() - start);
        let sealed_len = sealed_len.expect("invariant: a cell is about 64 KiB");
        CellEntry {
            sealed_len,
            encoding,
            references: Vec::new(),
        }
    }

    fn tries(&mut self, effort: Effort) -> bool {
        match effort {
            Effort::Raw => false,
            Effort::Quick if !self.quick => {
                self.untried = (self.untried + 1) % QUICK_PROBE;
                self.untried == 0
            }
            Effort::Quick | Effort::Lz4 => true,
        }
    }

    /// Whether a sample of the cell shrinks. Incompressible cells (encrypted data, images) then
    /// cost a fraction of a whole compression.
    fn promising(&mut self, raw: &[u8]) -> bool {
        if self.trusting || raw.len() < SAMPLE_BLOCKS_MIN * BLOCK_SIZE {
            return true;
        }
        self.sample.clear();
        for (index, block) in raw.chunks_exact(BLOCK_SIZE).enumerate() {
            // Another part of each block: pages have headers at one end, free space at the other.
            let from = index % (BLOCK_SIZE / SAMPLE_LEN) * SAMPLE_LEN;
            self.sample
                .extend_from_slice(&block[from..from + SAMPLE_LEN]);
        }
        self.sample_out.clear();
        lz4::compress_append(
            &self.sample,
            len_max(self.sample.len()),
            &mut self.sample_out,
        )
    }
}

/// Bytes that the compressed form of `raw_len` bytes may take.
fn len_max(raw_len: usize) -> usize {
    raw_len - raw_len / GAIN_SHARE
}
