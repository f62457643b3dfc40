//! What the writer can say about frames and incarnations that are held: for frames that come again
//! and for the parent that a new incarnation names. Off the hot path: reads segments.

use std::io::ErrorKind;
use std::sync::Arc;

use super::admit::Chain;
use super::writer::LogWriter;
use super::{LogError, digest_of, names};
use crate::format::frame::{Digest, FRAME_HEADER_LEN, FrameHeader, frame_digest};
use crate::format::manifest::SegmentEntry;
use crate::format::segment::{SEGMENT_HEADER_LEN, SegmentHeader};
use crate::storage::File;
use crate::types::{FrameNo, IncarnationId};

/// Where `held_digest` has come to in a segment.
pub(super) struct Cursor {
    file: Arc<dyn File>,
    length: u64,
    next: FrameNo,
    offset: u64,
}

/// A segment's file and the length of its whole frames.
struct Held {
    file: Arc<dyn File>,
    length: u64,
}

impl Chain {
    pub(super) fn is(&self, incarnation: IncarnationId) -> bool {
        self.header.incarnation == incarnation
    }
}

impl LogWriter {
    /// State of an incarnation of which frames are held.
    pub(super) fn held_chain(&self, header: &SegmentHeader) -> Option<Chain> {
        let id = header.incarnation.to_string();
        let inner = self.catalog.inner.lock();
        let open = self.open.as_ref().filter(|open| open.entry.records > 0);
        let waiting = inner
            .sealing
            .iter()
            .map(|sealing| &sealing.file.incarnation);
        let mut incarnations = (inner.manifest.incarnations.iter())
            .chain(waiting)
            .chain(open.map(|open| &open.file.incarnation));
        let ordinal = incarnations.find(|known| known.id == id)?.ordinal;
        let waiting = inner.sealing.iter().map(|sealing| &sealing.entry);
        let mut entries = (inner.manifest.segments.iter())
            .chain(waiting)
            .chain(open.map(|open| &open.entry))
            .filter(|entry| entry.ordinal == ordinal);
        let first = entries.next()?;
        let last = entries.next_back().unwrap_or(first);
        let newest = ordinal == self.end.ordinal;
        let last_digest = if newest {
            self.end.last_digest
        } else {
            digest_of(&last.last_digest)
        };
        Some(Chain {
            header: header.clone(),
            ordinal,
            base: FrameNo(first.first_frame),
            next_frame: FrameNo(last.last_frame.saturating_add(1)),
            last_digest: Some(last_digest),
            closed: !newest,
        })
    }

    /// The header under which frames of an incarnation are held.
    pub(super) fn known_header(&self, chain: &Chain) -> Result<Option<SegmentHeader>, LogError> {
        if self
            .chain
            .as_ref()
            .is_some_and(|current| current.is(chain.header.incarnation))
        {
            return Ok(self.chain.as_ref().map(|current| current.header.clone()));
        }
        let last = FrameNo(chain.next_frame.0.saturating_sub(1));
        let Some(Held { file, .. }) = self.segment_with(chain, last)? else {
            return Ok(None);
        };
        let mut bytes = [0; SEGMENT_HEADER_LEN];
        let read = file
            .read_at(&mut bytes, 0)
            .map_err(LogError::io("reading a segment"))?;
        Ok(SegmentHeader::parse(&bytes[..read]).ok())
    }

    /// Whether a new incarnation continues what is held.
    pub(super) fn check_parent(&self, header: &SegmentHeader) -> Result<(), LogError> {
        if self.end.last_frame.is_some() && header.first_frame.0 != 0 {
            let (expected, found) = (FrameNo(0), header.first_frame);
            return Err(LogError::OutOfOrder { expected, found });
        }
        let Some(parent) = header.parent else {
            return Ok(());
        };
        let parent_header = SegmentHeader {
            incarnation: parent.incarnation,
            ..header.clone()
        };
        let current = self
            .chain
            .as_ref()
            .filter(|chain| chain.is(parent.incarnation));
        let Some(chain) = current.cloned().or_else(|| self.held_chain(&parent_header)) else {
            return Ok(());
        };
        if parent.frame_no >= chain.next_frame {
            let (expected, found) = (chain.next_frame, FrameNo(parent.frame_no.0 + 1));
            return Err(LogError::OutOfOrder { expected, found });
        }
        match self.held_digest(&chain, parent.frame_no, &mut None)? {
            Some(digest) if digest != parent.digest => Err(LogError::Conflict {
                frame: parent.frame_no,
            }),
            _ => Ok(()),
        }
    }

    /// The segment that holds a frame of an incarnation.
    fn segment_with(&self, chain: &Chain, frame: FrameNo) -> Result<Option<Held>, LogError> {
        let holds = |entry: &SegmentEntry| {
            entry.ordinal == chain.ordinal
                && (entry.first_frame..=entry.last_frame).contains(&frame.0)
        };
        if let Some(open) = self.open.as_ref().filter(|open| holds(&open.entry)) {
            let (file, length) = (Arc::clone(&open.file.file), open.entry.bytes);
            return Ok(Some(Held { file, length }));
        }
        let (name, length) = {
            let inner = self.catalog.inner.lock();
            if let Some(found) = inner.sealing.iter().find(|sealing| holds(&sealing.entry)) {
                let (file, length) = (Arc::clone(&found.file.file), found.entry.bytes);
                return Ok(Some(Held { file, length }));
            }
            let found = inner.manifest.segments.iter().find(|entry| holds(entry));
            let Some(entry) = found else { return Ok(None) };
            (names::sealed_name(entry), entry.bytes)
        };
        match self.catalog.home.directory.open(&name, false) {
            Ok(file) => Ok(Some(Held { file, length })),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(LogError::io("opening a segment")(error)),
        }
    }

    /// Digest of a frame that is held, read from its segment; `None` if it was trimmed. `cursor`
    /// lets a run of frames be found in one pass.
    pub(super) fn held_digest(
        &self,
        chain: &Chain,
        frame: FrameNo,
        cursor: &mut Option<Cursor>,
    ) -> Result<Option<Digest>, LogError> {
        if cursor
            .as_ref()
            .is_none_or(|at| at.next > frame || at.offset >= at.length)
        {
            let Some(Held { file, length }) = self.segment_with(chain, frame)? else {
                return Ok(None);
            };
            let offset = SEGMENT_HEADER_LEN as u64;
            *cursor = Some(Cursor {
                file,
                length,
                next: FrameNo(0),
                offset,
            });
        }
        let Some(at) = cursor else { return Ok(None) };
        let mut bytes = [0; FRAME_HEADER_LEN];
        while at.offset < at.length {
            let read = at.file.read_at(&mut bytes, at.offset);
            let read = read.map_err(LogError::io("reading a segment"))?;
            let header = FrameHeader::parse(&bytes[..read])?;
            at.offset += header.frame_len() as u64;
            at.next = FrameNo(header.frame_no.0.saturating_add(1));
            if header.frame_no == frame {
                return Ok(Some(frame_digest(&bytes)));
            }
        }
        Ok(None)
    }
}
