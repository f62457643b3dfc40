//! Encoder threads: assemble a frame's records in order, encode and seal it in parallel, append it
//! to the spool in order.
//!
//! Assembling decides per block: zero, identical to what this incarnation holds (`Same`), or
//! stored. `Same` names an older record of the same incarnation, never across: the cache is
//! emptied with each incarnation. RESYNC records are never `Same`: a copy must be complete in
//! itself, whatever of the incarnation its reader holds.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::cache::ContentCache;
use super::queue::{Entry, Kind, Queue};
use crate::codec::{CodecError, Effort, FrameContext, FrameEncoder, UnlinkedFrame};
use crate::constants::{
    BLOCK_SIZE, INCARNATION_AGE_S, INCARNATION_BYTES_MAX, INCARNATION_FRAMES_MAX,
};
use crate::crypto::{CryptoError, GroupKey, IncarnationKey, Suite};
use crate::format::frame::{Digest, FrameFlags};
use crate::format::record::{BlockPayload, Cause, Payload, Record, RecordBody};
use crate::format::segment::{Parent, SegmentHeader};
use crate::log::{LogEnd, LogError, LogWriter};
use crate::types::{BlockIndex, Extent, FrameNo, Generation, GroupId, IncarnationId, Seq, TimeUs};

/// With more than this share of the queue in use the encoder falls behind, and tries less hard.
/// Long before anyone waits: compressing what hardly shrinks takes the processor from the writers.
const BUSY_SHARE: u64 = 8;
/// Or more than this, where that share is less than the frames that are always under way.
const BUSY_BYTES_MIN: u64 = 3 << 20;

/// What the frames of this tap have in common.
#[derive(Debug, Clone)]
pub struct Identity {
    pub group: GroupId,
    pub generation: Generation,
    pub suite: Suite,
    pub key: GroupKey,
}

/// Limits of an incarnation; tests make them smaller.
#[derive(Debug, Clone, Copy)]
pub struct IncarnationLimits {
    pub bytes: u64,
    pub frames: u32,
    pub age: Duration,
}

impl Default for IncarnationLimits {
    fn default() -> Self {
        Self {
            bytes: INCARNATION_BYTES_MAX,
            frames: INCARNATION_FRAMES_MAX - 1024,
            age: Duration::from_secs(INCARNATION_AGE_S),
        }
    }
}

#[derive(Debug)]
struct Incarnation {
    context: Arc<FrameContext>,
    next_frame: u32,
    bytes: u64,
    since: Instant,
}

/// The part of the pipeline that goes in order: one thread at a time.
#[derive(Debug)]
struct Assembler {
    cache: ContentCache,
    incarnation: Option<Incarnation>,
    next_ticket: u64,
    in_span: bool,
}

/// One frame on its way.
#[derive(Debug, Default)]
struct Batch {
    entries: Vec<Entry>,
    records: Vec<Record>,
    /// Stored blocks: runs of ring bytes, neighbours joined.
    pieces: Vec<(usize, usize)>,
    ticket: u64,
    begin: Option<SegmentHeader>,
    context: Option<Arc<FrameContext>>,
    frame_no: FrameNo,
    flags: u32,
}

/// An encoded frame that waits for its turn.
#[derive(Debug)]
struct Sealed {
    begin: Option<SegmentHeader>,
    frame: Result<UnlinkedFrame, Cause>,
    first_seq: u64,
    entries: usize,
}

#[derive(Debug)]
struct Commit {
    next_ticket: u64,
    waiting: BTreeMap<u64, Sealed>,
    writer: Option<LogWriter>,
    /// The writer failed an operation and must be opened again.
    failed: bool,
    prev: Digest,
    parent: Option<Parent>,
}

/// The spool's end as others see it, without waiting for the writer.
#[derive(Debug)]
struct Published {
    end: Mutex<LogEnd>,
    moved: Condvar,
    frame_bytes: std::sync::atomic::AtomicU64,
}

#[derive(Debug)]
pub struct Pipeline {
    identity: Option<Identity>,
    limits: IncarnationLimits,
    assembler: Mutex<Assembler>,
    commit: Mutex<Commit>,
    published: Published,
    bytes_max: u64,
}

