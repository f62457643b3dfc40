//! Stored frames to raw blocks: map of a frame, opening of a cell with what it refers to.

use std::collections::HashMap;

use xxhash_rust::xxh3::xxh3_64;

use super::encode::CONTENT_DIGEST_LEN;
use super::{CodecError, FrameMap, FrameSource, lz4};
use crate::constants::{BLOCK_SIZE, CELL_BLOCKS, REFERENCE_CELLS_MAX};
use crate::crypto::{HEADER_CELL, IncarnationKey, Suite, TAG_LEN};
use crate::format::FormatError;
use crate::format::digest::sha256;
use crate::format::frame::{AAD_LEN, CELL_OVERHEAD, FRAME_HEADER_LEN, FrameHeader};
use crate::format::record::{CellEncoding, REFERENCE_BLOCKS_MAX, Reference, read_directory};
use crate::types::FrameNo;

impl FrameMap {
    /// From header, record table and directory bytes (`[0, header + table + directory)` of the
    /// frame, more is not looked at); checks `table_digest`.
    pub fn parse(head: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "record table and cell directory";
        let header = FrameHeader::parse(head)?;
        let need = header.head_len();
        let Some(clear) = head.get(FRAME_HEADER_LEN..need) else {
            return Err(FormatError::Truncated {
                what: WHAT,
                need,
                have: head.len(),
            });
        };
        if sha256(clear) != header.table_digest {
            return Err(FormatError::Digest { what: WHAT });
        }
        let directory = read_directory(&header, &clear[header.table_len as usize..])?;
        let mut offset = u32::try_from(need).expect("invariant: a frame is a few MiB at most");
        let mut cell_offsets = Vec::with_capacity(directory.len());
        for cell in &directory {
            cell_offsets.push(offset);
            offset += cell.sealed_len;
        }
        let aad = head[..AAD_LEN]
            .try_into()
            .expect("invariant: a header is longer");
        Ok(Self {
            header,
            directory,
            cell_offsets,
            aad,
        })
    }

    /// Checks the header tag: who wrote header, records and directory had the key. Each opened
    /// cell proves the same; this is for frames without cells, and for looking at records alone.
    pub fn authenticate(&self, key: &IncarnationKey) -> Result<(), CodecError> {
        check_suite(key, &self.header)?;
        let cipher = key.frame(self.header.frame_no, self.header.nonce_random);
        Ok(cipher.open(HEADER_CELL, &self.aad, &mut [], &self.header.header_tag)?)
    }
}

fn check_suite(key: &IncarnationKey, header: &FrameHeader) -> Result<(), CodecError> {
    let suite = Suite::try_from(header.suite)?;
    if suite == key.suite() {
        return Ok(());
    }
    Err(FormatError::Field {
        what: "frame header",
        field: "suite",
        reason: "not the suite of the incarnation",
    }
    .into())
}

/// Opens one cell into `raw` (`16 * 4096` bytes, fewer for the last cell), following references.
/// Verifies tag and content digest. Returns how many cells it had to open. After an error the
/// content of `raw` is unspecified.
pub fn open_cell(
    key: &IncarnationKey,
    source: &dyn FrameSource,
    frame_no: FrameNo,
    cell: u32,
    raw: &mut Vec<u8>,
) -> Result<usize, CodecError> {
    let mut opener = Opener {
        key,
        source,
        opened: 0,
        referenced: HashMap::new(),
        sealed: Vec::new(),
    };
    opener.open(frame_no, cell, raw)?;
    Ok(opener.opened)
}

/// One call of `open_cell`: its budget, and what it has opened for references.
struct Opener<'a> {
    key: &'a IncarnationKey,
    source: &'a dyn FrameSource,
    opened: usize,
    /// Raw bytes of referenced cells, each opened once.
    referenced: HashMap<(FrameNo, u32), Vec<u8>>,
    sealed: Vec<u8>,
}

