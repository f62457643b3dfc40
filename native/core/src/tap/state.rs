//! State of the tap of a group (`docs/format/state.md`): how far seq and time are reserved, whether
//! a span is open, whether a gap is. One small file of two slots, written in turn, so that a torn
//! write leaves the slot before.

use std::io;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use crate::format::FormatError;
use crate::format::record::Cause;
use crate::storage::{Directory, File};
use crate::types::{GroupId, Seq, TimeUs};

pub const STATE_MAGIC: [u8; 8] = *b"EBBSTATE";
pub const STATE_VERSION: u16 = 1;
pub const STATE_SLOT_LEN: usize = 512;
pub const STATE_FILE: &str = "tap.state";
const FLAG_CLEAN: u32 = 1;
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

/// The cause with this number, `None` for 0.
pub(super) fn cause_of(value: u8) -> Option<Option<Cause>> {
    Some(Some(match value {
        0 => return Some(None),
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
    }))
}

impl TapState {
    pub fn encode(&self, counter: u64) -> [u8; STATE_SLOT_LEN] {
        let mut bytes = [0; STATE_SLOT_LEN];
        bytes[0..8].copy_from_slice(&STATE_MAGIC);
        bytes[8..10].copy_from_slice(&STATE_VERSION.to_le_bytes());
        bytes[10..12].copy_from_slice(&512u16.to_le_bytes());
        bytes[12..16].copy_from_slice(&(u32::from(self.clean) * FLAG_CLEAN).to_le_bytes());
        bytes[16..32].copy_from_slice(&self.group.0);
        bytes[32..40].copy_from_slice(&counter.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.seq_end.0.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.time_end.0.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.time.0.to_le_bytes());
        bytes[64..72].copy_from_slice(&self.boot_us.to_le_bytes());
        bytes[72..88].copy_from_slice(&self.boot_id);
        bytes[88] = self.span.map_or(0, |cause| cause as u8);
        if let Some(gap) = &self.gap {
            bytes[89] = gap.cause as u8;
            bytes[96..104].copy_from_slice(&gap.first_seq.0.to_le_bytes());
            bytes[104..112].copy_from_slice(&gap.first_time.0.to_le_bytes());
            bytes[112..120].copy_from_slice(&gap.bytes.to_le_bytes());
        }
        let checksum = xxh3_64(&bytes[..504]);
        bytes[504..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Parses one slot; returns its counter too.
    pub fn parse(bytes: &[u8]) -> Result<(Self, u64), FormatError> {
        let field = |field, reason| FormatError::Field {
            what: WHAT,
            field,
            reason,
        };
        if bytes.len() < STATE_SLOT_LEN {
            let (need, have) = (STATE_SLOT_LEN, bytes.len());
            return Err(FormatError::Truncated {
                what: WHAT,
                need,
                have,
            });
        }
        let u64_at = |at: usize| {
            u64::from_le_bytes(
                bytes[at..at + 8]
                    .try_into()
                    .expect("invariant: eight bytes"),
            )
        };
        let id_at = |at: usize| -> [u8; 16] {
            bytes[at..at + 16]
                .try_into()
                .expect("invariant: sixteen bytes")
        };
        let found: [u8; 8] = bytes[0..8].try_into().expect("invariant: eight bytes");
        if found != STATE_MAGIC {
            return Err(FormatError::Magic {
                what: WHAT,
                expected: STATE_MAGIC,
                found,
            });
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if version != STATE_VERSION {
            let (min, max) = (STATE_VERSION, STATE_VERSION);
            return Err(FormatError::Version {
                what: WHAT,
                found: version,
                min,
                max,
            });
        }
        let (computed, found) = (xxh3_64(&bytes[..504]), u64_at(504));
        if computed != found {
            return Err(FormatError::Checksum {
                what: WHAT,
                computed,
                found,
            });
        }
        let flags = u32::from_le_bytes(bytes[12..16].try_into().expect("invariant: four bytes"));
        if u16::from_le_bytes([bytes[10], bytes[11]]) != 512 {
            return Err(field("header_len", "is not 512"));
        }
        if flags & !FLAG_CLEAN != 0 {
            return Err(field("flags", "has unknown bits"));
        }
        if bytes[90..96]
            .iter()
            .chain(&bytes[120..504])
            .any(|byte| *byte != 0)
        {
            return Err(field("reserved", "is not zero"));
        }
        let span = cause_of(bytes[88]).ok_or_else(|| field("span_cause", "is unknown"))?;
        let gap = cause_of(bytes[89]).ok_or_else(|| field("gap_cause", "is unknown"))?;
        let state = Self {
            group: GroupId(id_at(16)),
            clean: flags & FLAG_CLEAN != 0,
            seq_end: Seq(u64_at(40)),
            time_end: TimeUs(u64_at(48)),
            time: TimeUs(u64_at(56)),
            boot_us: u64_at(64),
            boot_id: id_at(72),
            span,
            gap: gap.map(|cause| OpenGap {
                cause,
                first_seq: Seq(u64_at(96)),
                first_time: TimeUs(u64_at(104)),
                bytes: u64_at(112),
            }),
        };
        Ok((state, u64_at(32)))
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
