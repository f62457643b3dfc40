//! Segment: header, then frames of one incarnation back to back. Sealed segments are immutable.

use super::FormatError;
use super::frame::Digest;
use crate::types::{FrameNo, Generation, GroupId, IncarnationId, Seq, TimeUs};

pub const SEGMENT_MAGIC: [u8; 8] = *b"EBBSEGMT";
pub const SEGMENT_VERSION: u16 = 1;
pub const SEGMENT_HEADER_LEN: usize = 256;

/// What a reader of an incarnation must know besides the group key. Repeated at the head of each
/// of its segments and sent before its first frame; 256 bytes, the same bytes everywhere but for
/// `first_frame`.
///
/// ```text
///   0 magic[8] "EBBSEGMT"     8 version u16     10 header_len u16    12 flags u32 (0)
///  16 group[16]
///  32 generation.counter u64  40 generation.site u64
///  48 incarnation[16]
///  64 salt[32]                HKDF salt of the incarnation's key
///  96 suite u16               98 reserved[2]   100 first_frame u32   (of this segment)
/// 104 created_us u64         112 first_seq u64  (of the incarnation)
/// 120 parent_incarnation[16] zero if none
/// 136 parent_frame_no u32    140 reserved[4]    last frame its writer knew
/// 144 parent_digest[32]
/// 176 reserved[72]
/// 248 checksum u64
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentHeader {
    pub group: GroupId,
    pub generation: Generation,
    pub incarnation: IncarnationId,
    pub salt: [u8; 32],
    pub suite: u16,
    pub first_frame: FrameNo,
    pub created: TimeUs,
    pub first_seq: Seq,
    pub parent: Option<Parent>,
}

/// The last frame that the writer of an incarnation knew when it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parent {
    pub incarnation: IncarnationId,
    pub frame_no: FrameNo,
    pub digest: Digest,
}

impl SegmentHeader {
    pub fn encode(&self) -> [u8; SEGMENT_HEADER_LEN] {
        todo!()
    }

    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let _ = bytes;
        todo!()
    }
}
