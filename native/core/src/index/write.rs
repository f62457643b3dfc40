//! Writes run files: one run from memory, or several adjacent ones merged.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use xxhash_rust::xxh3::xxh3_64;

use super::entry::Entry;
use super::layout::{
    Lane, Member, PAGE_ENTRIES, PAGE_LEN, PAGE_PAYLOAD, RunHeader, TAIL_BYTES_MAX, Tail,
    page_offset, seal_page,
};
use super::run::Run;
use crate::log::LogError;
use crate::storage::{Directory, File};
use crate::types::{Seq, VolumeIndex};

/// Bytes of pages collected for one write.
const WRITE_BYTES: usize = 1 << 20;

fn failed(source: io::Error) -> LogError {
    if crate::storage::is_full(&source) {
        return LogError::NoSpace;
    }
    LogError::Io {
        action: "writing an index run",
        source,
    }
}

/// Whether the runs, adjacent and in log order, can become one: numbers that entries hold relative
/// to the run must fit.
pub fn mergeable(runs: &[&Run]) -> bool {
    let (Some(first), Some(last)) = (runs.first(), runs.last()) else {
        return false;
    };
    let seqs = last.header.end_seq.0 - first.header.base_seq.0;
    let slots: u64 = runs.iter().map(|run| u64::from(run.header.slots)).sum();
    let entries: u64 = runs.iter().map(|run| run.header.entries).sum();
    let tail = entries / PAGE_ENTRIES * Entry::LEN as u64;
    seqs < 1 << 32 && slots < 1 << 32 && tail < TAIL_BYTES_MAX / 2
}

/// Writes `runs`, adjacent and in log order, as one run file: temporary name, sync, rename,
/// directory sync. A crash leaves either no file of this name or the whole one. Ends with an error
/// soon after `stop` is set.
pub fn write_run(
    directory: &dyn Directory,
    name: &str,
    runs: &[&Run],
    stop: &AtomicBool,
) -> Result<(), LogError> {
    assert!(
        mergeable(runs),
        "invariant: the caller has asked mergeable()"
    );
    let temporary = format!("{name}.tmp");
    match directory.remove(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let file = directory.create(&temporary).map_err(failed)?;
    let written = write_file(&file, runs, stop);
    if let Err(error) = written {
        // The space is wanted back at once; what fails here is removed at the next start.
        let _ = directory.remove(&temporary);
        return Err(error);
    }
    directory.rename(&temporary, name).map_err(failed)?;
    directory.sync().map_err(failed)
}

fn write_file(file: &Arc<dyn File>, runs: &[&Run], stop: &AtomicBool) -> Result<(), LogError> {
    let mut pages = PageWriter::new(file);
    let mut tail = Tail::default();
    let bases = Rebase::of(runs);
    let keys: BTreeSet<(VolumeIndex, u8)> = runs
        .iter()
        .flat_map(|run| run.tail.lanes.iter().map(|lane| (lane.volume, lane.level)))
        .collect();
    let mut count = 0u64;
    for (volume, level) in keys {
        let mut lane = Lane {
            volume,
            level,
            first: count,
            count: 0,
            min_index: u64::MAX,
            max_index: 0,
        };
        merge_lane(runs, &bases, volume, level, &mut |entry| {
            if count.is_multiple_of(PAGE_ENTRIES) {
                if stop.load(Ordering::Relaxed) {
                    return Err(failed(io::ErrorKind::Interrupted.into()));
                }
                tail.fences.push(entry);
            }
            count += 1;
            lane.min_index = lane.min_index.min(entry.index());
            lane.max_index = entry.index();
            pages.push(&entry.encode())
        })?;
        lane.count = count - lane.first;
        tail.lanes.push(lane);
    }
    pages.end_page()?;
    for run in runs {
        let mut outcome = Ok(());
        run.scan_slots(&mut |offset| {
            if outcome.is_ok() {
                outcome = pages.push(&offset.to_le_bytes());
            }
        })?;
        outcome?;
    }
    pages.end_page()?;
    for (run, base) in runs.iter().zip(&bases) {
        let members = run.tail.members.iter();
        tail.members.extend(members.map(|m| Member {
            first_slot: m.first_slot + base.slots,
            ..m.clone()
        }));
    }
    let bytes = tail.encode();
    let header = merged_header(runs, &tail, count, xxh3_64(&bytes));
    pages.raw(&bytes)?;
    let written = pages.finish()?;
    assert_eq!(
        written,
        header.file_len(),
        "invariant: the header describes what was written"
    );
    file.write_at(&header.encode(), 0).map_err(failed)?;
    file.sync_data().map_err(failed)
}

fn merged_header(runs: &[&Run], tail: &Tail, entries: u64, tail_checksum: u64) -> RunHeader {
    let (first, last) = (&runs[0].header, &runs[runs.len() - 1].header);
    let count = |number: usize| u32::try_from(number).expect("invariant: bounded by the inputs");
    RunHeader {
        group: first.group,
        base_seq: first.base_seq,
        end_seq: last.end_seq,
        first_time: first.first_time,
        last_time: last.last_time,
        first_data_seq: runs
            .iter()
            .map(|run| run.header.first_data_seq)
            .find(|seq| *seq != Seq(0))
            .unwrap_or_default(),
        entries,
        slots: runs.iter().map(|run| run.header.slots).sum(),
        members: count(tail.members.len()),
        lanes: count(tail.lanes.len()),
        records: runs.iter().map(|run| run.header.records).sum(),
        tail_checksum,
    }
}

/// What is added to the entries of one input.
#[derive(Debug, Clone, Copy)]
struct Rebase {
    seqs: u32,
    slots: u32,
}

impl Rebase {
    fn of(runs: &[&Run]) -> Vec<Self> {
        let base = runs[0].header.base_seq.0;
        let mut slots = 0;
        runs.iter()
            .map(|run| {
                let seqs = u32::try_from(run.header.base_seq.0 - base)
                    .expect("invariant: mergeable() has looked at the seqs");
                let rebase = Self { seqs, slots };
                slots += run.header.slots;
                rebase
            })
            .collect()
    }
}

/// Entries of one lane of one input, rebased.
struct Cursor<'a> {
    run: &'a Run,
    rebase: Rebase,
    next: u64,
    end: u64,
    buffer: Vec<Entry>,
    at: usize,
}

