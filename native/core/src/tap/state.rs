//! State of the tap of a group (`docs/format/state.md`): how far seq and time are reserved, whether
//! a span is open, whether a gap is. One small file of two slots, written in turn, so that a torn
//! write leaves the slot before.

use std::io;
use std::sync::Arc;

use crate::format::FormatError;
use crate::format::layout::{self, Field, Format};
use crate::format::record::Cause;
use crate::storage::{Directory, File};
use crate::types::{GroupId, Seq, TimeUs};

pub const STATE_MAGIC: [u8; 8] = *b"EBBSTATE";
pub const STATE_VERSION: u16 = 1;
pub const STATE_SLOT_LEN: usize = 512;
pub const STATE_FILE: &str = "tap.state";
const FLAG_CLEAN: u32 = 1;
const FLAG_INTENT_LOST: u32 = 1 << 1;
const WHAT: &str = "tap state";
/// Slots lie on different 4 KiB sectors.
const SLOT_DISTANCE: u64 = 4096;

/// History that was not recorded, until a GAP record says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenGap {
    pub cause: Cause,
    pub first_seq: Seq,
    pub first_time: TimeUs,
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TapState {
    pub group: GroupId,
    /// A tap stopped cleanly and nothing runs since.
    pub clean: bool,
    /// A write-intent bitmap could not be written: all volumes count as dirty.
    pub intent_lost: bool,
    /// Every seq ever used is below.
    pub seq_end: Seq,
    /// Every time ever used is below.
    pub time_end: TimeUs,
    /// Time of the clock when this was written, and the boot clock then: after a quick restart in
    /// the same boot the true time is known, and `time_end` need not be waited for.
    pub time: TimeUs,
    pub boot_us: u64,
    pub boot_id: [u8; 16],
    /// An inconsistent span has been begun and its end may not be in the spool.
    pub span: Option<Cause>,
    pub gap: Option<OpenGap>,
}

/// The cause with this number, if it is one.
fn cause_of(value: u8) -> Option<Cause> {
    Some(match value {
        1 => Cause::FirstCopy,
        2 => Cause::UncleanStop,
        3 => Cause::SpoolFull,
        4 => Cause::SpoolFailed,
        5 => Cause::EncoderStuck,
        6 => Cause::BackingChanged,
        7 => Cause::BackingError,
        8 => Cause::NoKey,
        9 => Cause::Requested,
        _ => return None,
    })
}

const GROUP: Field = Field::new("group", 16, 16);
const COUNTER: Field = Field::new("counter", 32, 8);
const SEQ_END: Field = Field::new("seq_end", 40, 8);
const TIME_END: Field = Field::new("time_end_us", 48, 8);
const TIME: Field = Field::new("time_us", 56, 8);
const BOOT_TIME: Field = Field::new("boot_us", 64, 8);
const BOOT_ID: Field = Field::new("boot_id", 72, 16);
const SPAN_CAUSE: Field = Field::new("span_cause", 88, 1);
const GAP_CAUSE: Field = Field::new("gap_cause", 89, 1);
const RESERVED_90: Field = Field::new("reserved_90", 90, 6);
const GAP_FIRST_SEQ: Field = Field::new("gap_first_seq", 96, 8);
const GAP_FIRST_TIME: Field = Field::new("gap_first_time_us", 104, 8);
const GAP_BYTES: Field = Field::new("gap_bytes", 112, 8);
const RESERVED_120: Field = Field::new("reserved_120", 120, 384);
const OWN: &[Field] = &[
    GROUP,
    COUNTER,
    SEQ_END,
    TIME_END,
    TIME,
    BOOT_TIME,
    BOOT_ID,
    SPAN_CAUSE,
    GAP_CAUSE,
    RESERVED_90,
    GAP_FIRST_SEQ,
    GAP_FIRST_TIME,
    GAP_BYTES,
    RESERVED_120,
];

/// One slot, field by field; `docs/format/state.md` holds the same table.
pub const LAYOUT: &[Field] = &layout::header::<{ layout::fields(OWN) }>(OWN, STATE_SLOT_LEN);

const FORMAT: Format = Format {
    what: WHAT,
    magic: STATE_MAGIC,
    version: STATE_VERSION,
    header_len: STATE_SLOT_LEN,
    reserved: &[RESERVED_90, RESERVED_120],
};

impl TapState {
    pub fn encode(&self, counter: u64) -> [u8; STATE_SLOT_LEN] {
        let mut bytes = [0; STATE_SLOT_LEN];
        let flags =
            u32::from(self.clean) * FLAG_CLEAN + u32::from(self.intent_lost) * FLAG_INTENT_LOST;
        FORMAT.begin(&mut bytes, flags);
        GROUP.put(&mut bytes, &self.group.0);
        COUNTER.put(&mut bytes, &counter.to_le_bytes());
        SEQ_END.put(&mut bytes, &self.seq_end.0.to_le_bytes());
        TIME_END.put(&mut bytes, &self.time_end.0.to_le_bytes());
        TIME.put(&mut bytes, &self.time.0.to_le_bytes());
        BOOT_TIME.put(&mut bytes, &self.boot_us.to_le_bytes());
        BOOT_ID.put(&mut bytes, &self.boot_id);
        SPAN_CAUSE.put(&mut bytes, &[self.span.map_or(0, |cause| cause as u8)]);
        if let Some(gap) = &self.gap {
            GAP_CAUSE.put(&mut bytes, &[gap.cause as u8]);
            GAP_FIRST_SEQ.put(&mut bytes, &gap.first_seq.0.to_le_bytes());
            GAP_FIRST_TIME.put(&mut bytes, &gap.first_time.0.to_le_bytes());
            GAP_BYTES.put(&mut bytes, &gap.bytes.to_le_bytes());
        }
        FORMAT.finish(&mut bytes);
        bytes
    }

