//! Write-intent bitmap of one volume (`docs/format/write-intent-bitmap.md`).
//!
//! A region's bit is durable before the first backing write into it, and is cleared only when its
//! records are durable in the spool and its data on the backing, with no write since. What is set
//! after an unclean stop is what history may not know. The bits are also the durable form of the
//! to-copy set: a region that must still be copied stays dirty.
//!
//! Writer against checkpoint, as Dekker did it: the writer marks `touched`, then looks at
//! `durable`; the checkpoint clears `durable`, then looks at `touched`. One of them sees the other.

use std::io;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::bitmap::{AtomicBitmap, regions_of};
use crate::constants::REGION_BYTES;
use crate::format::FormatError;
use crate::format::layout::{self, Field, Format, covers};
use crate::storage::{Directory, File};
use crate::types::{GroupId, VolumeIndex};

pub const INTENT_MAGIC: [u8; 8] = *b"EBBINTNT";
pub const INTENT_VERSION: u16 = 1;
pub const INTENT_HEADER_LEN: usize = 512;
/// One page of bits: what a disk writes whole.
pub const INTENT_PAGE_LEN: usize = 512;
/// Bytes of bits in a page; the rest is its checksum.
pub const INTENT_PAGE_BITS_LEN: usize = INTENT_PAGE_LEN - 8;
const PAGE_WORDS: usize = INTENT_PAGE_BITS_LEN / 8;
const PAGE_REGIONS: u64 = INTENT_PAGE_BITS_LEN as u64 * 8;

const FLAG_CLEAN: u32 = 1;
const FLAG_COPIED: u32 = 1 << 1;
const WHAT: &str = "write-intent bitmap";

/// What tells a backing from one that was changed behind the tap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    pub kind: IdentityKind,
    pub device: u64,
    pub inode: u64,
    /// Nanoseconds since the epoch (files).
    pub modified_ns: u64,
    pub changed_ns: u64,
    /// Sectors written to the device since boot (block devices).
    pub written_sectors: u64,
    pub boot_id: [u8; 16],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum IdentityKind {
    /// Nothing is known: never counts as changed.
    #[default]
    Unknown = 0,
    File = 1,
    Block = 2,
}

impl Identity {
    /// Whether a backing that was `self` at a clean stop has been written since.
    pub fn changed(&self, now: &Identity) -> bool {
        match (self.kind, now.kind) {
            (IdentityKind::Unknown, _) | (_, IdentityKind::Unknown) => false,
            // A device number may move between boots. The counter starts again with each: whatever
            // it shows then was written by somebody else.
            (IdentityKind::Block, IdentityKind::Block) => {
                let same_boot = self.boot_id == now.boot_id;
                now.written_sectors != if same_boot { self.written_sectors } else { 0 }
            }
            (IdentityKind::File, IdentityKind::File) => {
                (self.inode, self.modified_ns, self.changed_ns)
                    != (now.inode, now.modified_ns, now.changed_ns)
            }
            _ => true,
        }
    }
}

/// The fixed header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IntentHeader {
    pub group: GroupId,
    pub volume: VolumeIndex,
    /// A tap stopped cleanly and nothing runs since.
    pub clean: bool,
    /// The whole content has been in history once.
    pub copied: bool,
    pub size: u64,
    pub identity: Identity,
}

const GROUP: Field = Field::new("group", 16, 16);
const VOLUME: Field = Field::new("volume", 32, 2);
const IDENTITY_KIND: Field = Field::new("identity_kind", 34, 1);
const RESERVED_35: Field = Field::new("reserved_35", 35, 5);
const REGION: Field = Field::new("region_bytes", 40, 8);
const SIZE: Field = Field::new("size", 48, 8);
const DEVICE: Field = Field::new("device", 56, 8);
const INODE: Field = Field::new("inode", 64, 8);
const MODIFIED: Field = Field::new("modified_ns", 72, 8);
const CHANGED: Field = Field::new("changed_ns", 80, 8);
const SECTORS: Field = Field::new("written_sectors", 88, 8);
const BOOT_ID: Field = Field::new("boot_id", 96, 16);
const RESERVED_112: Field = Field::new("reserved_112", 112, 392);
const OWN: &[Field] = &[
    GROUP,
    VOLUME,
    IDENTITY_KIND,
    RESERVED_35,
    REGION,
    SIZE,
    DEVICE,
    INODE,
    MODIFIED,
    CHANGED,
    SECTORS,
    BOOT_ID,
    RESERVED_112,
];

