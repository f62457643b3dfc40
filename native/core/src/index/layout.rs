//! Layout of a run file. `docs/format/index-run.md` is its page.
//!
//! ```text
//! header | entry pages | slot pages | tail: members, lanes, fences
//! ```
//!
//! Header and tail are verified when a run is opened; they are a few hundredths of a run. Pages
//! carry their own checksums and are verified when they are read, so opening never reads them all.

use xxhash_rust::xxh3::xxh3_64;

use super::entry::{Entry, LEVELS};
use super::names::SegmentKey;
use crate::constants::VOLUMES_MAX;
use crate::format::FormatError;
use crate::format::frame::Digest;
use crate::format::layout::{self, Field, Format, covers};
use crate::types::{FrameNo, GroupId, Seq, TimeUs, VolumeIndex};

pub const RUN_MAGIC: [u8; 8] = *b"EBBINDEX";
pub const RUN_VERSION: u16 = 1;
pub const RUN_HEADER_LEN: usize = 128;
/// Bytes of one page, checksum included.
pub const PAGE_LEN: usize = 4096;
/// Bytes of a page that hold entries or slots; 8 zero bytes and the checksum follow.
pub const PAGE_PAYLOAD: usize = 4080;
pub const PAGE_ENTRIES: u64 = (PAGE_PAYLOAD / Entry::LEN) as u64;
pub const PAGE_SLOTS: u64 = (PAGE_PAYLOAD / 4) as u64;
pub const MEMBER_LEN: usize = 64;
pub const LANE_LEN: usize = 40;
/// Bytes of the tail of any run: what a file may make us allocate. 16 bytes a page of entries.
pub const TAIL_BYTES_MAX: u64 = 1 << 30;

const GROUP: Field = Field::new("group", 16, 16);
const BASE_SEQ: Field = Field::new("base_seq", 32, 8);
const END_SEQ: Field = Field::new("end_seq", 40, 8);
const FIRST_TIME: Field = Field::new("first_time_us", 48, 8);
const LAST_TIME: Field = Field::new("last_time_us", 56, 8);
const FIRST_DATA_SEQ: Field = Field::new("first_data_seq", 64, 8);
const ENTRIES: Field = Field::new("entries", 72, 8);
const SLOTS: Field = Field::new("slots", 80, 4);
const MEMBERS: Field = Field::new("members", 84, 4);
const LANES: Field = Field::new("lanes", 88, 4);
const RESERVED_92: Field = Field::new("reserved_92", 92, 4);
const RECORDS: Field = Field::new("records", 96, 8);
const TAIL_CHECKSUM: Field = Field::new("tail_checksum", 104, 8);
const RESERVED_112: Field = Field::new("reserved_112", 112, 8);
const OWN: &[Field] = &[
    GROUP,
    BASE_SEQ,
    END_SEQ,
    FIRST_TIME,
    LAST_TIME,
    FIRST_DATA_SEQ,
    ENTRIES,
    SLOTS,
    MEMBERS,
    LANES,
    RESERVED_92,
    RECORDS,
    TAIL_CHECKSUM,
    RESERVED_112,
];

/// The header, field by field; `docs/format/index-run.md` holds the same table.
pub const LAYOUT: &[Field] = &layout::header::<{ layout::fields(OWN) }>(OWN, RUN_HEADER_LEN);

/// A segment whose records the run indexes, and its part of the run's slots.
pub const MEMBER_LAYOUT: &[Field] = &[
    MEMBER_ORDINAL,
    MEMBER_FIRST_FRAME,
    MEMBER_LAST_FRAME,
    MEMBER_FIRST_SLOT,
    MEMBER_FIRST_SEQ,
    MEMBER_END_SEQ,
    MEMBER_LAST_DIGEST,
];
const MEMBER_ORDINAL: Field = Field::new("ordinal", 0, 4);
const MEMBER_FIRST_FRAME: Field = Field::new("first_frame", 4, 4);
const MEMBER_LAST_FRAME: Field = Field::new("last_frame", 8, 4);
const MEMBER_FIRST_SLOT: Field = Field::new("first_slot", 12, 4);
const MEMBER_FIRST_SEQ: Field = Field::new("first_seq", 16, 8);
const MEMBER_END_SEQ: Field = Field::new("end_seq", 24, 8);
const MEMBER_LAST_DIGEST: Field = Field::new("last_digest", 32, 32);
const _: () = assert!(covers(MEMBER_LAYOUT, MEMBER_LEN));

