//! Walks the frames of a segment file for their tables; cells are skipped, not read.

use std::sync::Arc;

use crate::format::FormatError;
use crate::format::digest::sha256;
use crate::format::frame::{FRAME_HEADER_LEN, FrameHeader, verify_body};
use crate::format::record::{PlacedRecord, read_table};
use crate::format::segment::{SEGMENT_HEADER_LEN, SegmentHeader};
use crate::log::LogError;
use crate::storage::File;

/// Bytes read at once: many small frames in one go, little waste beside large ones.
const CHUNK: usize = 64 * 1024;

/// A segment file under its name, for findings.
#[derive(Debug, Clone)]
pub struct SegmentFile {
    pub name: String,
    pub file: Arc<dyn File>,
}

impl SegmentFile {
    pub fn io(source: std::io::Error) -> LogError {
        LogError::Io {
            action: "reading a segment",
            source,
        }
    }

    pub fn damaged(&self, offset: u64, source: FormatError) -> LogError {
        LogError::Damaged {
            segment: self.name.clone(),
            offset,
            source,
        }
    }

    /// Fills `buffer`, or says how much is missing.
    pub fn read_exact(
        &self,
        buffer: &mut [u8],
        offset: u64,
        what: &'static str,
    ) -> Result<(), LogError> {
        let have = self.file.read_at(buffer, offset).map_err(Self::io)?;
        if have < buffer.len() {
            let need = buffer.len();
            return Err(self.damaged(offset, FormatError::Truncated { what, need, have }));
        }
        Ok(())
    }

    pub fn header(&self) -> Result<SegmentHeader, LogError> {
        let mut bytes = [0u8; SEGMENT_HEADER_LEN];
        self.read_exact(&mut bytes, 0, "segment header")?;
        SegmentHeader::parse(&bytes).map_err(|source| self.damaged(0, source))
    }

    pub fn frame_header(&self, offset: u64) -> Result<FrameHeader, LogError> {
        let mut bytes = [0u8; FRAME_HEADER_LEN];
        self.read_exact(&mut bytes, offset, "frame header")?;
        FrameHeader::parse(&bytes).map_err(|source| self.damaged(offset, source))
    }

    /// The records of the frame at `offset`; table and directory are verified.
    pub fn records(
        &self,
        offset: u64,
        header: &FrameHeader,
    ) -> Result<Vec<PlacedRecord>, LogError> {
        let mut bytes = vec![0u8; header.table_len as usize + header.directory_len as usize];
        self.read_exact(&mut bytes, offset + FRAME_HEADER_LEN as u64, "record table")?;
        check_table(header, &bytes).map_err(|source| self.damaged(offset, source))?;
        read_table(header, &bytes[..header.table_len as usize])
            .collect::<Result<_, _>>()
            .map_err(|source| self.damaged(offset, source))
    }
}

/// Verifies record table and cell directory, back to back, against the header.
fn check_table(header: &FrameHeader, bytes: &[u8]) -> Result<(), FormatError> {
    if sha256(bytes) == header.table_digest {
        Ok(())
    } else {
        Err(FormatError::Digest {
            what: "record table",
        })
    }
}

/// A frame of the walk; `table` is verified.
#[derive(Debug)]
pub struct WalkedFrame<'a> {
    pub offset: u64,
    pub header: FrameHeader,
    pub table: &'a [u8],
}

#[derive(Debug)]
pub struct Walker<'a> {
    segment: &'a SegmentFile,
    next: u64,
    end: u64,
    /// Bytes of the file from `buffer_at` on.
    buffer: Vec<u8>,
    buffer_at: u64,
    whole: bool,
}

impl<'a> Walker<'a> {
    /// From the first frame to byte `end` of the file. `whole` verifies the body digests too: for
    /// bytes that nobody vouches for.
    pub fn new(segment: &'a SegmentFile, end: u64, whole: bool) -> Self {
        let next = SEGMENT_HEADER_LEN as u64;
        Self {
            segment,
            next,
            end,
            buffer: Vec::new(),
            buffer_at: 0,
            whole,
        }
    }

    /// The next frame, or None at the end. After an error the walk is over.
    pub fn next_frame(&mut self) -> Result<Option<WalkedFrame<'_>>, LogError> {
        let offset = self.next;
        if offset >= self.end {
            return Ok(None);
        }
        let header = FrameHeader::parse(self.bytes(offset, FRAME_HEADER_LEN, "frame header")?)
            .map_err(|source| self.segment.damaged(offset, source))?;
        self.next = offset + header.frame_len() as u64;
        if self.next > self.end {
            let (need, have) = (header.frame_len() as u64, self.end - offset);
            let source = FormatError::Truncated {
                what: "frame",
                need: usize::try_from(need).unwrap_or(usize::MAX),
                have: usize::try_from(have).unwrap_or(usize::MAX),
            };
            return Err(self.segment.damaged(offset, source));
        }
        let segment = self.segment;
        let whole = self.whole;
        let len = if whole {
            header.body_len()
        } else {
            header.head_len() - FRAME_HEADER_LEN
        };
        let body = self.bytes(offset + FRAME_HEADER_LEN as u64, len, "frame body")?;
        let checked = if whole {
            verify_body(&header, body)
        } else {
            check_table(&header, body)
        };
        checked.map_err(|source| segment.damaged(offset, source))?;
        let table = &body[..header.table_len as usize];
        Ok(Some(WalkedFrame {
            offset,
            header,
            table,
        }))
    }

    fn bytes(&mut self, at: u64, len: usize, what: &'static str) -> Result<&[u8], LogError> {
        let held = at
            .checked_sub(self.buffer_at)
            .and_then(|skip| usize::try_from(skip).ok())
            .filter(|skip| {
                skip.checked_add(len)
                    .is_some_and(|end| end <= self.buffer.len())
            });
        if let Some(skip) = held {
            return Ok(&self.buffer[skip..skip + len]);
        }
        self.buffer.resize(len.max(CHUNK), 0);
        self.buffer_at = at;
        let have = self
            .segment
            .file
            .read_at(&mut self.buffer, at)
            .map_err(SegmentFile::io)?;
        self.buffer.truncate(have);
        if have < len {
            let source = FormatError::Truncated {
                what,
                need: len,
                have,
            };
            return Err(self.segment.damaged(at, source));
        }
        Ok(&self.buffer[..len])
    }
}
