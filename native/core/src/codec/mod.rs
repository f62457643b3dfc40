//! Raw blocks to sealed frames and back. No I/O, no threads: the tap owns both.
//!
//! A cell's plaintext is XXH3-64 of its raw bytes (u64) | encoded bytes. The encoder of this
//! version finds no references; the decoder follows them (design section 4), through
//! `BlockSource`, and refuses a block that needs more than `REFERENCE_CELLS_MAX` cells.

use crate::crypto::{CryptoError, IncarnationKey};
use crate::format::FormatError;
use crate::format::frame::{AAD_LEN, Digest, FrameHeader};
use crate::format::record::{CellEntry, Record};
use crate::types::{FrameNo, Generation, GroupId, IncarnationId};

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    #[error("cell {cell} of frame {frame}: {reason}", frame = frame.0)]
    Cell {
        frame: FrameNo,
        cell: u32,
        reason: &'static str,
    },
    #[error("reading what a reference names failed: {0}")]
    Source(String),
}

/// How hard the encoder tries; the tap lowers it under load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effort {
    Raw,
    Lz4,
}

/// What all frames of an incarnation have in common.
#[derive(Debug, Clone)]
pub struct FrameContext {
    pub group: GroupId,
    pub generation: Generation,
    pub incarnation: IncarnationId,
    pub suite: u16,
    pub key: IncarnationKey,
}

/// A frame, sealed but for its place in the chain: `prev` and checksum are still open.
#[derive(Debug)]
pub struct UnlinkedFrame {
    pub header: FrameHeader,
    /// Whole frame; the first `FRAME_HEADER_LEN` bytes are written by `link`.
    pub bytes: Vec<u8>,
}

impl UnlinkedFrame {
    /// Sets `prev`, writes the header and returns the frame and its digest. Cheap: one hash.
    pub fn link(self, prev: Digest) -> (FrameHeader, Vec<u8>, Digest) {
        let _ = prev;
        todo!()
    }
}

/// Encodes and seals one frame. Scratch memory is kept between frames.
#[derive(Debug, Default)]
pub struct FrameEncoder {
    _scratch: Vec<u8>,
}

impl FrameEncoder {
    /// `payload` is the stream of stored blocks in record order, in pieces of whole blocks; a cell
    /// that one piece covers is not copied.
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
        let _ = (context, frame_no, flags, records, payload, effort);
        todo!()
    }
}

/// The part of a stored frame that a reader of its cells keeps: header and cell directory.
#[derive(Debug, Clone)]
pub struct FrameMap {
    pub header: FrameHeader,
    pub directory: Vec<CellEntry>,
    /// Offset of each sealed cell from the start of the frame.
    pub cell_offsets: Vec<u32>,
    /// Header bytes `[0, AAD_LEN)`.
    pub aad: [u8; AAD_LEN],
}

impl FrameMap {
    /// From header, record table and directory bytes (`[0, header + table + directory)` of the
    /// frame); checks `table_digest`.
    pub fn parse(head: &[u8]) -> Result<Self, FormatError> {
        let _ = head;
        todo!()
    }
}

/// Where frames of one incarnation are read from.
pub trait FrameSource {
    fn map(&self, frame_no: FrameNo) -> Result<std::sync::Arc<FrameMap>, CodecError>;

    /// Reads one sealed cell (`directory[cell].sealed_len` bytes) into `out`.
    fn sealed(&self, frame: &FrameMap, cell: u32, out: &mut Vec<u8>) -> Result<(), CodecError>;
}

/// Opens one cell into `raw` (`16 * 4096` bytes, fewer for the last cell), following references.
/// Verifies tag and content digest. Returns how many cells it had to open.
pub fn open_cell(
    key: &IncarnationKey,
    source: &dyn FrameSource,
    frame_no: FrameNo,
    cell: u32,
    raw: &mut Vec<u8>,
) -> Result<usize, CodecError> {
    let _ = (key, source, frame_no, cell, raw);
    todo!()
}