impl Pipeline {
    pub fn new(
        identity: Option<Identity>,
        limits: IncarnationLimits,
        cache_bytes: usize,
        writer: Option<LogWriter>,
        bytes_max: u64,
    ) -> Self {
        let end = writer.as_ref().map(LogWriter::end).unwrap_or_default();
        let parent = parent_of(&end);
        Self {
            identity,
            limits,
            assembler: Mutex::new(Assembler {
                cache: ContentCache::new(cache_bytes),
                incarnation: None,
                next_ticket: 0,
                in_span: false,
            }),
            commit: Mutex::new(Commit {
                next_ticket: 0,
                waiting: BTreeMap::new(),
                failed: writer.is_none(),
                writer,
                prev: [0; 32],
                parent,
            }),
            bytes_max,
            published: Published {
                end: Mutex::new(end),
                moved: Condvar::new(),
                frame_bytes: 0.into(),
            },
        }
    }

    /// An encoder thread: runs until the queue is closed and empty, or abandoned.
    pub fn run(&self, queue: &Queue) {
        let mut encoder = FrameEncoder::default();
        let mut batch = Batch::default();
        loop {
            {
                let mut assembler = self.assembler.lock();
                if !queue.take(&mut batch.entries) {
                    return;
                }
                self.assemble(&mut assembler, queue, &mut batch);
            }
            let frame = Self::encode(&mut encoder, queue, &batch);
            let sealed = Sealed {
                begin: batch.begin.take(),
                frame,
                first_seq: batch.entries.first().map_or(0, |entry| entry.seq),
                entries: batch.entries.len(),
            };
            self.commit(queue, batch.ticket, sealed);
        }
    }

    fn assemble(&self, assembler: &mut Assembler, queue: &Queue, batch: &mut Batch) {
        batch.records.clear();
        batch.pieces.clear();
        batch.ticket = assembler.next_ticket;
        assembler.next_ticket += 1;
        batch.begin = None;
        batch.context = None;
        let Some(first) = batch.entries.first() else {
            return;
        };
        if queue.is_lost(first.seq) {
            return;
        }
        if first.begin {
            assembler.cache.clear();
            assembler.incarnation = None;
            if let Ok((header, incarnation)) = self.new_incarnation(first) {
                batch.begin = Some(header);
                assembler.incarnation = Some(incarnation);
            }
        }
        let Assembler {
            cache,
            incarnation,
            in_span,
            ..
        } = assembler;
        // Without an incarnation the frame cannot be made; the commit stage gives up on it.
        let Some(incarnation) = incarnation else {
            return;
        };
        batch.flags = if *in_span { FrameFlags::IN_SPAN } else { 0 };
        for entry in &mut batch.entries {
            let (seq, time) = (Seq(entry.seq), TimeUs(entry.time));
            let body = match entry.control.take() {
                Some(control) => {
                    match &*control {
                        RecordBody::SpanBegin { .. } => *in_span = true,
                        RecordBody::SpanEnd => *in_span = false,
                        _ => {}
                    }
                    batch.flags |= FrameFlags::EVENTS;
                    *control
                }
                None => data_record(cache, queue, entry, &mut batch.pieces),
            };
            batch.records.push(Record { seq, time, body });
        }
        batch.frame_no = FrameNo(incarnation.next_frame);
        batch.context = Some(Arc::clone(&incarnation.context));
        incarnation.next_frame += 1;
        incarnation.bytes += batch
            .pieces
            .iter()
            .map(|(_, length)| *length as u64)
            .sum::<u64>();
        let over = incarnation.bytes >= self.limits.bytes
            || incarnation.next_frame >= self.limits.frames
            || incarnation.since.elapsed() >= self.limits.age;
        if over {
            queue.roll_over();
        }
    }

    fn new_incarnation(&self, first: &Entry) -> Result<(SegmentHeader, Incarnation), CryptoError> {
        let identity = self.identity.as_ref().ok_or(CryptoError::NoRandom)?;
        let mut id = [0; 16];
        let mut salt = [0; 32];
        getrandom::fill(&mut id).map_err(|_| CryptoError::NoRandom)?;
        getrandom::fill(&mut salt).map_err(|_| CryptoError::NoRandom)?;
        let incarnation = IncarnationId(id);
        let Identity {
            group,
            generation,
            suite,
            ref key,
        } = *identity;
        let context = FrameContext {
            group,
            generation,
            incarnation,
            suite: suite as u16,
            key: IncarnationKey::derive(suite, key, group, incarnation, &salt),
        };
        let header = SegmentHeader {
            group,
            generation,
            incarnation,
            salt,
            suite: suite as u16,
            first_frame: FrameNo(0),
            created: TimeUs(first.time),
            first_seq: Seq(first.seq),
            // Known only when all frames before are in the spool.
            parent: None,
        };
        let since = Instant::now();
        let state = Incarnation {
            context: Arc::new(context),
            next_frame: 0,
            bytes: 0,
            since,
        };
        Ok((header, state))
    }

