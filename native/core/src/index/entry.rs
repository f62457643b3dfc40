//! One index entry: 128 bits whose order as a number is the order of the run.
//!
//! An extent is stored as the few aligned power-of-two pieces it consists of: a page write is one
//! piece, a 1 TiB discard at most 56. Pieces of level L are `2^L` blocks long and begin at a
//! multiple of it, so two pieces are nested or disjoint, and the newest version of a block is found
//! by one binary search per level that the run holds, whatever overlaps. Rejected: cutting
//! overlapping extents against one another, which is quadratic for nested ranges and makes a merge
//! more than a merge.

use crate::types::{BlockIndex, Seq};

/// Bits of a block index; `VOLUME_BYTES_MAX` needs 38.
pub const INDEX_BITS: u32 = 40;
/// Levels of pieces: as many as a block index has bits.
pub const LEVELS: u8 = 40;

const POSITION_BITS: u32 = 24;
const KIND_SHIFT: u32 = 22;
const SLOT_SHIFT: u32 = POSITION_BITS;
const SEQ_SHIFT: u32 = SLOT_SHIFT + 32;
const INDEX_SHIFT: u32 = SEQ_SHIFT + 32;
const PAYLOAD_MASK: u32 = (1 << KIND_SHIFT) - 1;

const _: () = assert!(INDEX_SHIFT + INDEX_BITS == 128);
const _: () = assert!(crate::constants::FRAME_BLOCKS_MAX < 1 << KIND_SHIFT);
const _: () = assert!(
    crate::constants::VOLUME_BYTES_MAX / crate::constants::BLOCK_SIZE as u64 <= 1 << INDEX_BITS
);

/// First bits of the fields; `docs/format/index-run.md` holds the same table.
pub const ENTRY_BITS: &[(&str, u64)] = &[
    ("PAYLOAD_BLOCK", 0),
    ("KIND", KIND_SHIFT as u64),
    ("SLOT", SLOT_SHIFT as u64),
    ("SEQ", SEQ_SHIFT as u64),
    ("INDEX", INDEX_SHIFT as u64),
];
const ZERO: u32 = 1;
const DISCARDED: u32 = 2;
/// Numbers of the kinds; `docs/format/index-run.md` holds the same table.
pub const KIND_VALUES: &[(&str, u64)] = &[
    ("STORED", 0),
    ("ZERO", ZERO as u64),
    ("DISCARDED", DISCARDED as u64),
];

/// What an entry says of its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// The piece's first block is block `payload_block` of the frame's payload.
    Stored {
        payload_block: u32,
    },
    Zero,
    Discarded,
}

/// `payload block (22) | kind (2) | frame slot (32) | seq - base (32) | index (40)`, from bit 0 up.
///
/// The index counts pieces of the lane's level. The slot numbers the frames of the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry(pub u128);

#[allow(clippy::cast_possible_truncation)] // taking bits out is the point
impl Entry {
    pub const LEN: usize = 16;

    pub fn new(index: u64, seq_delta: u32, slot: u32, content: Content) -> Self {
        debug_assert!(index < 1 << INDEX_BITS);
        let position = match content {
            Content::Stored { payload_block } => {
                debug_assert!(payload_block <= PAYLOAD_MASK);
                payload_block
            }
            Content::Zero => ZERO << KIND_SHIFT,
            Content::Discarded => DISCARDED << KIND_SHIFT,
        };
        Self(
            u128::from(index) << INDEX_SHIFT
                | u128::from(seq_delta) << SEQ_SHIFT
                | u128::from(slot) << SLOT_SHIFT
                | u128::from(position),
        )
    }

    /// The smallest number an entry of this index can have.
    pub fn first_of(index: u64) -> Self {
        Self(u128::from(index) << INDEX_SHIFT)
    }

    /// The smallest number of an entry of this index whose seq is behind `base + seq_delta`.
    pub fn behind(index: u64, seq_delta: u32) -> Self {
        // A carry out of the seq runs into the index, where it belongs.
        Self(Self::first_of(index).0 + ((u128::from(seq_delta) + 1) << SEQ_SHIFT))
    }

    pub fn index(self) -> u64 {
        (self.0 >> INDEX_SHIFT) as u64
    }