impl Opener<'_> {
    /// Recursion ends: a reference leads to an earlier frame or cell, and every step takes from
    /// the budget of cells.
    fn open(&mut self, frame_no: FrameNo, cell: u32, raw: &mut Vec<u8>) -> Result<(), CodecError> {
        let error = |reason| CodecError::Cell {
            frame: frame_no,
            cell,
            reason,
        };
        self.opened += 1;
        if self.opened > REFERENCE_CELLS_MAX {
            return Err(error("needs more cells than a reader opens"));
        }
        let map = self.source.map(frame_no)?;
        if map.header.frame_no != frame_no {
            return Err(error("the source gave another frame"));
        }
        check_suite(self.key, &map.header)?;
        let index = cell as usize;
        let entry = map
            .directory
            .get(index)
            .ok_or_else(|| error("the frame has fewer cells"))?;
        let raw_len = map.header.cell_blocks(index) * BLOCK_SIZE;
        // Before the cell itself: `sealed` serves one cell at a time.
        let dictionary = self.dictionary(frame_no, cell, &entry.references)?;

        self.source.sealed(&map, cell, &mut self.sealed)?;
        let sealed_len = entry.sealed_len as usize;
        if self.sealed.len() != sealed_len || sealed_len < CELL_OVERHEAD {
            return Err(error("not of the length that the directory says"));
        }
        let (text, tag) = self
            .sealed
            .split_at_mut(entry.sealed_len as usize - TAG_LEN);
        let tag: &[u8; TAG_LEN] = (&*tag).try_into().expect("invariant: split at the tag");
        let cipher = self.key.frame(frame_no, map.header.nonce_random);
        cipher
            .open(cell, &map.aad, text, tag)
            .map_err(|_| error("authentication failed: wrong key, or the bytes were changed"))?;
        let (digest, encoded) = text.split_at(CONTENT_DIGEST_LEN);
        raw.resize(raw_len, 0);
        match entry.encoding {
            CellEncoding::Raw if encoded.len() == raw_len => raw.copy_from_slice(encoded),
            CellEncoding::Raw => return Err(error("raw, but not of the cell's length")),
            CellEncoding::Lz4 | CellEncoding::Lz4Refs => {
                if !lz4::decompress(encoded, &dictionary, raw) {
                    return Err(error("not an LZ4 block of the cell's length"));
                }
            }
        }
        if xxh3_64(raw).to_le_bytes() != digest {
            return Err(error("content digest does not match"));
        }
        Ok(())
    }

    /// The referenced blocks, one after another.
    fn dictionary(
        &mut self,
        frame_no: FrameNo,
        cell: u32,
        references: &[Reference],
    ) -> Result<Vec<u8>, CodecError> {
        let mut dictionary = Vec::new();
        for reference in references {
            let error = |reason| CodecError::Cell {
                frame: frame_no,
                cell,
                reason,
            };
            let target = frame_no.0.checked_sub(reference.frames_back).map(FrameNo);
            let target = target.ok_or_else(|| error("refers to before the first frame"))?;
            for block in (0..u32::from(reference.blocks)).map(|at| reference.first_block + at) {
                let of_cell = u32::try_from(block as usize / CELL_BLOCKS);
                let of_cell = of_cell.expect("invariant: a quotient of 32 bits");
                if reference.frames_back == 0 && of_cell >= cell {
                    return Err(error("refers to itself or forward"));
                }
                let raw = self.referenced(target, of_cell)?;
                let from = block as usize % CELL_BLOCKS * BLOCK_SIZE;
                let bytes = raw.get(from..from + BLOCK_SIZE);
                dictionary.extend_from_slice(
                    bytes.ok_or_else(|| error("refers to behind the end of a frame"))?,
                );
                if dictionary.len() > REFERENCE_BLOCKS_MAX * BLOCK_SIZE {
                    return Err(error("refers to more than a dictionary holds"));
                }
            }
        }
        Ok(dictionary)
    }

    fn referenced(&mut self, frame_no: FrameNo, cell: u32) -> Result<&[u8], CodecError> {
        if !self.referenced.contains_key(&(frame_no, cell)) {
            let mut raw = Vec::new();
            self.open(frame_no, cell, &mut raw)?;
            self.referenced.insert((frame_no, cell), raw);
        }
        Ok(&self.referenced[&(frame_no, cell)])
    }
}
