//! A run: the index of one segment or of several merged ones, in a file or in memory.

use std::sync::Arc;

use super::cache::Cache;
use super::entry::{Content, Entry};
use super::layout::{
    Lane, PAGE_ENTRIES, PAGE_LEN, PAGE_SLOTS, RUN_HEADER_LEN, RunHeader, Tail, check_page,
    page_offset,
};
use crate::format::FormatError;
use crate::log::LogError;
use crate::storage::{Directory, File};
use crate::types::{BlockIndex, Seq, VolumeIndex};

/// Verified pages of all runs of one reader, by run and page.
pub type PageCache = Cache<(u32, u64), Vec<u8>>;

/// Pages read at once by those that read a run from end to end.
const SCAN_PAGES: u64 = 16;

/// The index of some consecutive segments.
#[derive(Debug)]
pub struct Run {
    pub header: RunHeader,
    pub tail: Tail,
    pages: Pages,
}

#[derive(Debug)]
enum Pages {
    Memory {
        entries: Vec<Entry>,
        slots: Vec<u32>,
    },
    File(PagedFile),
}

#[derive(Debug)]
struct PagedFile {
    name: String,
    file: Arc<dyn File>,
    cache: Arc<PageCache>,
    id: u32,
}

/// Whether a lookup may read a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    Wait,
    /// What is not cached is an I/O error of kind `WouldBlock`.
    CachedOnly,
}

/// The newest version of a block in one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hit {
    pub seq: Seq,
    pub content: Content,
    pub slot: u32,
    /// First block of the piece, and the one behind it.
    pub piece: Blocks,
}

/// A range of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    pub start: u64,
    pub end: u64,
}

fn io(source: std::io::Error) -> LogError {
    LogError::Io {
        action: "reading an index run",
        source,
    }
}

impl Run {
    /// A run that exists in memory only. Entries of a lane are sorted, lanes back to back.
    pub fn in_memory(
        header: RunHeader,
        mut tail: Tail,
        entries: Vec<Entry>,
        slots: Vec<u32>,
    ) -> Self {
        tail.fences.clear();
        Self {
            header,
            tail,
            pages: Pages::Memory { entries, slots },
        }
    }

    /// Opens a run file; verifies header and tail. `id` names it in `cache`.
    pub fn open(
        directory: &dyn Directory,
        name: &str,
        cache: &Arc<PageCache>,
        id: u32,
    ) -> Result<Self, LogError> {
        let file = directory.open(name, false).map_err(io)?;
        let damaged = |offset, source| LogError::Damaged {
            segment: name.to_owned(),
            offset,
            source,
        };
        let mut bytes = [0u8; RUN_HEADER_LEN];
        let have = file.read_at(&mut bytes, 0).map_err(io)?;
        let file_len = file.len().map_err(io)?;
        let header =
            RunHeader::parse(&bytes[..have], file_len).map_err(|source| damaged(0, source))?;
        let at = header.tail_offset();
        let need = usize::try_from(header.tail_len()).expect("invariant: below TAIL_BYTES_MAX");
        let mut bytes = vec![0u8; need];
        let have = file.read_at(&mut bytes, at).map_err(io)?;
        if have < need {
            let what = "index run tail";
            return Err(damaged(at, FormatError::Truncated { what, need, have }));
        }
        let tail = Tail::parse(&header, &bytes).map_err(|source| damaged(at, source))?;
        let cache = Arc::clone(cache);
        let pages = Pages::File(PagedFile {
            name: name.to_owned(),
            file,
            cache,
            id,
        });
        Ok(Self {
            header,
            tail,
            pages,
        })
    }

    /// Name of the run's file; None in memory.
    pub fn name(&self) -> Option<&str> {
        match &self.pages {
            Pages::Memory { .. } => None,
            Pages::File(file) => Some(&file.name),
        }
    }

