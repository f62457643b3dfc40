//! Whether what a target holds is the beginning of what this log has.
//!
//! A writer whose machine was rolled back gives numbers again, and only digests tell. The frame
//! before the target's position is looked for where this log may know it: among its own frames, as
//! `prev` of the frame behind it, or as the parent of a later incarnation.

use super::{Current, Limit, LogReader, check_header, limit, stop_of};
use crate::format::frame::{Digest, FRAME_HEADER_LEN, FrameHeader, frame_digest};
use crate::log::recovery::{damaged, list_segments};
use crate::log::{LogEnd, LogError, LogPosition};
use crate::types::FrameNo;

impl LogReader {
    /// Whether a log that ends at `position`, its last frame having `digest`, holds nothing but
    /// what this one holds or held. False: their lines parted, so that numbers above may have been
    /// given twice. `end` is what the writer has published.
    ///
    /// A frame that this log lost in a power cut cannot be told from one that it never wrote.
    pub fn agrees(
        &self,
        position: &LogPosition,
        digest: &Digest,
        end: &LogEnd,
    ) -> Result<bool, LogError> {
        let Some(last) = position.next_frame.0.checked_sub(1).map(FrameNo) else {
            return Ok(true);
        };
        let mut parent = None;
        // Segments of the incarnation lie behind the frame, none of them next to it.
        let mut behind = false;
        for (id, _) in list_segments(&self.home)?.into_iter().rev() {
            if limit(id, end) == Limit::None {
                continue;
            }
            let Some(mut segment) = self.open_segment(id)? else {
                continue;
            };
            if segment.header.incarnation != position.incarnation {
                let named = segment.header.parent;
                parent = named
                    .filter(|parent| parent.incarnation == position.incarnation)
                    .or(parent);
                continue;
            }
            if id.first_frame > position.next_frame {
                behind = true;
                continue;
            }
            let stop = stop_of(&segment, end)?;
            if id.first_frame == position.next_frame {
                match header_at(&mut segment, id.first_frame, stop)? {
                    Some((header, _)) => return Ok(header.prev == *digest),
                    None => continue,
                }
            }
            let own = header_at(&mut segment, last, stop)?;
            return Ok(own.map_or(behind, |(_, own)| own == *digest));
        }
        // All frames of the incarnation that this log had and that lie before are trimmed.
        Ok(match parent {
            Some(parent) if parent.frame_no == last => parent.digest == *digest,
            Some(parent) => parent.frame_no > last,
            None => behind,
        })
    }
}

/// Header and digest of a frame, read from where `segment` stands; `None` if the segment ends before.
fn header_at(
    segment: &mut Current,
    wanted: FrameNo,
    stop: u64,
) -> Result<Option<(FrameHeader, Digest)>, LogError> {
    let mut bytes = [0; FRAME_HEADER_LEN];
    while segment.offset < stop {
        let read = segment
            .file
            .read_at(&mut bytes, segment.offset)
            .map_err(LogError::io("reading a segment"))?;
        let header = check_header(segment, &bytes[..read])
            .map_err(|error| damaged(&segment.name, segment.offset, error))?;
        if header.frame_no == wanted {
            return Ok(Some((header, frame_digest(&bytes))));
        }
        segment.offset += header.frame_len() as u64;
        segment.next_frame.0 += 1;
    }
    Ok(None)
}
