//! The one copier: emits regions of the to-copy sets as RESYNC records within an open span, then
//! ends the span. Serves first copy, recovery, overflow, and a backing changed behind the tap.
//!
//! A region is read under its range lock and placed in the queue before the lock goes; its to-copy
//! bit is cleared in the same step that places it. Holes become one ZERO record.

use std::time::{Duration, Instant};

use super::core::{TapCore, read_blocks};
use super::queue::{Kind, Mode, Placed, Want};
use super::unreadable;
use super::volume::Volume;
use crate::constants::{BLOCK_SIZE, RECOVERY_REEMIT_BYTES, REGION_BYTES, UNREADABLE_RETRY_S};
use std::sync::atomic::Ordering;

const REGION_BLOCKS: u64 = REGION_BYTES / BLOCK_SIZE as u64;
/// Regions of a hole that one record and one range lock cover: half of the lock's window.
const HOLE_REGIONS: u64 = 128;
/// Wait after a region that cannot be read while there are many of them.
const RETRY: Duration = Duration::from_secs(5);

/// Between two looks at the spool's room, unless a release rings.
const ROOM_CHECK: Duration = Duration::from_secs(1);
/// Between two attempts to read what was passed over.
const UNREADABLE_RETRY: Duration = Duration::from_secs(UNREADABLE_RETRY_S);

/// How one step went.
enum Step {
    /// Bytes of volume done.
    Copied(u64),
    Nothing,
    Unreadable,
}

#[derive(Debug, Default)]
struct Cursor {
    volume: usize,
    region: u64,
}

/// Runs until the tap stops.
pub fn run(core: &TapCore) {
    let mut cursor = Cursor::default();
    let mut pace = Pace::new();
    let mut tried_at = Instant::now();
    // Before a span ends, what was passed over is asked for once more: it may have been the path.
    let mut asked = false;
    while !core.is_stopping() {
        let (work, left) = {
            let state = core.queue.lock();
            let work = state.mode == Mode::Recording && state.in_span.is_some();
            (work, state.copy_left)
        };
        if !work {
            pace.idle(core);
            core.copier.wait(UNREADABLE_RETRY);
            unreadable::try_again(core);
            tried_at = Instant::now();
            continue;
        }
        if left == 0 {
            core.ensure_numbers();
            if !asked {
                asked = true;
                if unreadable::try_again(core) {
                    continue;
                }
            }
            let missing = core.volumes.iter().map(|v| v.unreadable.bytes()).sum();
            if core.queue.end_span(missing).is_some() {
                asked = false;
                core.checkpointer.ring();
            } else {
                core.copier.wait(Duration::from_millis(100));
            }
            continue;
        }
        if !core.has_room_to_copy() {
            core.notice("the copy waits for room in the spool".to_owned());
            core.wants_room.store(true, Ordering::SeqCst);
            core.copier.wait(ROOM_CHECK);
            core.wants_room.store(false, Ordering::SeqCst);
            continue;
        }
        match step(core, &mut cursor) {
            Step::Copied(bytes) => pace.rest(core, bytes),
            Step::Nothing => {}
            Step::Unreadable => {
                core.copier.wait(RETRY);
                // Regions that recover make room to pass over this one.
                if tried_at.elapsed() >= UNREADABLE_RETRY {
                    unreadable::try_again(core);
                    tried_at = Instant::now();
                }
            }
        }
    }
}

fn step(core: &TapCore, cursor: &mut Cursor) -> Step {
    let Some(volume) = core.volumes.get(cursor.volume) else {
        *cursor = Cursor::default();
        return Step::Nothing;
    };
    let queued = &core.queue.volumes()[cursor.volume];
    let Some(region) = queued.to_copy.next_set(cursor.region) else {
        *cursor = Cursor {
            volume: cursor.volume + 1,
            region: 0,
        };
        return Step::Nothing;
    };
    let hole = hole_regions(volume, region).min(HOLE_REGIONS);
    let count = if hole > 1 {
        queued.to_copy.run(region, hole)
    } else {
        1
    };
    cursor.region = region + count;
    match copy(core, volume, region, count) {
        Ok(true) => {
            volume.unreadable.forget(region, region + count);
            Step::Copied(count * REGION_BYTES)
        }
        Ok(false) => Step::Nothing,
        Err(_) if volume.unreadable.has_room(region) => {
            if unreadable::copy_around(core, volume, region) {
                Step::Copied(count * REGION_BYTES)
            } else {
                Step::Nothing
            }
        }
        Err(error) => {
            let name = &volume.config.name;
            core.notice(format!(
                "volume {name}: cannot be read for the copy: {error}"
            ));
            Step::Unreadable
        }
    }
}