impl Cursor<'_> {
    fn peek(&mut self) -> Result<Option<Entry>, LogError> {
        if self.at == self.buffer.len() {
            if self.next == self.end {
                return Ok(None);
            }
            self.buffer.clear();
            self.at = 0;
            self.run
                .scan_entries(self.next, self.end, &mut self.buffer)?;
            self.next += self.buffer.len() as u64;
        }
        Ok(Some(
            self.buffer[self.at].rebased(self.rebase.seqs, self.rebase.slots),
        ))
    }
}

fn merge_lane(
    runs: &[&Run],
    bases: &[Rebase],
    volume: VolumeIndex,
    level: u8,
    each: &mut dyn FnMut(Entry) -> Result<(), LogError>,
) -> Result<(), LogError> {
    let mut cursors: Vec<Cursor<'_>> = Vec::new();
    for (&run, &rebase) in runs.iter().zip(bases) {
        let lanes = &run.tail.lanes;
        let Ok(place) = lanes.binary_search_by_key(&(volume, level), |l| (l.volume, l.level))
        else {
            continue;
        };
        let lane = lanes[place];
        let (next, end) = (lane.first, lane.first + lane.count);
        cursors.push(Cursor {
            run,
            rebase,
            next,
            end,
            buffer: Vec::new(),
            at: 0,
        });
    }
    loop {
        let mut smallest: Option<(Entry, usize)> = None;
        for (number, cursor) in cursors.iter_mut().enumerate() {
            if let Some(entry) = cursor.peek()?
                && smallest.is_none_or(|(best, _)| entry < best)
            {
                smallest = Some((entry, number));
            }
        }
        let Some((entry, number)) = smallest else {
            return Ok(());
        };
        cursors[number].at += 1;
        each(entry)?;
    }
}

/// Fills pages and writes them in large pieces, behind the header's page.
struct PageWriter<'a> {
    file: &'a Arc<dyn File>,
    payload: Vec<u8>,
    pending: Vec<u8>,
    offset: u64,
}

impl<'a> PageWriter<'a> {
    fn new(file: &'a Arc<dyn File>) -> Self {
        Self {
            file,
            payload: Vec::new(),
            pending: Vec::new(),
            offset: page_offset(0),
        }
    }

    fn push(&mut self, item: &[u8]) -> Result<(), LogError> {
        self.payload.extend_from_slice(item);
        if self.payload.len() == PAGE_PAYLOAD {
            self.end_page()?;
        }
        Ok(())
    }

    fn end_page(&mut self) -> Result<(), LogError> {
        if self.payload.is_empty() {
            return Ok(());
        }
        seal_page(&self.payload, &mut self.pending);
        self.payload.clear();
        if self.pending.len() + PAGE_LEN > WRITE_BYTES {
            self.write()
        } else {
            Ok(())
        }
    }

    fn raw(&mut self, bytes: &[u8]) -> Result<(), LogError> {
        self.pending.extend_from_slice(bytes);
        self.write()
    }

    fn write(&mut self) -> Result<(), LogError> {
        self.file
            .write_at(&self.pending, self.offset)
            .map_err(failed)?;
        self.offset += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<u64, LogError> {
        self.write()?;
        Ok(self.offset)
    }
}