/// The header, field by field; `docs/format/write-intent-bitmap.md` holds the same table.
pub const LAYOUT: &[Field] = &layout::header::<{ layout::fields(OWN) }>(OWN, INTENT_HEADER_LEN);

const PAGE_BITS: Field = Field::new("bits", 0, INTENT_PAGE_BITS_LEN);
const PAGE_CHECKSUM: Field = Field::new("checksum", INTENT_PAGE_BITS_LEN, 8);

/// One page of bits; `docs/format/write-intent-bitmap.md` holds the same table.
pub const PAGE_LAYOUT: &[Field] = &[PAGE_BITS, PAGE_CHECKSUM];
const _: () = assert!(covers(PAGE_LAYOUT, INTENT_PAGE_LEN));

const FORMAT: Format = Format {
    what: WHAT,
    magic: INTENT_MAGIC,
    version: INTENT_VERSION,
    header_len: INTENT_HEADER_LEN,
    reserved: &[RESERVED_35, RESERVED_112],
};

impl IntentHeader {
    pub fn encode(&self) -> [u8; INTENT_HEADER_LEN] {
        let mut bytes = [0; INTENT_HEADER_LEN];
        let flags = u32::from(self.clean) * FLAG_CLEAN + u32::from(self.copied) * FLAG_COPIED;
        FORMAT.begin(&mut bytes, flags);
        let identity = &self.identity;
        GROUP.put(&mut bytes, &self.group.0);
        VOLUME.put(&mut bytes, &self.volume.0.to_le_bytes());
        IDENTITY_KIND.put(&mut bytes, &[identity.kind as u8]);
        REGION.put(&mut bytes, &REGION_BYTES.to_le_bytes());
        SIZE.put(&mut bytes, &self.size.to_le_bytes());
        DEVICE.put(&mut bytes, &identity.device.to_le_bytes());
        INODE.put(&mut bytes, &identity.inode.to_le_bytes());
        MODIFIED.put(&mut bytes, &identity.modified_ns.to_le_bytes());
        CHANGED.put(&mut bytes, &identity.changed_ns.to_le_bytes());
        SECTORS.put(&mut bytes, &identity.written_sectors.to_le_bytes());
        BOOT_ID.put(&mut bytes, &identity.boot_id);
        FORMAT.finish(&mut bytes);
        bytes
    }

    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes = FORMAT.open(bytes)?;
        let flags = layout::FLAGS.u32(bytes);
        if flags & !(FLAG_CLEAN | FLAG_COPIED) != 0 {
            return Err(FORMAT.finding(layout::FLAGS, "has unknown bits"));
        }
        if REGION.u64(bytes) != REGION_BYTES {
            return Err(FORMAT.finding(REGION, "is not the region size of this version"));
        }
        let kind = match bytes[IDENTITY_KIND.offset] {
            0 => IdentityKind::Unknown,
            1 => IdentityKind::File,
            2 => IdentityKind::Block,
            _ => return Err(FORMAT.finding(IDENTITY_KIND, "is unknown")),
        };
        Ok(Self {
            group: GroupId(GROUP.array(bytes)),
            volume: VolumeIndex(VOLUME.u16(bytes)),
            clean: flags & FLAG_CLEAN != 0,
            copied: flags & FLAG_COPIED != 0,
            size: SIZE.u64(bytes),
            identity: Identity {
                kind,
                device: DEVICE.u64(bytes),
                inode: INODE.u64(bytes),
                modified_ns: MODIFIED.u64(bytes),
                changed_ns: CHANGED.u64(bytes),
                written_sectors: SECTORS.u64(bytes),
                boot_id: BOOT_ID.array(bytes),
            },
        })
    }
}

/// Pages are seeded with their number: one written to the wrong place does not verify.
fn page_checksum(page: usize, bits: &[u8]) -> u64 {
    xxh3_64_with_seed(bits, page as u64 + 1)
}