/// Whole regions that are a hole from `region` on; a last partial region counts.
fn hole_regions(volume: &Volume, region: u64) -> u64 {
    let offset = region * REGION_BYTES;
    match volume.backing.run(offset) {
        Ok(run) if run.hole && offset + run.length >= volume.size => {
            run.length.div_ceil(REGION_BYTES)
        }
        Ok(run) if run.hole => run.length / REGION_BYTES,
        _ => 0,
    }
}

/// Emits regions `[region, region + count)`. False: they changed or recording stopped meanwhile.
fn copy(core: &TapCore, volume: &Volume, region: u64, count: u64) -> std::io::Result<bool> {
    let start = region * REGION_BLOCKS;
    let blocks = (count * REGION_BLOCKS).min(volume.blocks() - start);
    let _section = core.grace.enter();
    if core.is_stopping() {
        return Ok(false);
    }
    // Durable already, unless an error of the backing brought it here; the mark keeps a checkpoint
    // from clearing the region before this copy is durable.
    volume.intent.touch(region, region + count, false);
    let _range = volume.ranges.lock(start, blocks);
    let copied = Some((region, region + count));
    let want = |kind| Want {
        kind,
        slot: volume.slot,
        start,
        blocks,
        copied,
    };
    if count > 1 && hole_regions(volume, region) < count {
        return Ok(false);
    }
    let content = if hole_regions(volume, region) >= count {
        None
    } else {
        let content = read_blocks(&*volume.backing, start, blocks)?;
        // Zeroes that take space on the backing need take none in history.
        content.iter().any(|byte| *byte != 0).then_some(content)
    };
    let placed = match &content {
        None => core.queue.place(&[want(Kind::Zero)], 0, false),
        Some(_) => core.queue.place(&[want(Kind::Resync)], 0, false),
    };
    match (placed, content) {
        (Ok(Placed::Recorded(mut place)), Some(content)) => {
            place.write(&content);
            Ok(true)
        }
        (Ok(Placed::Recorded(_)), None) => Ok(true),
        (Ok(Placed::ExtentsOnly) | Err(_), _) => Ok(false),
    }
}

/// Keeps the copier polite: it rests as long as it worked while the application writes, and lets
/// the queue run half empty. The first GiB after an unclean stop goes without.
#[derive(Debug)]
struct Pace {
    worked_from: Instant,
    writes: u64,
    done: u64,
    window_from: Instant,
    window_bytes: u64,
}

impl Pace {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            worked_from: now,
            writes: 0,
            done: 0,
            window_from: now,
            window_bytes: 0,
        }
    }

    fn idle(&mut self, core: &TapCore) {
        core.copy_bytes_per_s.store(0, Ordering::Relaxed);
        *self = Self::new();
    }

    fn rest(&mut self, core: &TapCore, bytes: u64) {
        self.done += bytes;
        self.measure(core, bytes);
        let writes = core.queue.lock().writes;
        let busy = writes != self.writes;
        self.writes = writes;
        if busy && self.done > RECOVERY_REEMIT_BYTES {
            let worked = self.worked_from.elapsed().min(Duration::from_millis(50));
            std::thread::sleep(worked);
        }
        while core.queue.used_bytes() > core.queue.capacity() / 2 && !core.is_stopping() {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.worked_from = Instant::now();
    }

    fn measure(&mut self, core: &TapCore, bytes: u64) {
        self.window_bytes += bytes;
        let elapsed = self.window_from.elapsed();
        if elapsed >= Duration::from_secs(1) {
            let rate = u128::from(self.window_bytes) * 1_000_000 / elapsed.as_micros().max(1);
            core.copy_bytes_per_s
                .store(u64::try_from(rate).unwrap_or(u64::MAX), Ordering::Relaxed);
            self.window_from = Instant::now();
            self.window_bytes = 0;
        }
    }
}
