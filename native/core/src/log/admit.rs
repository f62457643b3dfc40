//! Which frames may be appended: the checks of design section 6, each with an error of its own.
//!
//! Pure: reads frames and the state of the chain, changes nothing. A batch is taken whole or not
//! at all.

use std::collections::VecDeque;

use super::{LogEnd, LogError, events};
use crate::format::FormatError;
use crate::format::frame::{Digest, FRAME_HEADER_LEN, FrameHeader, frame_digest, verify_body};
use crate::format::manifest::EventEntry;
use crate::format::segment::SegmentHeader;
use crate::types::{FrameNo, Generation, Seq, TimeUs};

/// Digests of the newest frames that are kept in memory, to answer repeated ones without reading.
const RECENT_MAX: usize = 4096;

/// The incarnation that frames are being appended to.
#[derive(Debug, Clone)]
pub(super) struct Chain {
    /// As announced; `first_frame` is the first that this log held.
    pub header: SegmentHeader,
    pub ordinal: u32,
    /// Lowest frame from which on all are held, or were and have been trimmed since.
    pub base: FrameNo,
    pub next_frame: FrameNo,
    /// Digest of the frame before `next_frame`; `None` at `base`.
    pub last_digest: Option<Digest>,
    /// A later incarnation is held: frames of this one can only be repeated.
    pub closed: bool,
}

/// Digests of the newest frames of the current incarnation.
#[derive(Debug)]
pub(super) struct Recent {
    digests: VecDeque<Digest>,
    /// Frame behind the newest.
    end: FrameNo,
}

impl Recent {
    /// Knows nothing before frame `end`.
    pub(super) fn starting_at(end: FrameNo) -> Self {
        Self {
            digests: VecDeque::with_capacity(RECENT_MAX),
            end,
        }
    }

    pub(super) fn push(&mut self, digest: Digest) {
        if self.digests.len() == RECENT_MAX {
            self.digests.pop_front();
        }
        self.digests.push_back(digest);
        self.end.0 += 1;
    }

    pub(super) fn get(&self, frame_no: FrameNo) -> Option<Digest> {
        let back = self.end.0.checked_sub(frame_no.0)? as usize;
        if back == 0 {
            return None;
        }
        self.digests
            .len()
            .checked_sub(back)
            .map(|index| self.digests[index])
    }

    /// Holds nothing and allocates nothing: what stands in while the real one is lent out.
    pub(super) fn empty() -> Self {
        Self {
            digests: VecDeque::new(),
            end: FrameNo(0),
        }
    }

    /// Forgets frames from `end` on, after they could not be written.
    pub(super) fn rewind(&mut self, end: FrameNo) {
        let surplus = self.end.0.saturating_sub(end.0) as usize;
        self.digests
            .truncate(self.digests.len().saturating_sub(surplus));
        self.end = self.end.min(end);
    }
}

/// What a batch of frames amounts to once it is written.
#[derive(Debug)]
pub(super) struct Admitted {
    /// Leading bytes that are already held.
    pub skip: usize,
    pub records: u64,
    pub first_frame: FrameNo,
    pub first_seq: Seq,
    pub first_time: TimeUs,
    pub next_frame: FrameNo,
    pub last_digest: Digest,
    pub last_seq: Seq,
    pub last_time: TimeUs,
    pub events: Vec<EventEntry>,
}

pub(super) fn field(field: &'static str, reason: &'static str) -> LogError {
    LogError::Format(FormatError::Field {
        what: "frame header",
        field,
        reason,
    })
}

/// Checks frames of the current incarnation, back to back. Fresh frames' digests go to `recent`;
/// the caller rewinds it if they are not written. `held` finds the digest of a frame that is held
/// but no longer in `recent`, `None` if it has been trimmed. Returns `None` if nothing is fresh.
pub(super) fn admit(
    chain: &Chain,
    end: &LogEnd,
    promised: Generation,
    recent: &mut Recent,
    frames: &[u8],
    trusted: bool,
    mut held: impl FnMut(FrameNo) -> Result<Option<Digest>, LogError>,
) -> Result<Option<Admitted>, LogError> {
    let mut admitted: Option<Admitted> = None;
    let mut expected = chain.next_frame;
    let mut prev = chain.last_digest;
    let (mut last_seq, mut last_time) = (end.last_seq, end.last_time);
    let mut offset = 0;
    while offset < frames.len() {
        let rest = &frames[offset..];
        let header = FrameHeader::parse(rest)?;
        check_origin(chain, promised, &header)?;
        let need = header.frame_len();
        let body = rest
            .get(FRAME_HEADER_LEN..need)
            .ok_or(FormatError::Truncated {
                what: "frame",
                need,
                have: rest.len(),
            })?;
        let bytes = rest
            .first_chunk()
            .expect("invariant: a parsed header has its length");
        let digest = frame_digest(bytes);
        let frame = header.frame_no;
        if frame < expected {
            if admitted.is_some() {
                return Err(LogError::OutOfOrder {
                    expected,
                    found: frame,
                });
            }
            let known = match recent.get(frame) {
                Some(digest) => Some(digest),
                None => held(frame)?,
            };
            if known.is_some_and(|known| known != digest) {
                return Err(LogError::Conflict { frame });
            }
            offset += need;
            continue;
        }
        if frame > expected {
            return Err(LogError::OutOfOrder {
                expected,
                found: frame,
            });
        }
        if chain.closed {
            return Err(LogError::IncarnationClosed(header.incarnation));
        }
        if prev.is_some_and(|prev| prev != header.prev) {
            return Err(LogError::BrokenChain { frame });
        }
        if header.ref_floor < chain.base {
            return Err(LogError::BelowFloor {
                frame,
                floor: header.ref_floor,
            });
        }
        if header.first_seq <= last_seq {
            return Err(LogError::SeqReused {
                last: last_seq,
                found: header.first_seq,
            });
        }
        if header.first_time <= last_time {
            return Err(LogError::TimeReused {
                last: last_time,
                found: header.first_time,
            });
        }
        if !trusted {
            verify_body(&header, body)?;
        }
        last_seq = Seq(header.end_seq().0 - 1);
        last_time = header.last_time;
        expected = FrameNo(frame.0 + 1);
        prev = Some(digest);
        let batch = admitted.get_or_insert_with(|| Admitted {
            skip: offset,
            records: 0,
            first_frame: frame,
            first_seq: header.first_seq,
            first_time: header.first_time,
            next_frame: expected,
            last_digest: digest,
            last_seq,
            last_time,
            events: Vec::new(),
        });
        events::collect(&header, body, &mut batch.events)?;
        batch.records += u64::from(header.record_count);
        batch.next_frame = expected;
        batch.last_digest = digest;
        batch.last_seq = last_seq;
        batch.last_time = last_time;
        recent.push(digest);
        offset += need;
    }
    Ok(admitted)
}

/// Group, generation, incarnation and suite.
fn check_origin(chain: &Chain, promised: Generation, header: &FrameHeader) -> Result<(), LogError> {
    let announced = &chain.header;
    if header.group != announced.group {
        return Err(LogError::ForeignGroup {
            expected: announced.group,
            found: header.group,
        });
    }
    if header.generation < promised {
        return Err(LogError::Fenced {
            promised,
            found: header.generation,
        });
    }
    if header.incarnation != announced.incarnation {
        return Err(LogError::UnknownIncarnation(header.incarnation));
    }
    if header.generation != announced.generation {
        return Err(field("generation", "not that of its incarnation"));
    }
    if header.suite != announced.suite {
        return Err(field("suite", "not that of its incarnation"));
    }
    Ok(())
}