#[derive(Debug, Default)]
struct Writing {
    /// One thread writes the file at a time; the others add to `wanted` and wait.
    busy: bool,
    wanted: Vec<(u64, u64)>,
    /// The file can no longer be trusted to follow.
    failed: bool,
    /// Times a writer had to wait since the last checkpoint: says how far to set ahead.
    sets: u64,
}

/// What was found when the bitmap was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub header: IntentHeader,
    /// Pages whose checksum did not hold; all their regions count as dirty.
    pub damaged_pages: u64,
}

#[derive(Debug)]
pub struct IntentBitmap {
    file: Arc<dyn File>,
    durable: AtomicBitmap,
    touched: AtomicBitmap,
    writing: Mutex<Writing>,
    written: Condvar,
    header: Mutex<IntentHeader>,
}

fn file_name(volume: VolumeIndex) -> String {
    format!("volume-{:04x}.intent", volume.0)
}

impl IntentBitmap {
    /// Creates a bitmap with every region dirty: nothing of the volume is in history yet.
    pub fn create(directory: &dyn Directory, header: IntentHeader) -> io::Result<Self> {
        let name = file_name(header.volume);
        let temporary = format!("{name}.new");
        if let Err(error) = directory.remove(&temporary)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        let file = directory.create(&temporary)?;
        let bitmap = Self::assemble(file, header);
        bitmap.durable.set(0, regions_of(header.size));
        bitmap.write_pages(0, bitmap.durable.words(), |word| bitmap.durable.word(word))?;
        bitmap.write_header()?;
        directory.rename(&temporary, &name)?;
        directory.sync()?;
        Ok(bitmap)
    }

    /// Opens the bitmap of a volume, `None` if there is none. `size` is the backing's now; regions
    /// behind the recorded size come out dirty.
    pub fn open(
        directory: &dyn Directory,
        volume: VolumeIndex,
        size: u64,
    ) -> io::Result<Option<Result<(Self, Found), FormatError>>> {
        let file = match directory.open(&file_name(volume), true) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut bytes = [0; INTENT_HEADER_LEN];
        let read = file.read_at(&mut bytes, 0)?;
        let header = match IntentHeader::parse(&bytes[..read]) {
            Ok(header) => header,
            Err(error) => return Ok(Some(Err(error))),
        };
        let bitmap = Self::assemble(file, IntentHeader { size, ..header });
        let damaged_pages = bitmap.load(regions_of(header.size.min(size)))?;
        if size > header.size {
            // From the region that was partial on: what is new is in no history.
            bitmap
                .durable
                .set(header.size / REGION_BYTES, regions_of(size));
        }
        Ok(Some(Ok((
            bitmap,
            Found {
                header,
                damaged_pages,
            },
        ))))
    }

    fn assemble(file: Arc<dyn File>, header: IntentHeader) -> Self {
        let regions = regions_of(header.size);
        Self {
            file,
            durable: AtomicBitmap::new(regions),
            touched: AtomicBitmap::new(regions),
            writing: Mutex::default(),
            written: Condvar::new(),
            header: Mutex::new(header),
        }
    }

    pub fn durable(&self) -> &AtomicBitmap {
        &self.durable
    }

    pub fn failed(&self) -> bool {
        self.writing.lock().failed
    }

    /// Marks regions `[first, end)` as written to and makes their bits durable. Returns false, with
    /// nothing done but the mark, if that would wait and `nowait` is set. After a failed write to
    /// the file it returns true: local I/O goes on, `failed` says that the bits no longer follow.
    pub fn touch(&self, first: u64, end: u64, nowait: bool) -> bool {
        self.touched.set(first, end);
        if self.durable.all(first, end) {
            return true;
        }
        !nowait && self.make_durable(first, end)
    }

