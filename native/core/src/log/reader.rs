//! Reads a log that another process may be writing.
//!
//! Needs no manifest: the names of the files say what lies where, and the writer's published end
//! says how far to look. A segment before the open one is complete to its last byte, whether it has
//! its sealed name already or not. An open file keeps its content when it is renamed or trimmed.

use std::io::ErrorKind;
use std::sync::Arc;

use super::names::{SegmentId, SegmentState};
use super::recovery::{damaged, list_segments};
use super::walk::{find_header, read_header};
use super::{Home, LogEnd, LogError, LogPosition};
use crate::format::FormatError;
use crate::format::frame::{FRAME_HEADER_LEN, FrameHeader, verify_body};
use crate::format::segment::{SEGMENT_HEADER_LEN, SegmentHeader};
use crate::storage::{Directory, File};
use crate::types::{FrameNo, GroupId, IncarnationId, Seq, TimeUs};

mod agree;

/// Attempts to open a segment that is being renamed under the reader.
const OPEN_ATTEMPTS: usize = 8;

/// Where the reader wants to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Oldest,
    At { ordinal: u32, next_frame: FrameNo },
}

/// The segment being read.
#[derive(Debug)]
struct Current {
    id: SegmentId,
    /// Known from a sealed name.
    last_frame: Option<FrameNo>,
    name: String,
    file: Arc<dyn File>,
    header: SegmentHeader,
    offset: u64,
    next_frame: FrameNo,
}

/// Reads a log that another process may be writing.
#[derive(Debug)]
pub struct LogReader {
    home: Home,
    target: Target,
    current: Option<Current>,
    /// The next batch is the first since a seek, of an incarnation, or behind a hole.
    announce: bool,
    verify: bool,
}

/// Frames read in one go: whole, of one incarnation, ready for the wire.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Set when `frames` is the first since a seek, begins an incarnation or a hole was crossed:
    /// send it first. Its `first_frame` is that of the batch.
    pub header: Option<SegmentHeader>,
    pub frames: Vec<u8>,
    pub first_frame: FrameNo,
    pub last_frame: FrameNo,
    pub last_seq: Seq,
    pub last_time: TimeUs,
    pub frame_count: u32,
}

/// How far a segment may be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Limit {
    /// The writer has published nothing of it.
    None,
    /// It still grows; this much is committed.
    Growing(u64),
    /// It is complete: to the file's end, or to the last frame that its name gives.
    Complete,
}

fn limit(id: SegmentId, end: &LogEnd) -> Limit {
    if let Some(first_frame) = end.open_first_frame {
        let open = SegmentId {
            ordinal: end.ordinal,
            first_frame,
        };
        return match id.cmp(&open) {
            std::cmp::Ordering::Less => Limit::Complete,
            std::cmp::Ordering::Equal => Limit::Growing(end.committed_len),
            std::cmp::Ordering::Greater => Limit::None,
        };
    }
    let Some(last_frame) = end.last_frame else {
        return Limit::None;
    };
    if (id.ordinal, id.first_frame) <= (end.ordinal, last_frame) {
        Limit::Complete
    } else {
        Limit::None
    }
}

impl LogReader {
    /// Opens the log for reading, at its oldest frame. Takes no lock: a segment that is trimmed
    /// under the reader has been released by those who need it, and the reader goes on behind it.
    pub fn open(directory: Arc<dyn Directory>, group: GroupId) -> Result<Self, LogError> {
        let home = Home { directory, group };
        list_segments(&home)?;
        Ok(Self {
            home,
            target: Target::Oldest,
            current: None,
            announce: true,
            verify: true,
        })
    }

    /// Whether the bodies of frames are checked against their digests (default). Headers and the
    /// frames' places always are. A receiver that checks anyway saves this side the time.
    pub fn verify_bodies(&mut self, verify: bool) {
        self.verify = verify;
    }

    /// Goes to a position; `None` is the oldest frame held. If the frame is no longer or not yet
    /// held, goes to the next one that is; of an incarnation that this log does not hold, to the
    /// oldest. The next batch carries a header.
    pub fn seek(&mut self, position: Option<&LogPosition>) -> Result<(), LogError> {
        self.current = None;
        self.announce = true;
        self.target = Target::Oldest;
        if let Some(position) = position
            && let Some(ordinal) = self.ordinal_of(position.incarnation)?
        {
            self.target = Target::At {
                ordinal,
                next_frame: position.next_frame,
            };
        }
        Ok(())
    }

    /// Ordinal of an incarnation, newest first: that is where readers usually are.
    fn ordinal_of(&self, incarnation: IncarnationId) -> Result<Option<u32>, LogError> {
        let mut last = None;
        for (id, _) in list_segments(&self.home)?.into_iter().rev() {
            if last == Some(id.ordinal) {
                continue;
            }
            // One readable segment of an incarnation is enough.
            if let Some(found) = self.open_segment(id)? {
                last = Some(id.ordinal);
                if found.header.incarnation == incarnation {
                    return Ok(Some(id.ordinal));
                }
            }
        }
        Ok(None)
    }

