//! How fast the log takes frames: append alone, append with a sync every so many frames, and with
//! group commit from a second thread. Usage: `log_rate DIRECTORY [frame KiB] [frames]`; what it
//! writes there it removes.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ebbtide_core::codec::{Effort, FrameContext, FrameEncoder};
use ebbtide_core::constants::BLOCK_SIZE;
use ebbtide_core::crypto::{GroupKey, IncarnationKey, Suite};
use ebbtide_core::format::record::{BlockPayload, Payload, Record, RecordBody};
use ebbtide_core::format::segment::SegmentHeader;
use ebbtide_core::log::LogWriter;
use ebbtide_core::storage::DiskDirectory;
use ebbtide_core::types::{
    BlockIndex, Extent, FrameNo, Generation, GroupId, IncarnationId, Seq, TimeUs, VolumeIndex,
};

const GROUP: GroupId = GroupId([1; 16]);

fn header() -> SegmentHeader {
    SegmentHeader {
        group: GROUP,
        generation: Generation {
            counter: 1,
            site: 1,
        },
        incarnation: IncarnationId([2; 16]),
        salt: [3; 32],
        suite: Suite::Aes256Gcm as u16,
        first_frame: FrameNo(0),
        created: TimeUs(1),
        first_seq: Seq(1),
        parent: None,
    }
}

/// Sealed frames of one write each.
fn make_frames(count: u32, blocks: u64) -> Result<Vec<Vec<u8>>, Box<dyn Error>> {
    let header = header();
    let key = GroupKey([4; 32]);
    let suite = Suite::Aes256Gcm;
    let context = FrameContext {
        group: GROUP,
        generation: header.generation,
        incarnation: header.incarnation,
        suite: header.suite,
        key: IncarnationKey::derive(suite, &key, GROUP, header.incarnation, &header.salt),
    };
    let data = vec![0x5a; usize::try_from(blocks)? * BLOCK_SIZE];
    let mut encoder = FrameEncoder::default();
    let mut prev = [0; 32];
    let mut frames = Vec::new();
    for number in 0..count {
        let extent = Extent {
            volume: VolumeIndex(0),
            start: BlockIndex(0),
            blocks,
        };
        let payload = Payload::All(BlockPayload::Stored);
        let record = Record {
            seq: Seq(u64::from(number) + 1),
            time: TimeUs(u64::from(number) + 1),
            body: RecordBody::Write { extent, payload },
        };
        let unlinked = encoder.encode(
            &context,
            FrameNo(number),
            0,
            &[record],
            &[&data],
            Effort::Raw,
        )?;
        let (_, bytes, digest) = unlinked.link(prev);
        prev = digest;
        frames.push(bytes);
    }
    Ok(frames)
}

/// Runs `each` for every frame on a fresh log; prints rates and the longest single call.
fn run(
    name: &str,
    path: &Path,
    frames: &[Vec<u8>],
    mut each: impl FnMut(&mut LogWriter, usize, &[u8]) -> Result<(), Box<dyn Error>>,
) -> Result<(), Box<dyn Error>> {
    let directory = Arc::new(DiskDirectory::open(path)?);
    let (mut writer, _) = LogWriter::open(directory, GROUP)?;
    writer.begin(&header())?;
    let start = Instant::now();
    let mut longest = Duration::ZERO;
    for (number, frame) in frames.iter().enumerate() {
        let before = Instant::now();
        each(&mut writer, number, frame)?;
        longest = longest.max(before.elapsed());
    }
    let seconds = start.elapsed().as_secs_f64();
    writer.sync_handle()?.sync()?;
    let durable = start.elapsed().as_secs_f64();
    drop(writer);
    std::fs::remove_dir_all(path)?;
    let count = u32::try_from(frames.len())?;
    let bytes = u32::try_from(frames.iter().map(Vec::len).sum::<usize>() >> 10)?;
    println!(
        "{name:24} {:9.0} frames/s {:8.1} MiB/s, durable {:8.1} MiB/s, longest call {:8.2} ms",
        f64::from(count) / seconds,
        f64::from(bytes) / 1024.0 / seconds,
        f64::from(bytes) / 1024.0 / durable,
        longest.as_secs_f64() * 1e3,
    );
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let base = arguments
        .next()
        .ok_or("usage: log_rate DIRECTORY [frame KiB] [frames]")?;
    let kib: u64 = arguments.next().map_or(Ok(64), |text| text.parse())?;
    let count: u32 = arguments.next().map_or(Ok(2000), |text| text.parse())?;
    let path = Path::new(&base).join("log-rate");
    let frames = make_frames(count, (kib / 4).max(1))?;
    run("append, trusted", &path, &frames, |writer, _, frame| {
        writer.append(frame, true)?;
        Ok(())
    })?;
    run("append, verified", &path, &frames, |writer, _, frame| {
        writer.append(frame, false)?;
        Ok(())
    })?;
    run(
        "append, sync every 16",
        &path,
        &frames,
        |writer, number, frame| {
            writer.append(frame, true)?;
            if number % 16 == 15 {
                writer.sync_handle()?.sync()?;
            }
            Ok(())
        },
    )?;
    // Group commit: one thread syncs what is there whenever the last sync is done.
    let (sender, receiver) = std::sync::mpsc::sync_channel(0);
    let failed = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&failed);
    let syncer = std::thread::spawn(move || {
        while let Ok(handle) = receiver.recv() {
            let handle: ebbtide_core::log::SyncHandle = handle;
            if handle.sync().is_err() {
                flag.store(true, Ordering::Relaxed);
            }
        }
    });
    run(
        "append, group commit",
        &path,
        &frames,
        |writer, _, frame| {
            writer.append(frame, true)?;
            // Full means that a sync is under way: its successor will cover this frame.
            let _ = sender.try_send(writer.sync_handle()?);
            Ok(())
        },
    )?;
    drop(sender);
    syncer.join().map_err(|_| "the syncing thread panicked")?;
    if failed.load(Ordering::Relaxed) {
        return Err("a sync failed".into());
    }
    Ok(())
}
