//! Cell directory: writer and reader of the entries that `record` lays out.

use super::FormatError;
use super::frame::{CELL_OVERHEAD, FrameHeader};
use super::record::{CellEncoding, CellEntry, Reference};
use super::varint::{Reader, put_varint};
use crate::constants::{BLOCK_SIZE, CELL_BLOCKS, FRAME_BLOCKS_MAX};

const WHAT: &str = "cell directory";

/// Blocks that all references of one cell name together: LZ4 looks back no further than 64 KiB.
pub const REFERENCE_BLOCKS_MAX: usize = CELL_BLOCKS;

fn field_error(field: &'static str, reason: &'static str) -> FormatError {
    FormatError::Field {
        what: WHAT,
        field,
        reason,
    }
}

/// Appends the directory of `cells` to `out`. The entries must satisfy what `read_directory`
/// checks; the encoder's tests hold both together.
pub fn write_directory(cells: &[CellEntry], out: &mut Vec<u8>) {
    for cell in cells {
        out.extend_from_slice(&cell.sealed_len.to_le_bytes()[..3]);
        out.push(cell.encoding as u8);
        let count = u8::try_from(cell.references.len());
        out.push(count.expect("invariant: references name at most REFERENCE_BLOCKS_MAX blocks"));
        for reference in &cell.references {
            put_varint(out, u64::from(reference.frames_back));
            put_varint(out, u64::from(reference.first_block));
            out.push(reference.blocks);
        }
    }
}

/// Decodes the cell directory of a frame and checks it against the header: lengths add up, and
/// references reach neither below `ref_floor` nor forward.
pub fn read_directory(header: &FrameHeader, bytes: &[u8]) -> Result<Vec<CellEntry>, FormatError> {
    let mut reader = Reader::new(WHAT, bytes);
    // The header limits the payload, so this allocation is small.
    let mut cells = Vec::with_capacity(header.cell_count().min(FRAME_BLOCKS_MAX));
    let mut sum = 0u64;
    let mut references = 0;
    for cell in 0..header.cell_count() {
        let entry = read_entry(header, cell, &mut reader)?;
        sum += u64::from(entry.sealed_len);
        references += entry.references.len();
        cells.push(entry);
    }
    if reader.remaining() != 0 {
        return Err(field_error("directory_len", "bytes behind the last cell"));
    }
    if sum != u64::from(header.cells_len) {
        return Err(field_error("cells_len", "not the sum of the cells"));
    }
    if references == 0 && header.ref_floor != header.frame_no {
        return Err(field_error(
            "ref_floor",
            "not the frame itself, though nothing is referenced",
        ));
    }
    Ok(cells)
}

fn read_entry(
    header: &FrameHeader,
    cell: usize,
    reader: &mut Reader<'_>,
) -> Result<CellEntry, FormatError> {
    let sealed_len = reader.u24()?;
    let encoding =
        CellEncoding::from_u8(reader.u8()?).ok_or_else(|| field_error("encoding", "unknown"))?;
    let raw_sealed = header.cell_blocks(cell) * BLOCK_SIZE + CELL_OVERHEAD;
    let fits = match encoding {
        CellEncoding::Raw => sealed_len as usize == raw_sealed,
        CellEncoding::Lz4 | CellEncoding::Lz4Refs => {
            (sealed_len as usize) < raw_sealed && sealed_len as usize > CELL_OVERHEAD
        }
    };
    if !fits {
        return Err(field_error("sealed_len", "not a length of this encoding"));
    }
    let count = usize::from(reader.u8()?);
    if (count != 0) != (encoding == CellEncoding::Lz4Refs) || count > REFERENCE_BLOCKS_MAX {
        return Err(field_error(
            "references",
            "a number that this encoding does not have",
        ));
    }
    let back_max = u64::from(header.frame_no.0 - header.ref_floor.0);
    let mut blocks_left = REFERENCE_BLOCKS_MAX;
    let mut references = Vec::with_capacity(count);
    for _ in 0..count {
        let frames_back = reader.varint_at_most("frames_back", back_max)?;
        // A reference within the frame names whole earlier cells' blocks: there are no cycles.
        let end_max = if frames_back == 0 {
            cell * CELL_BLOCKS
        } else {
            FRAME_BLOCKS_MAX
        };
        let first_block = reader.varint_at_most("first_block", end_max as u64)?;
        let blocks = reader.u8()?;
        if blocks == 0 || first_block + u64::from(blocks) > end_max as u64 {
            return Err(field_error(
                "references",
                "blocks that the cell cannot refer to",
            ));
        }
        blocks_left = blocks_left
            .checked_sub(usize::from(blocks))
            .ok_or_else(|| field_error("references", "more blocks than a dictionary holds"))?;
        references.push(Reference {
            frames_back: u32::try_from(frames_back).expect("invariant: at most frame_no"),
            first_block: u32::try_from(first_block).expect("invariant: at most FRAME_BLOCKS_MAX"),
            blocks,
        });
    }
    Ok(CellEntry {
        sealed_len,
        encoding,
        references,
    })
}