    /// Opens a segment under the name it has now. `None` if it is gone, or its header is not yet
    /// whole. A damaged header of a sealed segment is an error.
    fn open_segment(&self, id: SegmentId) -> Result<Option<Current>, LogError> {
        for _ in 0..OPEN_ATTEMPTS {
            let listed = list_segments(&self.home)?;
            let Some((_, state)) = listed.iter().find(|(listed, _)| *listed == id) else {
                return Ok(None);
            };
            let last_frame = match state {
                SegmentState::Open => None,
                SegmentState::Sealed { last_frame } => Some(*last_frame),
                SegmentState::Gone { .. } => return Ok(None),
            };
            let name = id.file_name(*state);
            let file = match self.home.directory.open(&name, false) {
                Ok(file) => file,
                // Renamed or removed since it was listed.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(LogError::io("opening a segment")(error)),
            };
            let header = match read_header(&*file, id, self.home.group)? {
                Ok(header) => header,
                Err(_) if last_frame.is_none() => return Ok(None),
                Err(error) => return Err(damaged(&name, 0, error)),
            };
            let (offset, next_frame) = (SEGMENT_HEADER_LEN as u64, id.first_frame);
            return Ok(Some(Current {
                id,
                last_frame,
                name,
                file,
                header,
                offset,
                next_frame,
            }));
        }
        Ok(None)
    }