    pub fn seq(self, base: Seq) -> Seq {
        Seq(base.0 + u64::from((self.0 >> SEQ_SHIFT) as u32))
    }

    pub fn slot(self) -> u32 {
        (self.0 >> SLOT_SHIFT) as u32
    }

    /// None if the kind is unknown: damage that a checksum did not show, or a newer writer.
    pub fn content(self) -> Option<Content> {
        let position = self.0 as u32 & ((1 << POSITION_BITS) - 1);
        match position >> KIND_SHIFT {
            0 => Some(Content::Stored {
                payload_block: position,
            }),
            ZERO if position & PAYLOAD_MASK == 0 => Some(Content::Zero),
            DISCARDED if position & PAYLOAD_MASK == 0 => Some(Content::Discarded),
            _ => None,
        }
    }

    /// The entry in a run whose base seq is `seqs` lower and whose slots begin `slots` earlier.
    /// The caller has checked that neither sum leaves its 32 bits.
    #[must_use]
    pub fn rebased(self, seqs: u32, slots: u32) -> Self {
        Self(self.0 + (u128::from(seqs) << SEQ_SHIFT) + (u128::from(slots) << SLOT_SHIFT))
    }

    pub fn encode(self) -> [u8; Self::LEN] {
        self.0.to_le_bytes()
    }

    pub fn decode(bytes: [u8; Self::LEN]) -> Self {
        Self(u128::from_le_bytes(bytes))
    }
}

/// Calls `each` with level, index and offset from `start` (blocks) of every piece of an extent.
pub fn pieces(start: BlockIndex, blocks: u64, mut each: impl FnMut(u8, u64, u64)) {
    let end = start.0 + blocks;
    debug_assert!(end <= 1 << INDEX_BITS);
    let mut at = start.0;
    while at < end {
        let level = at
            .trailing_zeros()
            .min((end - at).ilog2())
            .min(u32::from(LEVELS) - 1);
        #[allow(clippy::cast_possible_truncation)] // below LEVELS
        each(level as u8, at >> level, at - start.0);
        at += 1 << level;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_sort_by_index_then_seq() {
        let stored = |payload_block| Content::Stored { payload_block };
        let entries = [
            Entry::new(4, u32::MAX, u32::MAX, Content::Discarded),
            Entry::new(5, 0, 7, stored(511)),
            Entry::new(5, 1, 0, Content::Zero),
            Entry::new((1 << INDEX_BITS) - 1, 0, 0, stored(0)),
        ];
        assert!(entries.is_sorted());
        assert_eq!(entries[1].index(), 5);
        assert_eq!(entries[2].seq(Seq(100)), Seq(101));
        assert_eq!(entries[1].slot(), 7);
        assert_eq!(entries[1].content(), Some(stored(511)));
        assert_eq!(entries[0].content(), Some(Content::Discarded));
        assert_eq!(Entry::decode(entries[0].encode()), entries[0]);
        assert!(Entry::behind(5, 0) > entries[1] && Entry::behind(5, 0) <= entries[2]);
        assert_eq!(Entry::behind(4, u32::MAX), Entry::first_of(5));
        assert_eq!(entries[1].rebased(9, 3), Entry::new(5, 9, 10, stored(511)));
    }

    #[test]
    fn an_unknown_kind_is_no_content() {
        assert_eq!(Entry(3 << KIND_SHIFT).content(), None);
        assert_eq!(Entry(1 << KIND_SHIFT | 1).content(), None);
    }

    #[test]
    fn pieces_cover_an_extent_once_and_are_few() {
        let tib = (1u64 << 40) / 4096;
        for (start, blocks) in [(0, 1), (0, 256), (5, 256), (1, tib), (0, 1 << 38), (7, 1)] {
            let mut next = start;
            let mut count = 0;
            pieces(BlockIndex(start), blocks, |level, index, offset| {
                assert_eq!(index << level, next);
                assert_eq!(offset, next - start);
                next += 1 << level;
                count += 1;
            });
            assert_eq!(next, start + blocks);
            assert!(
                count <= 2 * 28,
                "{count} pieces for {blocks} blocks at {start}"
            );
        }
    }
}