    #[cold]
    fn make_durable(&self, first: u64, end: u64) -> bool {
        let mut writing = self.writing.lock();
        loop {
            if writing.failed || self.durable.all(first, end) {
                return true;
            }
            if writing.busy {
                writing.wanted.push((first, end));
                self.written.wait(&mut writing);
                continue;
            }
            writing.busy = true;
            writing.sets += 1;
            // The more often writers had to wait, the further ahead the bits are set; those that
            // stay untouched are cleared by the next checkpoint.
            let ahead = match writing.sets {
                0..=3 => 1,
                4..=15 => 4,
                16..=31 => 16,
                _ => 64,
            };
            let mut ranges = std::mem::take(&mut writing.wanted);
            ranges.push((first / ahead * ahead, end.next_multiple_of(ahead)));
            drop(writing);
            let outcome = self.set_durable(&ranges);
            writing = self.writing.lock();
            writing.busy = false;
            writing.failed |= outcome.is_err();
            self.written.notify_all();
        }
    }

    fn set_durable(&self, ranges: &[(u64, u64)]) -> io::Result<()> {
        let fresh = AtomicBitmap::new(self.durable.bits());
        let (mut low, mut high) = (usize::MAX, 0);
        for (first, end) in ranges {
            let end = (*end).min(fresh.bits());
            fresh.set(*first, end);
            low = low.min(word_index(*first));
            high = high.max(word_index(end.saturating_sub(1)) + 1);
        }
        if low >= high {
            return Ok(());
        }
        self.write_pages(low, high, |word| self.durable.word(word) | fresh.word(word))?;
        self.file.sync_data()?;
        for word in low..high {
            self.durable.set_word(word, fresh.word(word));
        }
        Ok(())
    }

    /// Writes the pages that hold words `[low, high)`.
    fn write_pages(&self, low: usize, high: usize, word: impl Fn(usize) -> u64) -> io::Result<()> {
        let mut bytes = Vec::new();
        let pages = low / PAGE_WORDS..high.div_ceil(PAGE_WORDS);
        for page in pages.clone() {
            let start = bytes.len();
            for index in page * PAGE_WORDS..(page + 1) * PAGE_WORDS {
                let value = if index < self.durable.words() {
                    word(index)
                } else {
                    0
                };
                bytes.extend_from_slice(&value.to_le_bytes());
            }
            let checksum = page_checksum(page, &bytes[start..]);
            bytes.extend_from_slice(&checksum.to_le_bytes());
        }
        self.file.write_at(
            &bytes,
            (INTENT_HEADER_LEN + pages.start * INTENT_PAGE_LEN) as u64,
        )
    }

    /// Reads the bits of the first `regions`; returns how many pages were damaged.
    fn load(&self, regions: u64) -> io::Result<u64> {
        let pages = usize::try_from(regions.div_ceil(PAGE_REGIONS))
            .map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        let mut bytes = vec![0; pages * INTENT_PAGE_LEN];
        let read = self.file.read_at(&mut bytes, INTENT_HEADER_LEN as u64)?;
        let mut damaged = 0;
        for page in 0..pages {
            let content = &bytes[page * INTENT_PAGE_LEN..(page + 1) * INTENT_PAGE_LEN];
            let bits = &content[..INTENT_PAGE_BITS_LEN];
            let whole = (page + 1) * INTENT_PAGE_LEN <= read
                && PAGE_CHECKSUM.u64(content) == page_checksum(page, bits);
            if !whole {
                damaged += 1;
                let first = page as u64 * PAGE_REGIONS;
                self.durable.set(first, (first + PAGE_REGIONS).min(regions));
                continue;
            }
            for (offset, word) in bits.chunks_exact(8).enumerate() {
                let index = page * PAGE_WORDS + offset;
                if index < self.durable.words() {
                    let word = word.try_into().expect("invariant: eight bytes");
                    self.durable.set_word(index, u64::from_le_bytes(word));
                }
            }
        }
        Ok(damaged)
    }

    /// Makes the header durable; `change` edits it.
    pub fn update_header(&self, change: impl FnOnce(&mut IntentHeader)) -> io::Result<()> {
        change(&mut self.header.lock());
        self.write_header()
    }

    /// Notes that the whole content has been in history once.
    pub fn set_copied(&self) -> io::Result<()> {
        if self.header.lock().copied {
            return Ok(());
        }
        self.update_header(|header| header.copied = true)
    }