/// The entries of one volume and level.
pub const LANE_LAYOUT: &[Field] = &[
    LANE_VOLUME,
    LANE_LEVEL,
    LANE_RESERVED_3,
    LANE_FIRST,
    LANE_COUNT,
    LANE_MIN_INDEX,
    LANE_MAX_INDEX,
];
const LANE_VOLUME: Field = Field::new("volume", 0, 2);
const LANE_LEVEL: Field = Field::new("level", 2, 1);
const LANE_RESERVED_3: Field = Field::new("reserved_3", 3, 5);
const LANE_FIRST: Field = Field::new("first_entry", 8, 8);
const LANE_COUNT: Field = Field::new("entries", 16, 8);
const LANE_MIN_INDEX: Field = Field::new("min_index", 24, 8);
const LANE_MAX_INDEX: Field = Field::new("max_index", 32, 8);
const _: () = assert!(covers(LANE_LAYOUT, LANE_LEN));

const FORMAT: Format = Format {
    what: "index run",
    magic: RUN_MAGIC,
    version: RUN_VERSION,
    header_len: RUN_HEADER_LEN,
    reserved: &[layout::FLAGS, RESERVED_92, RESERVED_112],
};

/// The fixed header of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunHeader {
    pub group: GroupId,
    /// First seq that the run covers; entries hold their distance from it.
    pub base_seq: Seq,
    /// Seq behind the newest record covered.
    pub end_seq: Seq,
    pub first_time: TimeUs,
    pub last_time: TimeUs,
    /// First record that writes, zeroes, discards or copies; 0 if there is none.
    pub first_data_seq: Seq,
    pub entries: u64,
    /// Frames covered.
    pub slots: u32,
    pub members: u32,
    pub lanes: u32,
    /// Records covered, events included.
    pub records: u64,
    pub tail_checksum: u64,
}

impl RunHeader {
    pub fn encode(&self) -> [u8; RUN_HEADER_LEN] {
        let mut header = [0u8; RUN_HEADER_LEN];
        FORMAT.begin(&mut header, 0);
        GROUP.put(&mut header, &self.group.0);
        BASE_SEQ.put(&mut header, &self.base_seq.0.to_le_bytes());
        END_SEQ.put(&mut header, &self.end_seq.0.to_le_bytes());
        FIRST_TIME.put(&mut header, &self.first_time.0.to_le_bytes());
        LAST_TIME.put(&mut header, &self.last_time.0.to_le_bytes());
        FIRST_DATA_SEQ.put(&mut header, &self.first_data_seq.0.to_le_bytes());
        ENTRIES.put(&mut header, &self.entries.to_le_bytes());
        SLOTS.put(&mut header, &self.slots.to_le_bytes());
        MEMBERS.put(&mut header, &self.members.to_le_bytes());
        LANES.put(&mut header, &self.lanes.to_le_bytes());
        RECORDS.put(&mut header, &self.records.to_le_bytes());
        TAIL_CHECKSUM.put(&mut header, &self.tail_checksum.to_le_bytes());
        FORMAT.finish(&mut header);
        header
    }

    /// Parses and verifies a header; lengths are checked against `file_len`.
    pub fn parse(bytes: &[u8], file_len: u64) -> Result<Self, FormatError> {
        let bytes = FORMAT.open(bytes)?;
        let header = Self {
            group: GroupId(GROUP.array(bytes)),
            base_seq: Seq(BASE_SEQ.u64(bytes)),
            end_seq: Seq(END_SEQ.u64(bytes)),
            first_time: TimeUs(FIRST_TIME.u64(bytes)),
            last_time: TimeUs(LAST_TIME.u64(bytes)),
            first_data_seq: Seq(FIRST_DATA_SEQ.u64(bytes)),
            entries: ENTRIES.u64(bytes),
            slots: SLOTS.u32(bytes),
            members: MEMBERS.u32(bytes),
            lanes: LANES.u32(bytes),
            records: RECORDS.u64(bytes),
            tail_checksum: TAIL_CHECKSUM.u64(bytes),
        };
        FORMAT.at_most(ENTRIES, header.entries, file_len / Entry::LEN as u64)?;
        FORMAT.at_most(SLOTS, u64::from(header.slots), file_len / 4)?;
        FORMAT.at_most(
            MEMBERS,
            u64::from(header.members),
            file_len / MEMBER_LEN as u64,
        )?;
        let lanes_max = VOLUMES_MAX as u64 * u64::from(LEVELS);
        FORMAT.at_most(LANES, u64::from(header.lanes), lanes_max)?;
        FORMAT.require(header.members > 0, MEMBERS, "zero")?;
        FORMAT.require(
            header.base_seq < header.end_seq,
            END_SEQ,
            "not behind base_seq",
        )?;
        FORMAT.at_most(END_SEQ, header.end_seq.0 - header.base_seq.0, 1 << 32)?;
        FORMAT.require(
            header.file_len() == file_len,
            ENTRIES,
            "not the number this file holds",
        )?;
        FORMAT.at_most(ENTRIES, header.tail_len(), TAIL_BYTES_MAX)?;
        Ok(header)
    }

