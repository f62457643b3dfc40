//! Raw blocks to sealed frames and back. No I/O, no threads: the tap owns both.
//!
//! A cell's plaintext is XXH3-64 of its raw bytes (u64) | encoded bytes. The encoder of this
//! version finds no references; the decoder follows them (design section 4), through
//! `BlockSource`, and refuses a block that needs more than `REFERENCE_CELLS_MAX` cells.

mod decode;
mod encode;
mod lz4;

pub use decode::open_cell;
pub use encode::FrameEncoder;

use crate::crypto::{CryptoError, IncarnationKey};
use crate::format::FormatError;
use crate::format::frame::{AAD_LEN, Digest, FRAME_HEADER_LEN, FrameHeader, frame_digest};
use crate::format::record::CellEntry;
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
    /// Stores cells as they are.
    Raw,
    /// Compresses what compresses so well that it is sooner sealed, written and shipped for it;
    /// stores the rest as it is.
    Quick,
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
    /// `prev` is zero for frame 0 and for no other.
    pub fn link(mut self, prev: Digest) -> (FrameHeader, Vec<u8>, Digest) {
        debug_assert!(
            self.header.frame_no.0 != 0 || prev == [0; 32],
            "frame 0 begins the chain"
        );
        self.header.prev = prev;
        let header = self.header.encode();
        self.bytes[..FRAME_HEADER_LEN].copy_from_slice(&header);
        (self.header, self.bytes, frame_digest(&header))
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

/// Where frames of one incarnation are read from.
pub trait FrameSource {
    fn map(&self, frame_no: FrameNo) -> Result<std::sync::Arc<FrameMap>, CodecError>;

    /// Reads one sealed cell (`directory[cell].sealed_len` bytes) into `out`.
    fn sealed(&self, frame: &FrameMap, cell: u32, out: &mut Vec<u8>) -> Result<(), CodecError>;
}

#[cfg(test)]
mod tests;
