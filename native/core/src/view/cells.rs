//! Reads blocks of history: index -> frame -> cell, with bounded caches of decoded cells and of
//! frame maps. Verifies tags and digests; what does not verify is EIO and a located finding.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::codec::{CodecError, FrameMap, FrameSource, open_cell};
use crate::constants::{BLOCK_SIZE, CELL_BLOCKS};
use crate::crypto::{CryptoError, GroupKey, IncarnationKey, Suite};
use crate::device::DeviceError;
use crate::format::FormatError;
use crate::format::frame::{FRAME_HEADER_LEN, FrameHeader};
use crate::index::cache::Cache;
use crate::index::{History, Version};
use crate::log::LogError;
use crate::types::{BlockIndex, FrameNo, Seq, VolumeIndex};

/// Frame maps kept; one is some kilobytes.
const FRAME_MAPS_MAX: usize = 4096;
/// Findings kept for those who ask.
const FINDINGS_MAX: usize = 64;
/// Read at once in the hope that it holds header, table and directory of a frame.
const HEAD_GUESS: usize = 8 * 1024;

#[allow(clippy::cast_possible_truncation)] // 16
const CELL_BLOCKS_U32: u32 = CELL_BLOCKS as u32;

/// Damage that a read has met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub volume: VolumeIndex,
    pub block: BlockIndex,
    /// Where and what: segment file, offset, frame and cell, as far as it got.
    pub what: String,
}

/// A cell of a frame of an incarnation (by its ordinal).
type CellKey = (u32, FrameNo, u32);

#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("segment {segment}, frame {frame} at byte {offset}: {source}", frame = frame.0)]
    Cell {
        segment: String,
        offset: u64,
        frame: FrameNo,
        source: CodecError,
    },
    #[error("frame {frame} of incarnation {ordinal} is not held", frame = frame.0)]
    Missing { ordinal: u32, frame: FrameNo },
    #[error("frame {frame} of incarnation {ordinal} has no block {block}", frame = frame.0)]
    NoBlock {
        ordinal: u32,
        frame: FrameNo,
        block: u32,
    },
    #[error("incarnation {ordinal}: {source}")]
    Key { ordinal: u32, source: CryptoError },
}

#[derive(Debug)]
pub struct CellReader {
    history: Arc<History>,
    key: GroupKey,
    keys: Mutex<HashMap<u32, Arc<IncarnationKey>>>,
    cells: Cache<CellKey, Vec<u8>>,
    maps: Cache<(u32, FrameNo), PlacedMap>,
    opened: AtomicU64,
    findings: Mutex<VecDeque<Finding>>,
}

/// A frame's map and where the frame lies.
#[derive(Debug)]
struct PlacedMap {
    map: Arc<FrameMap>,
    segment: Arc<crate::index::SegmentFile>,
    offset: u64,
}

impl CellReader {
    pub fn new(history: Arc<History>, key: GroupKey, cache_bytes: usize) -> Self {
        Self {
            history,
            key,
            keys: Mutex::new(HashMap::new()),
            cells: Cache::new(cache_bytes),
            maps: Cache::new(FRAME_MAPS_MAX),
            opened: AtomicU64::new(0),
            findings: Mutex::new(VecDeque::new()),
        }
    }

    /// Fills `buffer`, whole blocks, with the blocks from `block` on as of `seq`.
    pub fn read(
        &self,
        volume: VolumeIndex,
        block: BlockIndex,
        seq: Seq,
        buffer: &mut [u8],
    ) -> Result<(), DeviceError> {
        let mut at = block;
        let mut rest = buffer;
        while !rest.is_empty() {
            let filled = self
                .read_some(volume, at, seq, rest)
                .map_err(|error| self.note(volume, at, &error))?;
            at = BlockIndex(at.0 + (filled / BLOCK_SIZE) as u64);
            rest = &mut rest[filled..];
        }
        Ok(())
    }

