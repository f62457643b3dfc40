//! Presence map: what the overlay holds of a volume. `docs/format/overlay.md` is its page.
//!
//! Two bits a block, in chunks of 1952 blocks. A chunk has two slots of 512 bytes in the file, in
//! different 4 KiB pages, written in turn: a torn slot is recognized and the other one, the state
//! of the flush before, stands. Below its header the file is sparse: a slot of zeroes was never
//! written.

use std::collections::BTreeSet;

use xxhash_rust::xxh3::xxh3_64;

use crate::constants::{BLOCK_SIZE, VOLUME_BYTES_MAX};
use crate::format::FormatError;
use crate::format::layout::{self, Field, Format, covers};
use crate::types::{GroupId, Seq, VolumeIndex};

pub const OVERLAY_MAGIC: [u8; 8] = *b"EBBOVRLY";
pub const OVERLAY_VERSION: u16 = 1;
pub const OVERLAY_HEADER_LEN: usize = 128;
/// The header has a page to itself.
pub const SLOTS_OFFSET: u64 = 4096;
pub const SLOT_LEN: usize = 512;
const STATES_LEN: usize = 488;
/// Blocks of one chunk, two bits each.
pub const CHUNK_BLOCKS: u64 = STATES_LEN as u64 * 4;
/// Slots of one page; the page behind it holds the other slots of the same chunks.
const PAGE_CHUNKS: u64 = 8;
/// Bytes of two pages that belong together.
pub const PAIR_LEN: u64 = 2 * PAGE_CHUNKS * SLOT_LEN as u64;

const GROUP: Field = Field::new("group", 16, 16);
const SEQ: Field = Field::new("seq", 32, 8);
const BLOCKS: Field = Field::new("blocks", 40, 8);
const VOLUME: Field = Field::new("volume", 48, 2);
const RESERVED_50: Field = Field::new("reserved_50", 50, 70);
const OWN: &[Field] = &[GROUP, SEQ, BLOCKS, VOLUME, RESERVED_50];

/// The header, field by field; `docs/format/overlay.md` holds the same table.
pub const LAYOUT: &[Field] = &layout::header::<{ layout::fields(OWN) }>(OWN, OVERLAY_HEADER_LEN);

const STATES: Field = Field::new("states", 0, STATES_LEN);
const SLOT_CHUNK: Field = Field::new("chunk", 488, 8);
const SLOT_VERSION: Field = Field::new("version", 496, 8);
const SLOT_CHECKSUM: Field = Field::new("checksum", 504, 8);

/// One slot; `docs/format/overlay.md` holds the same table.
pub const SLOT_LAYOUT: &[Field] = &[STATES, SLOT_CHUNK, SLOT_VERSION, SLOT_CHECKSUM];
const _: () = assert!(covers(SLOT_LAYOUT, SLOT_LEN));

const FORMAT: Format = Format {
    what: "overlay map",
    magic: OVERLAY_MAGIC,
    version: OVERLAY_VERSION,
    header_len: OVERLAY_HEADER_LEN,
    reserved: &[layout::FLAGS, RESERVED_50],
};

/// What an overlay belongs to: on any other point it would be garbage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding {
    pub group: GroupId,
    pub volume: VolumeIndex,
    pub seq: Seq,
    /// Blocks of the volume.
    pub blocks: u64,
}

impl Binding {
    pub fn encode(&self) -> [u8; OVERLAY_HEADER_LEN] {
        let mut header = [0u8; OVERLAY_HEADER_LEN];
        FORMAT.begin(&mut header, 0);
        GROUP.put(&mut header, &self.group.0);
        SEQ.put(&mut header, &self.seq.0.to_le_bytes());
        BLOCKS.put(&mut header, &self.blocks.to_le_bytes());
        VOLUME.put(&mut header, &self.volume.0.to_le_bytes());
        FORMAT.finish(&mut header);
        header
    }

    /// Parses a header and refuses one of another volume or point.
    pub fn check(&self, bytes: &[u8]) -> Result<(), FormatError> {
        let bytes = FORMAT.open(bytes)?;
        let limit = VOLUME_BYTES_MAX / BLOCK_SIZE as u64;
        FORMAT.at_most(BLOCKS, BLOCKS.u64(bytes), limit)?;
        FORMAT.require(GROUP.array(bytes) == self.group.0, GROUP, "another group's")?;
        FORMAT.require(
            VOLUME.u16(bytes) == self.volume.0,
            VOLUME,
            "another volume's",
        )?;
        FORMAT.require(
            SEQ.u64(bytes) == self.seq.0,
            SEQ,
            "of another recovery point",
        )?;
        FORMAT.require(
            BLOCKS.u64(bytes) == self.blocks,
            BLOCKS,
            "not the volume's size",
        )
    }
}