    /// Newest version of `block` at or before `seq`, and the first block behind `block` where an
    /// entry of any seq begins (`u64::MAX` if none; not looked for if `single`).
    pub fn lookup(
        &self,
        volume: VolumeIndex,
        block: BlockIndex,
        seq: Seq,
        single: bool,
        patience: Patience,
    ) -> Result<(Option<Hit>, u64), LogError> {
        let mut newest: Option<(Entry, u8)> = None;
        let mut next = u64::MAX;
        let Some(delta) = seq.0.checked_sub(self.header.base_seq.0) else {
            return Ok((None, next));
        };
        let delta = u32::try_from(delta).unwrap_or(u32::MAX);
        for lane in self.lanes(volume) {
            let index = block.0 >> lane.level;
            if index > lane.max_index {
                continue;
            }
            if index < lane.min_index {
                next = next.min(lane.min_index << lane.level);
                continue;
            }
            let end = lane.first + lane.count;
            let mut at = self.position(lane, Entry::behind(index, delta), patience)?;
            if at > lane.first {
                let entry = self.entry(at - 1, patience)?;
                let newer = |(best, _): (Entry, u8)| entry.seq(Seq(0)) > best.seq(Seq(0));
                if entry.index() == index && newest.is_none_or(newer) {
                    newest = Some((entry, lane.level));
                }
            }
            if single {
                continue;
            }
            if at < end && self.entry(at, patience)?.index() == index {
                at = self.position(lane, Entry::first_of(index + 1), patience)?;
            }
            if at < end {
                next = next.min(self.entry(at, patience)?.index() << lane.level);
            }
        }
        Ok((
            newest
                .map(|(entry, level)| self.hit(entry, level))
                .transpose()?,
            next,
        ))
    }

    fn hit(&self, entry: Entry, level: u8) -> Result<Hit, LogError> {
        let content = entry.content().ok_or_else(|| {
            let source = FormatError::Field {
                what: "index entry",
                field: "kind",
                reason: "not known to this version",
            };
            LogError::Damaged {
                segment: self.name().unwrap_or("memory").to_owned(),
                offset: 0,
                source,
            }
        })?;
        let start = entry.index() << level;
        Ok(Hit {
            seq: entry.seq(self.header.base_seq),
            content,
            slot: entry.slot(),
            piece: Blocks {
                start,
                end: start + (1 << level),
            },
        })
    }

    fn lanes(&self, volume: VolumeIndex) -> &[Lane] {
        let lanes = &self.tail.lanes;
        let from = lanes.partition_point(|lane| lane.volume < volume);
        let count = lanes[from..].partition_point(|lane| lane.volume == volume);
        &lanes[from..from + count]
    }

    /// Position of the first entry of a lane that is not below `bound`, or the lane's end.
    fn position(&self, lane: &Lane, bound: Entry, patience: Patience) -> Result<u64, LogError> {
        let (first, end) = (lane.first, lane.first + lane.count);
        match &self.pages {
            Pages::Memory { entries, .. } => {
                let lane = &entries[to_usize(first)..to_usize(end)];
                Ok(first + lane.partition_point(|entry| *entry < bound) as u64)
            }
            Pages::File(file) => {
                // Only the first page of a lane can begin with another lane's entry.
                let first_page = first / PAGE_ENTRIES;
                let last_page = (end - 1) / PAGE_ENTRIES;
                let fences = &self.tail.fences[to_usize(first_page + 1)..=to_usize(last_page)];
                let page = first_page + fences.partition_point(|fence| *fence < bound) as u64;
                let bytes = file.page(page, patience)?;
                let page_start = page * PAGE_ENTRIES;
                let from = first.max(page_start) - page_start;
                let to = end.min(page_start + PAGE_ENTRIES) - page_start;
                let entries = &bytes.as_chunks::<{ Entry::LEN }>().0[to_usize(from)..to_usize(to)];
                let below = entries.partition_point(|bytes| Entry::decode(*bytes) < bound);
                Ok(page_start + from + below as u64)
            }
        }
    }

    fn entry(&self, at: u64, patience: Patience) -> Result<Entry, LogError> {
        match &self.pages {
            Pages::Memory { entries, .. } => Ok(entries[to_usize(at)]),
            Pages::File(_) if at.is_multiple_of(PAGE_ENTRIES) => {
                Ok(self.tail.fences[to_usize(at / PAGE_ENTRIES)])
            }
            Pages::File(file) => {
                let bytes = file.page(at / PAGE_ENTRIES, patience)?;
                let entries = bytes.as_chunks::<{ Entry::LEN }>().0;
                Ok(Entry::decode(entries[to_usize(at % PAGE_ENTRIES)]))
            }
        }
    }