    fn encode(
        encoder: &mut FrameEncoder,
        queue: &Queue,
        batch: &Batch,
    ) -> Result<UnlinkedFrame, Cause> {
        let context = batch.context.as_ref().ok_or(Cause::EncoderStuck)?;
        let pieces: Vec<&[u8]> = batch
            .pieces
            .iter()
            .map(|(offset, length)| queue.bytes(*offset, *length))
            .collect();
        let effort = if queue.used_bytes() > (queue.capacity() / BUSY_SHARE).max(BUSY_BYTES_MIN) {
            Effort::Quick
        } else {
            Effort::Lz4
        };
        let (no, flags) = (batch.frame_no, batch.flags);
        encoder
            .encode(context, no, flags, &batch.records, &pieces, effort)
            .map_err(|_: CodecError| Cause::EncoderStuck)
    }

    /// Brings a frame to its turn; whoever closes the hole appends all that became ready.
    fn commit(&self, queue: &Queue, ticket: u64, sealed: Sealed) {
        let mut commit = self.commit.lock();
        commit.waiting.insert(ticket, sealed);
        loop {
            let next = commit.next_ticket;
            let Some(sealed) = commit.waiting.remove(&next) else {
                return;
            };
            commit.next_ticket += 1;
            let entries = sealed.entries;
            let in_spool = !queue.is_lost(sealed.first_seq)
                && match self.append(&mut commit, sealed) {
                    Ok(()) => true,
                    Err(cause) => {
                        queue.give_up(cause);
                        false
                    }
                };
            queue.committed(entries, in_spool);
        }
    }

    fn append(&self, commit: &mut Commit, sealed: Sealed) -> Result<(), Cause> {
        let frame = sealed.frame?;
        let Commit {
            writer,
            failed,
            prev,
            parent,
            ..
        } = commit;
        let writer = writer
            .as_mut()
            .filter(|_| !*failed)
            .ok_or(Cause::SpoolFailed)?;
        if writer.end().total_bytes + frame.bytes.len() as u64 > self.bytes_max {
            return Err(Cause::SpoolFull);
        }
        // After `NoSpace` the log is as before and can be used again; after anything else not.
        let mut fail = |error: LogError| {
            let cause = cause_of(&error);
            *failed |= cause != Cause::SpoolFull;
            cause
        };
        if let Some(header) = sealed.begin {
            writer
                .begin(&SegmentHeader {
                    parent: *parent,
                    ..header
                })
                .map_err(&mut fail)?;
            *prev = [0; 32];
        }
        let (header, bytes, digest) = frame.link(*prev);
        let end = writer.append(&bytes, true).map_err(&mut fail)?;
        *prev = digest;
        let (incarnation, frame_no) = (header.incarnation, header.frame_no);
        *parent = Some(Parent {
            incarnation,
            frame_no,
            digest,
        });
        let count = &self.published.frame_bytes;
        count.fetch_add(bytes.len() as u64, std::sync::atomic::Ordering::Relaxed);
        self.publish(end);
        Ok(())
    }

    fn publish(&self, end: LogEnd) {
        *self.published.end.lock() = end;
        self.published.moved.notify_all();
    }

    pub fn end(&self) -> LogEnd {
        self.published.end.lock().clone()
    }

    pub fn frame_bytes(&self) -> u64 {
        self.published
            .frame_bytes
            .load(std::sync::atomic::Ordering::Relaxed)
    }

    pub fn wait_end(&self, seen: &LogEnd, timeout: Duration) -> LogEnd {
        let deadline = Instant::now() + timeout;
        let mut end = self.published.end.lock();
        while *end == *seen
            && !self
                .published
                .moved
                .wait_until(&mut end, deadline)
                .timed_out()
        {}
        end.clone()
    }

    /// Wakes those who wait for the end to move: the tap stops.
    pub fn wake(&self) {
        self.published.moved.notify_all();
    }

    /// Runs `action` on the spool's writer. `None` if there is none, or it is stuck in an
    /// operation for longer than `patience`.
    pub fn with_writer<T>(
        &self,
        patience: Duration,
        action: impl FnOnce(&mut LogWriter) -> T,
    ) -> Option<T> {
        let mut commit = self.commit.try_lock_for(patience)?;
        let writer = commit.writer.as_mut()?;
        let result = action(writer);
        let end = writer.end();
        drop(commit);
        if *self.published.end.lock() != end {
            self.publish(end);
        }
        Some(result)
    }