    /// What a block and those behind it are as of `seq`, and for how many (of `blocks`).
    pub fn version(
        &self,
        volume: VolumeIndex,
        block: BlockIndex,
        seq: Seq,
        blocks: u64,
    ) -> Result<(Version, u64), DeviceError> {
        let found = self.history.lookup_within(volume, block, seq, blocks);
        found.map_err(|error| self.note(volume, block, &error.into()))
    }

    pub fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    pub fn findings(&self) -> Vec<Finding> {
        self.findings.lock().iter().cloned().collect()
    }

    fn note(&self, volume: VolumeIndex, block: BlockIndex, error: &ReadError) -> DeviceError {
        let mut findings = self.findings.lock();
        let finding = Finding {
            volume,
            block,
            what: error.to_string(),
        };
        if findings.back() != Some(&finding) {
            if findings.len() == FINDINGS_MAX {
                findings.pop_front();
            }
            findings.push_back(finding);
        }
        DeviceError::Io(libc::EIO)
    }

    /// As `read`, from the caches alone; false, with `buffer` unspecified, if they do not suffice.
    pub fn read_cached(
        &self,
        volume: VolumeIndex,
        block: BlockIndex,
        seq: Seq,
        buffer: &mut [u8],
    ) -> bool {
        let mut at = block;
        let mut rest = buffer;
        while !rest.is_empty() {
            let blocks = (rest.len() / BLOCK_SIZE) as u64;
            let Some(found) = self.history.lookup_cached(volume, at, seq, blocks) else {
                return false;
            };
            let Ok(Some(filled)) = fill(found, rest, |key| Ok(self.cells.get(key))) else {
                return false;
            };
            at = BlockIndex(at.0 + (filled / BLOCK_SIZE) as u64);
            rest = &mut rest[filled..];
        }
        true
    }

    /// Fills some whole blocks at the start of `buffer`, at least one; returns the bytes.
    fn read_some(
        &self,
        volume: VolumeIndex,
        block: BlockIndex,
        seq: Seq,
        buffer: &mut [u8],
    ) -> Result<usize, ReadError> {
        let wanted = (buffer.len() / BLOCK_SIZE) as u64;
        let found = self.history.lookup_within(volume, block, seq, wanted)?;
        let filled = fill(found, buffer, |key| self.cell(key).map(Some))?;
        Ok(filled.expect("invariant: a cell is there or an error"))
    }

    fn cell(&self, key: CellKey) -> Result<Arc<Vec<u8>>, ReadError> {
        self.cells.get_or_load(key, || {
            let (ordinal, frame, cell) = key;
            let incarnation = self.incarnation_key(ordinal)?;
            let place = self.placed(ordinal, frame)?;
            if cell as usize >= place.map.directory.len() {
                let block = cell.saturating_mul(CELL_BLOCKS_U32);
                return Err(ReadError::NoBlock {
                    ordinal,
                    frame,
                    block,
                });
            }
            let mut raw = Vec::new();
            let source = Source {
                reader: self,
                ordinal,
            };
            let opened =
                open_cell(&incarnation, &source, frame, cell, &mut raw).map_err(|source| {
                    let segment = place.segment.name.clone();
                    ReadError::Cell {
                        segment,
                        offset: place.offset,
                        frame,
                        source,
                    }
                })?;
            self.opened.fetch_add(opened as u64, Ordering::Relaxed);
            let weight = raw.len();
            Ok((raw, weight))
        })
    }

    fn incarnation_key(&self, ordinal: u32) -> Result<Arc<IncarnationKey>, ReadError> {
        if let Some(key) = self.keys.lock().get(&ordinal) {
            return Ok(Arc::clone(key));
        }
        let header = self.history.incarnation_header(ordinal)?;
        let header = header.ok_or(ReadError::Missing {
            ordinal,
            frame: FrameNo(0),
        })?;
        let suite =
            Suite::try_from(header.suite).map_err(|source| ReadError::Key { ordinal, source })?;
        let group = self.history.group();
        let key = IncarnationKey::derive(suite, &self.key, group, header.incarnation, &header.salt);
        let key = Arc::new(key);
        self.keys.lock().insert(ordinal, Arc::clone(&key));
        Ok(key)
    }