    /// Offset of a frame in its segment file. The slot is of this run.
    pub fn frame_offset(&self, slot: u32) -> Result<u64, LogError> {
        match &self.pages {
            Pages::Memory { slots, .. } => Ok(slots[slot as usize].into()),
            Pages::File(file) => {
                let slot = u64::from(slot);
                let bytes = file.page(
                    self.header.entry_pages() + slot / PAGE_SLOTS,
                    Patience::Wait,
                )?;
                let slots = bytes.as_chunks::<4>().0;
                Ok(u32::from_le_bytes(slots[to_usize(slot % PAGE_SLOTS)]).into())
            }
        }
    }

    /// Appends entries from `start` on, at least one and at most to `end`, to `out`. For those who
    /// read a whole run: keeps nothing in the cache.
    pub fn scan_entries(&self, start: u64, end: u64, out: &mut Vec<Entry>) -> Result<(), LogError> {
        match &self.pages {
            Pages::Memory { entries, .. } => {
                let end = end.min(start + SCAN_PAGES * PAGE_ENTRIES);
                out.extend_from_slice(&entries[to_usize(start)..to_usize(end)]);
            }
            Pages::File(file) => {
                file.scan(0, PAGE_ENTRIES, start, end, &mut |bytes| {
                    out.push(Entry::decode(bytes));
                })?;
            }
        }
        Ok(())
    }

    /// All frame offsets, in order of the slots, in pieces.
    pub fn scan_slots(&self, each: &mut dyn FnMut(u32)) -> Result<(), LogError> {
        match &self.pages {
            Pages::Memory { slots, .. } => slots.iter().copied().for_each(each),
            Pages::File(file) => {
                let (first_page, mut at) = (self.header.entry_pages(), 0);
                while at < u64::from(self.header.slots) {
                    let end = self.header.slots.into();
                    at += file.scan(first_page, PAGE_SLOTS, at, end, &mut |bytes| {
                        each(u32::from_le_bytes(bytes));
                    })?;
                }
            }
        }
        Ok(())
    }
}

impl PagedFile {
    fn page(&self, page: u64, patience: Patience) -> Result<Arc<Vec<u8>>, LogError> {
        if patience == Patience::CachedOnly {
            let cached = self.cache.get((self.id, page));
            return cached.ok_or_else(|| io(std::io::ErrorKind::WouldBlock.into()));
        }
        self.cache
            .get_or_load((self.id, page), || Ok((self.read(page, 1)?, PAGE_LEN)))
    }

    /// Reads and verifies consecutive pages.
    fn read(&self, page: u64, count: u64) -> Result<Vec<u8>, LogError> {
        let damaged = |page, source| {
            let offset = page_offset(page);
            LogError::Damaged {
                segment: self.name.clone(),
                offset,
                source,
            }
        };
        let need = to_usize(count) * PAGE_LEN;
        let mut bytes = vec![0u8; need];
        let have = self
            .file
            .read_at(&mut bytes, page_offset(page))
            .map_err(io)?;
        if have < need {
            let what = "index page";
            return Err(damaged(page, FormatError::Truncated { what, need, have }));
        }
        for (number, bytes) in (page..).zip(bytes.chunks_exact(PAGE_LEN)) {
            check_page(bytes).map_err(|source| damaged(number, source))?;
        }
        Ok(bytes)
    }

    /// Items of `N` bytes, `per_page` a page, from item `start` on, at most to `end`; returns their
    /// number, which is not zero.
    fn scan<const N: usize>(
        &self,
        first_page: u64,
        per_page: u64,
        start: u64,
        end: u64,
        each: &mut dyn FnMut([u8; N]),
    ) -> Result<u64, LogError> {
        let page = start / per_page;
        let count = ((end - 1) / per_page - page + 1).min(SCAN_PAGES);
        let end = end.min((page + count) * per_page);
        let bytes = self.read(first_page + page, count)?;
        for (page, bytes) in (page..).zip(bytes.chunks_exact(PAGE_LEN)) {
            let from = start.max(page * per_page) - page * per_page;
            let to = end.min((page + 1) * per_page) - page * per_page;
            let items = &bytes.as_chunks::<N>().0[to_usize(from)..to_usize(to)];
            for item in items {
                each(*item);
            }
        }
        Ok(end - start)
    }
}

/// A number of things that lie in memory or in one file that was checked.
fn to_usize(number: u64) -> usize {
    usize::try_from(number).expect("invariant: 64-bit host")
}