    /// Parses one slot; returns its counter too.
    pub fn parse(bytes: &[u8]) -> Result<(Self, u64), FormatError> {
        let bytes = FORMAT.open(bytes)?;
        let flags = layout::FLAGS.u32(bytes);
        if flags & !(FLAG_CLEAN | FLAG_INTENT_LOST) != 0 {
            return Err(FORMAT.finding(layout::FLAGS, "has unknown bits"));
        }
        let cause_at = |field: Field| match bytes[field.offset] {
            0 => Ok(None),
            value => cause_of(value)
                .map(Some)
                .ok_or_else(|| FORMAT.finding(field, "is unknown")),
        };
        let state = Self {
            group: GroupId(GROUP.array(bytes)),
            clean: flags & FLAG_CLEAN != 0,
            intent_lost: flags & FLAG_INTENT_LOST != 0,
            seq_end: Seq(SEQ_END.u64(bytes)),
            time_end: TimeUs(TIME_END.u64(bytes)),
            time: TimeUs(TIME.u64(bytes)),
            boot_us: BOOT_TIME.u64(bytes),
            boot_id: BOOT_ID.array(bytes),
            span: cause_at(SPAN_CAUSE)?,
            gap: cause_at(GAP_CAUSE)?.map(|cause| OpenGap {
                cause,
                first_seq: Seq(GAP_FIRST_SEQ.u64(bytes)),
                first_time: TimeUs(GAP_FIRST_TIME.u64(bytes)),
                bytes: GAP_BYTES.u64(bytes),
            }),
        };
        Ok((state, COUNTER.u64(bytes)))
    }
}

/// The file, open for the life of the tap.
#[derive(Debug)]
pub struct StateFile {
    file: Arc<dyn File>,
    counter: u64,
}

impl StateFile {
    /// Opens or creates the file; the state is `None` if it was never written.
    pub fn open(directory: &dyn Directory) -> io::Result<(Self, Option<TapState>)> {
        let file = match directory.open(STATE_FILE, true) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let file = directory.create(STATE_FILE)?;
                directory.sync()?;
                file
            }
            Err(error) => return Err(error),
        };
        let mut newest: Option<(TapState, u64)> = None;
        let mut damage = None;
        let mut written = 0;
        for slot in 0..2 {
            let mut bytes = [0; STATE_SLOT_LEN];
            let read = file.read_at(&mut bytes, slot * SLOT_DISTANCE)?;
            if bytes.iter().all(|byte| *byte == 0) {
                continue;
            }
            written += 1;
            match TapState::parse(&bytes[..read]) {
                Ok(found)
                    if newest
                        .as_ref()
                        .is_none_or(|(_, counter)| *counter < found.1) =>
                {
                    newest = Some(found);
                }
                Ok(_) => {}
                Err(error) => damage = Some(error),
            }
        }
        if let (None, 2, Some(damage)) = (&newest, written, damage) {
            // Both slots were written and neither can be read: numbers might repeat. (One slot
            // alone is the first write of a file that never held a state.)
            return Err(io::Error::new(io::ErrorKind::InvalidData, damage));
        }
        let counter = newest.as_ref().map_or(0, |(_, counter)| *counter);
        Ok((Self { file, counter }, newest.map(|(state, _)| state)))
    }

    /// Makes the state durable. The first time in both slots: see `open`.
    pub fn store(&mut self, state: &TapState) -> io::Result<()> {
        if self.counter == 0 {
            self.store_slot(state)?;
        }
        self.store_slot(state)
    }

    fn store_slot(&mut self, state: &TapState) -> io::Result<()> {
        self.counter += 1;
        let slot = self.counter % 2 * SLOT_DISTANCE;
        self.file.write_at(&state.encode(self.counter), slot)?;
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Loss, MemoryDirectory};

    fn state(seq: u64) -> TapState {
        TapState {
            group: GroupId([7; 16]),
            clean: seq.is_multiple_of(2),
            intent_lost: seq == 4,
            seq_end: Seq(seq),
            time_end: TimeUs(seq + 1),
            time: TimeUs(seq + 2),
            boot_us: 3,
            boot_id: [9; 16],
            span: Some(Cause::FirstCopy),
            gap: Some(OpenGap {
                cause: Cause::SpoolFull,
                first_seq: Seq(5),
                first_time: TimeUs(6),
                bytes: 7,
            }),
        }
    }

    #[test]
    fn newest_slot_wins_and_a_torn_slot_leaves_the_one_before() {
        for seed in 0..50 {
            let directory = MemoryDirectory::new();
            let (mut file, none) = StateFile::open(&directory).unwrap();
            assert_eq!(none, None);
            for seq in 1..=5 {
                file.store(&state(seq)).unwrap();
            }
            file.counter += 1;
            let torn = state(6).encode(file.counter);
            file.file
                .write_at(&torn, file.counter % 2 * SLOT_DISTANCE)
                .unwrap();
            let directory = directory.crash(Loss::Random(seed));
            let (_, found) = StateFile::open(&directory).unwrap();
            let found = found.unwrap();
            assert!(found == state(5) || found == state(6));
        }
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let good = state(4).encode(9);
        assert_eq!(TapState::parse(&good), Ok((state(4), 9)));
        for at in 0..STATE_SLOT_LEN {
            let mut bad = good;
            bad[at] ^= 0x40;
            assert!(TapState::parse(&bad).is_err(), "byte {at}");
        }
        assert!(TapState::parse(&good[..511]).is_err());
    }

    #[test]
    fn two_damaged_slots_are_an_error() {
        let directory = MemoryDirectory::new();
        directory.place(STATE_FILE, &[1; 8192]);
        assert!(StateFile::open(&directory).is_err());
    }
}