/// Where the content of a block is. Values are on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// In history.
    Below = 0,
    /// In the overlay's data file.
    Data = 1,
    /// Zeroes.
    Zero = 2,
    /// Zeroes that a discard left.
    Discarded = 3,
}

/// Numbers of the states; `docs/format/overlay.md` holds the same table.
pub const STATE_VALUES: &[(&str, u64)] = &[
    ("BELOW", State::Below as u64),
    ("DATA", State::Data as u64),
    ("ZERO", State::Zero as u64),
    ("DISCARDED", State::Discarded as u64),
];

impl State {
    fn of(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::Below,
            1 => Self::Data,
            2 => Self::Zero,
            _ => Self::Discarded,
        }
    }

    /// The state in all four places of a byte.
    fn repeated(self) -> u8 {
        self as u8 * 0b0101_0101
    }
}

#[derive(Debug)]
enum States {
    All(State),
    Mixed(Box<[u8; STATES_LEN]>),
}

#[derive(Debug)]
struct Chunk {
    states: States,
    /// Of the newest slot in the file; 0 if there is none. Odd versions lie in the first slot.
    version: u64,
}

const UNTOUCHED: Chunk = Chunk {
    states: States::All(State::Below),
    version: 0,
};

/// The states of all blocks of a volume, and what of them the file does not hold yet.
#[derive(Debug)]
pub struct Presence {
    blocks: u64,
    chunks: Vec<Chunk>,
    dirty: BTreeSet<u64>,
    data_blocks: u64,
}

/// A slot to be written.
#[derive(Debug)]
pub struct SlotWrite {
    pub offset: u64,
    pub bytes: [u8; SLOT_LEN],
}

fn split(block: u64) -> (usize, usize) {
    let index = |number: u64| usize::try_from(number).expect("invariant: 64-bit host");
    (index(block / CHUNK_BLOCKS), index(block % CHUNK_BLOCKS))
}

impl Presence {
    pub fn new(blocks: u64) -> Self {
        let (chunks, _) = split(blocks.next_multiple_of(CHUNK_BLOCKS));
        Self {
            blocks,
            chunks: std::iter::repeat_with(|| UNTOUCHED).take(chunks).collect(),
            dirty: BTreeSet::new(),
            data_blocks: 0,
        }
    }

    /// Blocks whose content is in the data file.
    pub fn data_blocks(&self) -> u64 {
        self.data_blocks
    }

    pub fn state(&self, block: u64) -> State {
        let (chunk, place) = split(block);
        self.chunks[chunk].state(place)
    }

    /// State of `block` and the number of blocks from it on, at most `max`, that share it.
    pub fn run(&self, block: u64, max: u64) -> (State, u64) {
        let state = self.state(block);
        let end = block.saturating_add(max).min(self.blocks);
        let mut at = block;
        while at < end {
            let (chunk, place) = split(at);
            let left = (CHUNK_BLOCKS - place as u64).min(end - at);
            match &self.chunks[chunk].states {
                States::All(all) if *all == state => at += left,
                States::All(_) => break,
                States::Mixed(_) => {
                    let same = (0..left)
                        .take_while(|i| self.state(at + i) == state)
                        .count() as u64;
                    at += same;
                    if same < left {
                        break;
                    }
                }
            }
        }
        (state, at - block)
    }

    /// How many of a range's blocks are in `Data`.
    pub fn data_in(&self, block: u64, count: u64) -> u64 {
        let (mut at, end, mut sum) = (block, block + count, 0);
        while at < end {
            let (state, run) = self.run(at, end - at);
            sum += if state == State::Data { run } else { 0 };
            at += run;
        }
        sum
    }

    /// Sets the state of a range. Returns how many blocks were in `Data` before.
    pub fn set(&mut self, block: u64, count: u64, state: State) -> u64 {
        let data_before = self.data_in(block, count);
        let (mut at, end) = (block, block + count);
        while at < end {
            let (chunk, place) = split(at);
            let chunk_end = (at - place as u64 + CHUNK_BLOCKS).min(self.blocks);
            let stop = end.min(chunk_end);
            let whole = place == 0 && stop == chunk_end;
            if self.chunks[chunk].set(place, split(stop - at).1, whole, state) {
                self.dirty.insert(chunk as u64);
            }
            at = stop;
        }
        self.data_blocks -= data_before;
        self.data_blocks += if state == State::Data { count } else { 0 };
        data_before
    }

    /// The slots that changed since the last call, as they are now.
    pub fn take_dirty(&mut self) -> Vec<SlotWrite> {
        let dirty = std::mem::take(&mut self.dirty);
        let slot = |number: u64| {
            let chunk = &mut self.chunks[split(number * CHUNK_BLOCKS).0];
            chunk.version += 1;
            let offset = slot_offset(number, chunk.version);
            SlotWrite {
                offset,
                bytes: chunk.encode(number),
            }
        };
        dirty.into_iter().map(slot).collect()
    }

