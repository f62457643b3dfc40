//! Whether what a target holds is the beginning of what this log has.
//!
//! A writer whose machine was rolled back gives numbers again, and only digests tell. The frame
//! before the target's position is looked for where this log may know it: among its own frames, as
//! `prev` of the frame behind it, or as the parent of a later incarnation.

use super::{Current, Limit, LogReader, check_header, limit, stop_of};
use crate::format::frame::{Digest, FRAME_HEADER_LEN, frame_digest};
use crate::log::recovery::list_segments;
use crate::log::walk::find_header;
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
            match digest_of(&mut segment, last, stop)? {
                Known::Digest(own) => return Ok(own == *digest),
                // Whoever reads on there finds the damage; it is no sign that the lines parted.
                Known::Damaged => return Ok(true),
                Known::Beyond if id.first_frame == position.next_frame => {}
                Known::Beyond => return Ok(behind),
            }
        }
        // All frames of the incarnation that this log had and that lie before are trimmed.
        Ok(match parent {
            Some(parent) if parent.frame_no == last => parent.digest == *digest,
            Some(parent) => parent.frame_no > last,
            None => behind,
        })
    }
}

/// What a segment says of a frame.
enum Known {
    Digest(Digest),
    /// Its header and that of the next cannot be read.
    Damaged,
    /// The segment ends before.
    Beyond,
}

/// Looks for a frame's digest: its own, or the `prev` of the next one.
fn digest_of(segment: &mut Current, wanted: FrameNo, stop: u64) -> Result<Known, LogError> {
    let mut bytes = [0; FRAME_HEADER_LEN];
    while segment.offset < stop {
        let read = segment
            .file
            .read_at(&mut bytes, segment.offset)
            .map_err(LogError::io("reading a segment"))?;
        let Ok(header) = check_header(segment, &bytes[..read]) else {
            return behind_damage(segment, wanted, stop);
        };
        if header.frame_no == wanted {
            return Ok(Known::Digest(frame_digest(&bytes)));
        }
        if header.frame_no > wanted {
            return Ok(Known::Digest(header.prev));
        }
        segment.offset += header.frame_len() as u64;
        segment.next_frame.0 += 1;
    }
    Ok(Known::Beyond)
}

/// The same where a damaged header is in the way: the next one that can be told from the bytes.
fn behind_damage(segment: &Current, wanted: FrameNo, stop: u64) -> Result<Known, LogError> {
    let mut known = Known::Damaged;
    let incarnation = segment.header.incarnation;
    find_header(&*segment.file, segment.offset, stop, &mut |header, _| {
        if header.incarnation != incarnation || header.frame_no < wanted {
            return Ok(false);
        }
        if header.frame_no == wanted {
            known = Known::Digest(frame_digest(&header.encode()));
        } else if header.frame_no.0 == wanted.0 + 1 {
            known = Known::Digest(header.prev);
        }
        Ok(true)
    })?;
    Ok(known)
}