    /// Lets the writer go, and with it the spool's lock; `open` may bring another.
    pub fn replace_writer<E>(
        &self,
        patience: Duration,
        open: impl FnOnce() -> Result<Option<LogWriter>, E>,
    ) -> Option<Result<(), E>> {
        let mut commit = self.commit.try_lock_for(patience)?;
        commit.writer = None;
        let writer = match open() {
            Ok(writer) => writer,
            Err(error) => return Some(Err(error)),
        };
        if let Some(writer) = writer {
            let end = writer.end();
            commit.parent = parent_of(&end);
            commit.writer = Some(writer);
            commit.failed = false;
            drop(commit);
            self.publish(end);
        }
        Some(Ok(()))
    }

    pub fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// Whether the writer must be opened again. A writer that is busy counts as one that must not.
    pub fn writer_failed(&self) -> bool {
        self.commit
            .try_lock_for(Duration::from_millis(100))
            .is_some_and(|commit| commit.failed)
    }

    pub fn fail_writer(&self) {
        self.commit.lock().failed = true;
    }
}

fn parent_of(end: &LogEnd) -> Option<Parent> {
    let (incarnation, frame_no) = (end.incarnation?, end.last_frame?);
    Some(Parent {
        incarnation,
        frame_no,
        digest: end.last_digest,
    })
}

/// What a failure of the spool means for history.
pub fn cause_of(error: &LogError) -> Cause {
    match error {
        LogError::NoSpace => Cause::SpoolFull,
        LogError::Io { source, .. } if crate::storage::is_full(source) => Cause::SpoolFull,
        _ => Cause::SpoolFailed,
    }
}

/// Turns an entry into its record; stored blocks go to `pieces`.
fn data_record(
    cache: &mut ContentCache,
    queue: &Queue,
    entry: &Entry,
    pieces: &mut Vec<(usize, usize)>,
) -> RecordBody {
    let volume = queue.volumes()[usize::from(entry.slot)].index;
    let extent = Extent {
        volume,
        start: BlockIndex(entry.start),
        blocks: entry.blocks,
    };
    match entry.kind {
        Kind::Write => {
            let payload = classify(cache, queue, entry, extent, pieces);
            RecordBody::Write { extent, payload }
        }
        Kind::Resync => {
            let payload = classify(cache, queue, entry, extent, pieces);
            RecordBody::Resync { extent, payload }
        }
        Kind::Zero => {
            cache.remove(volume, entry.start, entry.blocks);
            RecordBody::Zero { extent }
        }
        Kind::Discard => {
            cache.remove(volume, entry.start, entry.blocks);
            RecordBody::Discard { extent }
        }
        Kind::Control => unreachable!("a control record carries its body"),
    }
}

fn classify(
    cache: &mut ContentCache,
    queue: &Queue,
    entry: &Entry,
    extent: Extent,
    pieces: &mut Vec<(usize, usize)>,
) -> Payload {
    let bytes = queue.payload(entry);
    let mut first = None;
    let mut map: Vec<BlockPayload> = Vec::new();
    for (index, block) in bytes.chunks_exact(BLOCK_SIZE).enumerate() {
        let number = extent.start.0 + index as u64;
        let payload = if is_zero(block) {
            cache.remove(extent.volume, number, 1);
            BlockPayload::Zero
        } else if cache.put(extent.volume, number, block) && entry.kind == Kind::Write {
            BlockPayload::Same
        } else {
            store(pieces, entry.offset + index * BLOCK_SIZE);
            BlockPayload::Stored
        };
        // The map is made only where blocks differ.
        let same = *first.get_or_insert(payload);
        if map.is_empty() && payload != same {
            map = vec![same; index];
        }
        if !map.is_empty() {
            map.push(payload);
        }
    }
    match first {
        Some(payload) if map.is_empty() => Payload::All(payload),
        _ => Payload::Map(map),
    }
}

/// Adds one block to the payload; a neighbour of the last piece makes it longer.
fn store(pieces: &mut Vec<(usize, usize)>, offset: usize) {
    match pieces.last_mut() {
        Some((start, length)) if *start + *length == offset => *length += BLOCK_SIZE,
        _ => pieces.push((offset, BLOCK_SIZE)),
    }
}

fn is_zero(block: &[u8]) -> bool {
    // Most blocks that are not zero show it in their first word.
    block[..8] == [0; 8] && block.iter().all(|byte| *byte == 0)
}