    /// Opens the first published segment that is `allowed` and reads on there.
    fn enter(
        &mut self,
        end: &LogEnd,
        allowed: impl Fn(SegmentId, SegmentState) -> bool,
    ) -> Result<bool, LogError> {
        for (id, state) in list_segments(&self.home)? {
            let gone = matches!(state, SegmentState::Gone { .. });
            if gone || !allowed(id, state) || limit(id, end) == Limit::None {
                continue;
            }
            if let Some(next) = self.open_segment(id)? {
                let follows = self.current.as_ref().is_some_and(|last| {
                    last.id.ordinal == id.ordinal && last.next_frame == id.first_frame
                });
                self.announce |= !follows;
                self.current = Some(next);
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Opens the segment in which to go on after a seek.
    fn locate(&mut self, end: &LogEnd) -> Result<bool, LogError> {
        let (ordinal, next_frame) = match self.target {
            Target::Oldest => return self.enter(end, |_, _| true),
            Target::At {
                ordinal,
                next_frame,
            } => (ordinal, next_frame),
        };
        // The last segment that begins at or before the frame holds it, or it lies behind.
        let begins = list_segments(&self.home)?
            .into_iter()
            .map(|(id, _)| id)
            .rfind(|id| id.ordinal == ordinal && id.first_frame <= next_frame);
        let from = SegmentId {
            ordinal,
            first_frame: next_frame,
        };
        let entered = self.enter(end, |id, state| match state {
            SegmentState::Sealed { last_frame } if begins == Some(id) => last_frame >= next_frame,
            _ => begins == Some(id) || id >= from,
        })?;
        if !entered {
            return Ok(false);
        }
        self.skip_to(ordinal, next_frame, end)?;
        Ok(true)
    }

    /// Steps over the frames before the wanted one; over a damaged header to the next frame, wanted
    /// or later, that can be told from the bytes.
    fn skip_to(&mut self, ordinal: u32, next_frame: FrameNo, end: &LogEnd) -> Result<(), LogError> {
        let Some(current) = self.current.as_mut().filter(|at| at.id.ordinal == ordinal) else {
            return Ok(());
        };
        let stop = stop_of(current, end)?;
        let mut bytes = [0; FRAME_HEADER_LEN];
        while current.next_frame < next_frame && current.offset < stop {
            let read = current
                .file
                .read_at(&mut bytes, current.offset)
                .map_err(LogError::io("reading a segment"))?;
            if let Ok(header) = check_header(current, &bytes[..read]) {
                current.offset += header.frame_len() as u64;
                current.next_frame.0 += 1;
                continue;
            }
            let incarnation = current.header.incarnation;
            let mut found = next_frame;
            let offset = find_header(&*current.file, current.offset, stop, &mut |header, _| {
                found = header.frame_no;
                Ok(header.incarnation == incarnation && header.frame_no >= next_frame)
            })?;
            current.offset = offset.unwrap_or(stop);
            current.next_frame = if offset.is_some() { found } else { next_frame };
        }
        Ok(())
    }

    /// Next frames up to `end`, what the writer has published; at least one frame if there is one,
    /// else `None`. Follows sealed and renamed segments. A damaged frame is an error, again at each
    /// call, until `seek` goes past it.
    pub fn next_batch(
        &mut self,
        end: &LogEnd,
        max_bytes: usize,
    ) -> Result<Option<Batch>, LogError> {
        if self.current.is_none() && !self.locate(end)? {
            return Ok(None);
        }
        loop {
            let Some(current) = &mut self.current else {
                return Ok(None);
            };
            let stop = stop_of(current, end)?;
            let past_last = current
                .last_frame
                .is_some_and(|last| current.next_frame > last);
            if current.offset < stop && !past_last {
                let mut batch = read_batch(current, stop, max_bytes, self.verify)?;
                if std::mem::take(&mut self.announce) {
                    let first_frame = batch.first_frame;
                    batch.header = Some(SegmentHeader {
                        first_frame,
                        ..current.header.clone()
                    });
                }
                return Ok(Some(batch));
            }
            let id = current.id;
            if limit(id, end) != Limit::Complete || !self.enter(end, |next, _| next > id)? {
                return Ok(None);
            }
        }
    }
}

/// Offset behind the last byte that may be read.
fn stop_of(current: &Current, end: &LogEnd) -> Result<u64, LogError> {
    match limit(current.id, end) {
        Limit::None => Ok(0),
        Limit::Growing(committed) => Ok(committed),
        Limit::Complete => current
            .file
            .len()
            .map_err(LogError::io("reading a segment")),
    }
}

/// Parses a frame header and checks that it is the one that is due.
fn check_header(current: &Current, bytes: &[u8]) -> Result<FrameHeader, FormatError> {
    let header = FrameHeader::parse(bytes)?;
    let what = "frame header";
    if header.group != current.header.group || header.incarnation != current.header.incarnation {
        let (field, reason) = ("incarnation", "not the segment's");
        return Err(FormatError::Field {
            what,
            field,
            reason,
        });
    }
    if header.frame_no != current.next_frame {
        let (field, reason) = ("frame_no", "not the next");
        return Err(FormatError::Field {
            what,
            field,
            reason,
        });
    }
    Ok(header)
}

/// Reads whole frames: as many as fit, at least one.
fn read_batch(
    current: &mut Current,
    stop: u64,
    max_bytes: usize,
    verify: bool,
) -> Result<Batch, LogError> {
    let left = usize::try_from(stop - current.offset).unwrap_or(usize::MAX);
    let mut frames = vec![0; left.min(max_bytes.max(FRAME_HEADER_LEN))];
    let read = current
        .file
        .read_at(&mut frames, current.offset)
        .map_err(LogError::io("reading a segment"))?;
    frames.truncate(read);
    let start = current.offset;
    let bad = |name: &str, at: usize, error| damaged(name, start + at as u64, error);
    let first_frame = current.next_frame;
    let mut newest: Option<FrameHeader> = None;
    let mut done = 0;
    let mut frame_count = 0;
    while done < frames.len()
        && current
            .last_frame
            .is_none_or(|last| current.next_frame <= last)
    {
        if done > 0 && frames.len() - done < FRAME_HEADER_LEN {
            break;
        }
        let header = match check_header(current, &frames[done..]) {
            Ok(header) => header,
            // What is good goes out first; the next call comes back to the bad place.
            Err(_) if done > 0 => break,
            Err(error) => return Err(bad(&current.name, done, error)),
        };
        let need = header.frame_len();
        if frames.len() - done < need {
            if done > 0 {
                break;
            }
            if left < need {
                let truncated = FormatError::Truncated {
                    what: "frame",
                    need,
                    have: left,
                };
                return Err(bad(&current.name, done, truncated));
            }
            // One frame larger than `max_bytes`: it goes alone.
            let have = frames.len();
            frames.resize(need, 0);
            let read = current
                .file
                .read_at(&mut frames[have..], start + have as u64)
                .map_err(LogError::io("reading a segment"))?;
            frames.truncate(have + read);
            if frames.len() < need {
                let have = frames.len();
                let truncated = FormatError::Truncated {
                    what: "frame",
                    need,
                    have,
                };
                return Err(bad(&current.name, done, truncated));
            }
        }
        if verify
            && let Err(error) = verify_body(&header, &frames[done + FRAME_HEADER_LEN..done + need])
        {
            if done > 0 {
                break;
            }
            return Err(bad(&current.name, done, error));
        }
        done += need;
        frame_count += 1;
        current.next_frame.0 += 1;
        newest = Some(header);
    }
    frames.truncate(done);
    current.offset += done as u64;
    let Some(newest) = newest else {
        let (need, have) = (FRAME_HEADER_LEN, read);
        let truncated = FormatError::Truncated {
            what: "frame header",
            need,
            have,
        };
        return Err(bad(&current.name, 0, truncated));
    };
    Ok(Batch {
        header: None,
        frames,
        first_frame,
        last_frame: newest.frame_no,
        last_seq: Seq(newest.end_seq().0 - 1),
        last_time: newest.last_time,
        frame_count,
    })
}
