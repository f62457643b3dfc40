//! Segment: header, then frames of one incarnation back to back. Sealed segments are immutable.

use super::FormatError;
use super::digest::Digest;
use super::layout::{self, Field, Format};
use crate::constants::INCARNATION_FRAMES_MAX;
use crate::types::{FrameNo, Generation, GroupId, IncarnationId, Seq, TimeUs};

pub const SEGMENT_MAGIC: [u8; 8] = *b"EBBSEGMT";
pub const SEGMENT_VERSION: u16 = 1;
pub const SEGMENT_HEADER_LEN: usize = 256;

const GROUP: Field = Field::new("group", 16, 16);
const GENERATION_COUNTER: Field = Field::new("generation_counter", 32, 8);
const GENERATION_SITE: Field = Field::new("generation_site", 40, 8);
const INCARNATION: Field = Field::new("incarnation", 48, 16);
const SALT: Field = Field::new("salt", 64, 32);
const SUITE: Field = Field::new("suite", 96, 2);
const RESERVED_98: Field = Field::new("reserved_98", 98, 2);
const FIRST_FRAME: Field = Field::new("first_frame", 100, 4);
const CREATED: Field = Field::new("created_us", 104, 8);
const FIRST_SEQ: Field = Field::new("first_seq", 112, 8);
const PARENT_INCARNATION: Field = Field::new("parent_incarnation", 120, 16);
const PARENT_FRAME_NO: Field = Field::new("parent_frame_no", 136, 4);
const RESERVED_140: Field = Field::new("reserved_140", 140, 4);
const PARENT_DIGEST: Field = Field::new("parent_digest", 144, 32);
const RESERVED_176: Field = Field::new("reserved_176", 176, 72);
const OWN: &[Field] = &[
    GROUP,
    GENERATION_COUNTER,
    GENERATION_SITE,
    INCARNATION,
    SALT,
    SUITE,
    RESERVED_98,
    FIRST_FRAME,
    CREATED,
    FIRST_SEQ,
    PARENT_INCARNATION,
    PARENT_FRAME_NO,
    RESERVED_140,
    PARENT_DIGEST,
    RESERVED_176,
];

/// The header, field by field; `docs/format/segment.md` holds the same table.
pub const LAYOUT: &[Field] = &layout::header::<{ layout::fields(OWN) }>(OWN, SEGMENT_HEADER_LEN);

const FORMAT: Format = Format {
    what: "segment header",
    magic: SEGMENT_MAGIC,
    version: SEGMENT_VERSION,
    header_len: SEGMENT_HEADER_LEN,
    reserved: &[layout::FLAGS, RESERVED_98, RESERVED_140, RESERVED_176],
};

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
    /// Encodes the header with its checksum.
    pub fn encode(&self) -> [u8; SEGMENT_HEADER_LEN] {
        let mut header = [0u8; SEGMENT_HEADER_LEN];
        FORMAT.begin(&mut header, 0);
        GROUP.put(&mut header, &self.group.0);
        GENERATION_COUNTER.put(&mut header, &self.generation.counter.to_le_bytes());
        GENERATION_SITE.put(&mut header, &self.generation.site.to_le_bytes());
        INCARNATION.put(&mut header, &self.incarnation.0);
        SALT.put(&mut header, &self.salt);
        SUITE.put(&mut header, &self.suite.to_le_bytes());
        FIRST_FRAME.put(&mut header, &self.first_frame.0.to_le_bytes());
        CREATED.put(&mut header, &self.created.0.to_le_bytes());
        FIRST_SEQ.put(&mut header, &self.first_seq.0.to_le_bytes());
        if let Some(parent) = &self.parent {
            PARENT_INCARNATION.put(&mut header, &parent.incarnation.0);
            PARENT_FRAME_NO.put(&mut header, &parent.frame_no.0.to_le_bytes());
            PARENT_DIGEST.put(&mut header, &parent.digest);
        }
        FORMAT.finish(&mut header);
        header
    }

    /// Parses and verifies one header: magic, version, reserved bytes, checksum, then every limit.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes = FORMAT.open(bytes)?;
        let parent = Parent {
            incarnation: IncarnationId(PARENT_INCARNATION.array(bytes)),
            frame_no: FrameNo(PARENT_FRAME_NO.u32(bytes)),
            digest: PARENT_DIGEST.array(bytes),
        };
        let none = Parent {
            incarnation: IncarnationId::default(),
            frame_no: FrameNo(0),
            digest: Digest::default(),
        };
        let header = Self {
            group: GroupId(GROUP.array(bytes)),
            generation: Generation {
                counter: GENERATION_COUNTER.u64(bytes),
                site: GENERATION_SITE.u64(bytes),
            },
            incarnation: IncarnationId(INCARNATION.array(bytes)),
            salt: SALT.array(bytes),
            suite: SUITE.u16(bytes),
            first_frame: FrameNo(FIRST_FRAME.u32(bytes)),
            created: TimeUs(CREATED.u64(bytes)),
            first_seq: Seq(FIRST_SEQ.u64(bytes)),
            parent: (parent != none).then_some(parent),
        };
        header.check()?;
        Ok(header)
    }

    /// Checks every limit that the header alone shows.
    pub fn check(&self) -> Result<(), FormatError> {
        let frame_max = u64::from(INCARNATION_FRAMES_MAX - 1);
        FORMAT.require(self.suite != 0, SUITE, "zero")?;
        FORMAT.require(self.incarnation.0 != [0; 16], INCARNATION, "zero")?;
        FORMAT.at_most(FIRST_FRAME, u64::from(self.first_frame.0), frame_max)?;
        FORMAT.require(self.first_seq.0 != 0, FIRST_SEQ, "zero")?;
        if let Some(parent) = &self.parent {
            FORMAT.require(
                parent.incarnation.0 != [0; 16] && parent.incarnation != self.incarnation,
                PARENT_INCARNATION,
                "zero, though a parent is named, or the incarnation itself",
            )?;
            FORMAT.at_most(PARENT_FRAME_NO, u64::from(parent.frame_no.0), frame_max)?;
        }
        Ok(())
    }
}