    fn placed(&self, ordinal: u32, frame: FrameNo) -> Result<Arc<PlacedMap>, ReadError> {
        self.maps.get_or_load((ordinal, frame), || {
            let missing = ReadError::Missing { ordinal, frame };
            let place = self.history.locate(ordinal, frame)?.ok_or(missing)?;
            let (segment, offset) = (place.segment, place.offset);
            let mut head = vec![0u8; HEAD_GUESS];
            let read = segment
                .file
                .read_at(&mut head, offset)
                .map_err(|source| LogError::Io {
                    action: "reading a frame",
                    source,
                })?;
            head.truncate(read);
            let damaged = |source| ReadError::Log(segment.damaged(offset, source));
            let header = FrameHeader::parse(&head).map_err(damaged)?;
            if header.frame_no != frame {
                let (what, field) = ("frame header", "frame_no");
                let reason = "not the frame that the index names";
                return Err(damaged(FormatError::Field {
                    what,
                    field,
                    reason,
                }));
            }
            let need = FRAME_HEADER_LEN + header.table_len as usize + header.directory_len as usize;
            if head.len() < need {
                let have = head.len();
                head.resize(need, 0);
                let rest = offset + have as u64;
                segment.read_exact(&mut head[have..], rest, "record table")?;
            }
            let map = FrameMap::parse(&head[..need]).map_err(damaged)?;
            Ok((
                PlacedMap {
                    map: Arc::new(map),
                    segment,
                    offset,
                },
                1,
            ))
        })
    }
}

/// Fills the blocks that one answer of the index covers from their cells; returns the bytes, or
/// None if `cell` had none.
fn fill(
    (version, alike): (Version, u64),
    buffer: &mut [u8],
    cell: impl Fn(CellKey) -> Result<Option<Arc<Vec<u8>>>, ReadError>,
) -> Result<Option<usize>, ReadError> {
    let wanted = buffer.len() / BLOCK_SIZE;
    let bytes = usize::try_from(alike).unwrap_or(wanted).min(wanted) * BLOCK_SIZE;
    let Version::Stored {
        ordinal,
        frame_no,
        mut payload_block,
        ..
    } = version
    else {
        buffer[..bytes].fill(0);
        return Ok(Some(bytes));
    };
    // A piece may reach over several cells.
    let mut filled = 0;
    while filled < bytes {
        let key = (ordinal, frame_no, payload_block / CELL_BLOCKS_U32);
        let Some(cell) = cell(key)? else {
            return Ok(None);
        };
        let from = (payload_block % CELL_BLOCKS_U32) as usize * BLOCK_SIZE;
        let count = (bytes - filled).min(cell.len().saturating_sub(from));
        if count == 0 {
            return Err(ReadError::NoBlock {
                ordinal,
                frame: frame_no,
                block: payload_block,
            });
        }
        buffer[filled..filled + count].copy_from_slice(&cell[from..from + count]);
        filled += count;
        payload_block += CELL_BLOCKS_U32 - payload_block % CELL_BLOCKS_U32;
    }
    Ok(Some(filled))
}

/// Frames of one incarnation, for the decoder.
struct Source<'a> {
    reader: &'a CellReader,
    ordinal: u32,
}

impl FrameSource for Source<'_> {
    fn map(&self, frame_no: FrameNo) -> Result<Arc<FrameMap>, CodecError> {
        let placed = self.reader.placed(self.ordinal, frame_no);
        placed
            .map(|placed| Arc::clone(&placed.map))
            .map_err(|e| CodecError::Source(e.to_string()))
    }

    fn sealed(&self, frame: &FrameMap, cell: u32, out: &mut Vec<u8>) -> Result<(), CodecError> {
        let failed = |error: ReadError| CodecError::Source(error.to_string());
        let placed = self
            .reader
            .placed(self.ordinal, frame.header.frame_no)
            .map_err(failed)?;
        let offset = placed.offset + u64::from(frame.cell_offsets[cell as usize]);
        out.resize(frame.directory[cell as usize].sealed_len as usize, 0);
        let read = placed.segment.read_exact(out, offset, "sealed cell");
        read.map_err(|error| failed(error.into()))
    }
}