    fn write_header(&self) -> io::Result<()> {
        let bytes = self.header.lock().encode();
        self.file.write_at(&bytes, 0)?;
        self.file.sync_data()
    }

    /// Makes all regions dirty, durably: on the medium first, as writers go by what memory says.
    pub fn dirty_all(&self) -> io::Result<()> {
        self.own(|| self.set_durable(&[(0, self.durable.bits())]))
    }

    /// Writes and syncs the bits as they are in memory.
    pub fn store(&self) -> io::Result<()> {
        self.own(|| {
            self.write_pages(0, self.durable.words(), |word| self.durable.word(word))?;
            self.file.sync_data()
        })
    }

    /// First half of a checkpoint: forgets who was written to so far.
    pub fn begin_checkpoint(&self) {
        for word in 0..self.touched.words() {
            if self.touched.word(word) != 0 {
                self.touched.take_word(word);
            }
        }
        self.writing.lock().sets = 0;
    }

    /// Second half, once all requests begun before the first half have ended and everything they
    /// wrote is durable in spool and backing: clears what nobody has written to since and what
    /// `keep(word)` does not name.
    pub fn end_checkpoint(&self, keep: impl Fn(usize) -> u64) -> io::Result<()> {
        self.own(|| {
            let mut changed: Option<(usize, usize)> = None;
            for word in 0..self.durable.words() {
                let stay = |bits: u64| bits & (self.touched.word(word) | keep(word));
                let old = self.durable.word(word);
                let clear = old & !stay(old);
                if clear == 0 {
                    continue;
                }
                self.durable.clear_word(word, clear);
                // The second look: whoever touched before this saw the bit still set on disk.
                let again = stay(clear);
                if again != 0 {
                    self.durable.set_word(word, again);
                }
                changed = Some((changed.map_or(word, |(low, _)| low), word + 1));
            }
            match changed {
                Some((low, high)) => self.write_pages(low, high, |word| self.durable.word(word)),
                None => Ok(()),
            }
        })
    }

    /// Runs `action` as the only writer of the file.
    fn own(&self, action: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut writing = self.writing.lock();
        while writing.busy {
            self.written.wait(&mut writing);
        }
        if writing.failed {
            return Err(io::Error::other("an earlier write of the bitmap failed"));
        }
        writing.busy = true;
        drop(writing);
        let outcome = action();
        let mut writing = self.writing.lock();
        writing.busy = false;
        writing.failed |= outcome.is_err();
        self.written.notify_all();
        outcome
    }
}

fn word_index(region: u64) -> usize {
    usize::try_from(region / 64).expect("invariant: a bitmap fits in memory")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Fault, FaultyDirectory, MemoryDirectory};

    fn header() -> IntentHeader {
        IntentHeader {
            group: GroupId([7; 16]),
            volume: VolumeIndex(0),
            clean: false,
            copied: false,
            size: 10 * REGION_BYTES,
            identity: Identity::default(),
        }
    }

    #[test]
    fn a_block_device_that_was_written_to_before_the_tap_started_is_changed() {
        let identity = |boot: u8, written_sectors| Identity {
            kind: IdentityKind::Block,
            written_sectors,
            boot_id: [boot; 16],
            ..Identity::default()
        };
        let stopped = identity(1, 500);
        assert!(!stopped.changed(&identity(1, 500)));
        assert!(stopped.changed(&identity(1, 501)));
        assert!(!stopped.changed(&identity(2, 0)), "a new boot");
        assert!(stopped.changed(&identity(2, 8)), "written in the new boot");
    }

    #[test]
    fn no_region_counts_as_dirty_before_the_medium_says_so() {
        let directory = FaultyDirectory::new(Arc::new(MemoryDirectory::new()));
        let bitmap = IntentBitmap::create(&directory, header()).unwrap();
        bitmap.begin_checkpoint();
        bitmap.end_checkpoint(|_| 0).unwrap();
        assert_eq!(bitmap.durable().count(), 0);
        directory.fail_change(1, Fault::Error);
        bitmap.dirty_all().unwrap_err();
        assert_eq!(bitmap.durable().count(), 0);
        assert!(
            bitmap.failed(),
            "who writes now must say that bits are lost"
        );
    }
}