    pub fn entry_pages(&self) -> u64 {
        self.entries.div_ceil(PAGE_ENTRIES)
    }

    pub fn slot_pages(&self) -> u64 {
        u64::from(self.slots).div_ceil(PAGE_SLOTS)
    }

    pub fn tail_offset(&self) -> u64 {
        page_offset(self.entry_pages() + self.slot_pages())
    }

    pub fn tail_len(&self) -> u64 {
        u64::from(self.members) * MEMBER_LEN as u64
            + u64::from(self.lanes) * LANE_LEN as u64
            + self.entry_pages() * Entry::LEN as u64
    }

    pub fn file_len(&self) -> u64 {
        self.tail_offset() + self.tail_len()
    }
}

/// Offset of a page; the header has a page to itself.
pub fn page_offset(page: u64) -> u64 {
    (page + 1) * PAGE_LEN as u64
}

/// Pads `payload` to a page and adds the checksum.
pub fn seal_page(payload: &[u8], out: &mut Vec<u8>) {
    debug_assert!(payload.len() <= PAGE_PAYLOAD);
    let start = out.len();
    out.extend_from_slice(payload);
    out.resize(start + PAGE_LEN - 8, 0);
    let checksum = xxh3_64(&out[start..]);
    out.extend_from_slice(&checksum.to_le_bytes());
}

/// Verifies one whole page.
pub fn check_page(page: &[u8]) -> Result<(), FormatError> {
    let (covered, stored) = page.split_at(PAGE_LEN - 8);
    let found = u64::from_le_bytes(stored.try_into().expect("invariant: 8 bytes"));
    let computed = xxh3_64(covered);
    if found != computed {
        return Err(FormatError::Checksum {
            what: "index page",
            computed,
            found,
        });
    }
    Ok(())
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub ordinal: u32,
    pub first_frame: FrameNo,
    pub last_frame: FrameNo,
    pub first_slot: u32,
    pub first_seq: Seq,
    pub end_seq: Seq,
    /// Frame digest of the last frame: binds the run to the segment's bytes.
    pub last_digest: Digest,
}

impl Member {
    pub fn key(&self) -> SegmentKey {
        SegmentKey {
            ordinal: self.ordinal,
            first_frame: self.first_frame,
            last_frame: self.last_frame,
        }
    }