    /// Takes over two pages of the file; `pair` is their number, `bytes` may be short at the end of
    /// the file. Returns the chunks of which a slot was torn.
    pub fn load(&mut self, pair: u64, bytes: &[u8]) -> Result<Vec<u64>, FormatError> {
        let mut torn = Vec::new();
        let page = SLOT_LEN * split(PAGE_CHUNKS).1;
        for place in 0..PAGE_CHUNKS {
            let number = pair * PAGE_CHUNKS + place;
            let Some(chunk) = self.chunks.get_mut(split(number * CHUNK_BLOCKS).0) else {
                break;
            };
            let at = split(place).1 * SLOT_LEN;
            let slot = |at: usize| {
                bytes
                    .get(at..at + SLOT_LEN)
                    .map(|slot| read_slot(slot, number))
            };
            let slots = [slot(at), slot(at + page)].map(|slot| slot.unwrap_or(Slot::Empty));
            match slots
                .iter()
                .filter(|slot| matches!(slot, Slot::Bad))
                .count()
            {
                0 => {}
                // The version that was being written when the machine went down. The next one
                // goes to the same slot.
                1 => torn.push(number),
                // A crash tears at most one.
                _ => {
                    return Err(FormatError::Field {
                        what: "overlay map",
                        field: "slots",
                        reason: "both of a chunk are damaged",
                    });
                }
            }
            for slot in slots {
                if let Slot::Good { version, states } = slot
                    && version > chunk.version
                {
                    *chunk = Chunk {
                        states: States::compact(states),
                        version,
                    };
                }
            }
            let first = number * CHUNK_BLOCKS;
            self.data_blocks += self.data_in(first, CHUNK_BLOCKS.min(self.blocks - first));
        }
        Ok(torn)
    }
}

/// Offset of the slot that a version of a chunk goes to.
fn slot_offset(number: u64, version: u64) -> u64 {
    let page = if version % 2 == 1 { 0 } else { PAIR_LEN / 2 };
    SLOTS_OFFSET + number / PAGE_CHUNKS * PAIR_LEN + page + number % PAGE_CHUNKS * SLOT_LEN as u64
}

enum Slot {
    Empty,
    Bad,
    Good {
        version: u64,
        states: Box<[u8; STATES_LEN]>,
    },
}

fn read_slot(bytes: &[u8], number: u64) -> Slot {
    if bytes.iter().all(|byte| *byte == 0) {
        return Slot::Empty;
    }
    let checksum = xxh3_64(&bytes[..SLOT_CHECKSUM.offset]);
    let version = SLOT_VERSION.u64(bytes);
    if checksum != SLOT_CHECKSUM.u64(bytes) || SLOT_CHUNK.u64(bytes) != number || version == 0 {
        return Slot::Bad;
    }
    Slot::Good {
        version,
        states: Box::new(STATES.array(bytes)),
    }
}

impl States {
    fn compact(bytes: Box<[u8; STATES_LEN]>) -> Self {
        let first = State::of(bytes[0]);
        if bytes.iter().all(|byte| *byte == first.repeated()) {
            Self::All(first)
        } else {
            Self::Mixed(bytes)
        }
    }
}

impl Chunk {
    fn state(&self, place: usize) -> State {
        match &self.states {
            States::All(state) => *state,
            States::Mixed(bytes) => State::of(bytes[place / 4] >> (place % 4 * 2)),
        }
    }

    /// Returns whether anything changed.
    fn set(&mut self, place: usize, count: usize, whole: bool, state: State) -> bool {
        if let States::All(all) = self.states {
            if all == state {
                return false;
            }
            self.states = States::Mixed(Box::new([all.repeated(); STATES_LEN]));
        }
        if whole {
            self.states = States::All(state);
            return true;
        }
        let States::Mixed(bytes) = &mut self.states else {
            return true;
        };
        let mut changed = false;
        for place in place..place + count {
            let byte = &mut bytes[place / 4];
            let shift = place % 4 * 2;
            let new = *byte & !(3 << shift) | (state as u8) << shift;
            changed |= new != *byte;
            *byte = new;
        }
        changed
    }

    fn encode(&self, number: u64) -> [u8; SLOT_LEN] {
        let mut slot = [0u8; SLOT_LEN];
        match &self.states {
            States::All(state) => slot[..STATES_LEN].fill(state.repeated()),
            States::Mixed(bytes) => STATES.put(&mut slot, &bytes[..]),
        }
        SLOT_CHUNK.put(&mut slot, &number.to_le_bytes());
        SLOT_VERSION.put(&mut slot, &self.version.to_le_bytes());
        let checksum = xxh3_64(&slot[..SLOT_CHECKSUM.offset]);
        SLOT_CHECKSUM.put(&mut slot, &checksum.to_le_bytes());
        slot
    }
}