    pub fn frames(&self) -> u32 {
        self.last_frame.0 - self.first_frame.0 + 1
    }

    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut bytes = [0u8; MEMBER_LEN];
        MEMBER_ORDINAL.put(&mut bytes, &self.ordinal.to_le_bytes());
        MEMBER_FIRST_FRAME.put(&mut bytes, &self.first_frame.0.to_le_bytes());
        MEMBER_LAST_FRAME.put(&mut bytes, &self.last_frame.0.to_le_bytes());
        MEMBER_FIRST_SLOT.put(&mut bytes, &self.first_slot.to_le_bytes());
        MEMBER_FIRST_SEQ.put(&mut bytes, &self.first_seq.0.to_le_bytes());
        MEMBER_END_SEQ.put(&mut bytes, &self.end_seq.0.to_le_bytes());
        MEMBER_LAST_DIGEST.put(&mut bytes, &self.last_digest);
        out.extend_from_slice(&bytes);
    }

    fn parse(bytes: &[u8]) -> Self {
        Self {
            ordinal: MEMBER_ORDINAL.u32(bytes),
            first_frame: FrameNo(MEMBER_FIRST_FRAME.u32(bytes)),
            last_frame: FrameNo(MEMBER_LAST_FRAME.u32(bytes)),
            first_slot: MEMBER_FIRST_SLOT.u32(bytes),
            first_seq: Seq(MEMBER_FIRST_SEQ.u64(bytes)),
            end_seq: Seq(MEMBER_END_SEQ.u64(bytes)),
            last_digest: MEMBER_LAST_DIGEST.array(bytes),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lane {
    pub volume: VolumeIndex,
    pub level: u8,
    pub first: u64,
    pub count: u64,
    pub min_index: u64,
    pub max_index: u64,
}

impl Lane {
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut bytes = [0u8; LANE_LEN];
        LANE_VOLUME.put(&mut bytes, &self.volume.0.to_le_bytes());
        LANE_LEVEL.put(&mut bytes, &[self.level]);
        LANE_FIRST.put(&mut bytes, &self.first.to_le_bytes());
        LANE_COUNT.put(&mut bytes, &self.count.to_le_bytes());
        LANE_MIN_INDEX.put(&mut bytes, &self.min_index.to_le_bytes());
        LANE_MAX_INDEX.put(&mut bytes, &self.max_index.to_le_bytes());
        out.extend_from_slice(&bytes);
    }

    fn parse(bytes: &[u8]) -> Self {
        Self {
            volume: VolumeIndex(LANE_VOLUME.u16(bytes)),
            level: bytes[LANE_LEVEL.offset],
            first: LANE_FIRST.u64(bytes),
            count: LANE_COUNT.u64(bytes),
            min_index: LANE_MIN_INDEX.u64(bytes),
            max_index: LANE_MAX_INDEX.u64(bytes),
        }
    }
}

/// What lies behind the pages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tail {
    /// In the order of their seqs.
    pub members: Vec<Member>,
    /// In the order of volume and level.
    pub lanes: Vec<Lane>,
    /// First entry of each entry page.
    pub fences: Vec<Entry>,
}

impl Tail {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.members
            .iter()
            .for_each(|member| member.encode(&mut out));
        self.lanes.iter().for_each(|lane| lane.encode(&mut out));
        self.fences
            .iter()
            .for_each(|fence| out.extend_from_slice(&fence.encode()));
        out
    }

    /// Parses the tail that `header` describes; `bytes` has the length the header says.
    pub fn parse(header: &RunHeader, bytes: &[u8]) -> Result<Self, FormatError> {
        let what = "index run tail";
        let computed = xxh3_64(bytes);
        if computed != header.tail_checksum {
            return Err(FormatError::Checksum {
                what,
                computed,
                found: header.tail_checksum,
            });
        }
        let (members, rest) = bytes.split_at(header.members as usize * MEMBER_LEN);
        let (lanes, fences) = rest.split_at(header.lanes as usize * LANE_LEN);
        let tail = Self {
            members: members
                .chunks_exact(MEMBER_LEN)
                .map(Member::parse)
                .collect(),
            lanes: lanes.chunks_exact(LANE_LEN).map(Lane::parse).collect(),
            fences: fences
                .as_chunks::<{ Entry::LEN }>()
                .0
                .iter()
                .map(|&bytes| Entry::decode(bytes))
                .collect(),
        };
        tail.check(header)?;
        Ok(tail)
    }

    fn check(&self, header: &RunHeader) -> Result<(), FormatError> {
        let malformed = |field: Field, reason| FormatError::Field {
            what: "index run tail",
            field: field.name,
            reason,
        };
        let (mut slot, mut seq) = (0u64, header.base_seq);
        for member in &self.members {
            if member.last_frame < member.first_frame || u64::from(member.first_slot) != slot {
                return Err(malformed(
                    MEMBER_FIRST_SLOT,
                    "not the sum of the frames before",
                ));
            }
            if member.first_seq < seq || member.end_seq <= member.first_seq {
                return Err(malformed(MEMBER_FIRST_SEQ, "not behind the member before"));
            }
            slot += u64::from(member.frames());
            seq = member.end_seq;
        }
        if slot != u64::from(header.slots) || seq != header.end_seq {
            return Err(malformed(MEMBERS, "do not add up to the header"));
        }
        let mut next = 0;
        let mut key = None;
        for lane in &self.lanes {
            let own = Some((lane.volume, lane.level));
            if lane.level >= LEVELS || own <= key {
                return Err(malformed(LANE_LEVEL, "out of order"));
            }
            if lane.first != next || lane.count == 0 {
                return Err(malformed(LANE_FIRST, "not the sum of the lanes before"));
            }
            next = next
                .checked_add(lane.count)
                .ok_or(malformed(LANE_COUNT, "too many"))?;
            key = own;
        }
        if next != header.entries {
            return Err(malformed(LANE_COUNT, "do not add up to the header"));
        }
        Ok(())
    }
}
