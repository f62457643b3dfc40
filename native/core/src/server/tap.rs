//! The tap server: a tap, its front ends, its control socket.

use std::sync::Arc;

use parking_lot::Mutex;
use prost::Message;
use zeroize::Zeroize;

use super::control::{Call, Handler, Reply, listen};
use super::failure::Failure;
use super::launch::{address, path, tap_config};
use super::proto::request::Verb;
use super::proto::response::Result as Outcome;
use super::proto::{self, TapLaunch};
use super::run::{Signals, finish};
use super::serve::{Front, Served, serve};
use super::{direct, memory};
use crate::constants::LABEL_BYTES_MAX;
use crate::crypto::sm4::Kernel;
use crate::device::BlockDevice;
use crate::log::{LogEnd, LogPosition};
use crate::tap::{Tap, TapParts};
use crate::types::{FrameNo, IncarnationId, Seq, TimeUs};

/// Runs a tap server until it is told to stop. `launch` is an encoded `TapLaunch`.
///
/// Writes one length-prefixed `Response` on standard output when it serves or has failed, and
/// returns the exit code. To be called on the main thread of a process with no other threads.
pub fn tap_main(launch: &[u8]) -> i32 {
    finish(run(launch))
}

fn run(launch: &[u8]) -> Result<(), Failure> {
    let mut launch = TapLaunch::decode(launch)
        .map_err(|error| Failure::usage(format!("the launch message is damaged: {error}")))?;
    memory::forbid_core_files();
    Kernel::chosen()?;
    let signals = Signals::block()?;
    // Before any thread starts: they inherit it.
    let mut notices = memory::enter_write_back_path();
    let config = tap_config(&launch);
    launch.key.zeroize();
    let config = config?;
    let cache_bytes = config.cache_bytes as u64;
    let tcp = address(&launch.nbd_tcp)?;
    let socket = path("the control socket", &launch.control_socket)?;
    // The socket first: it keeps a second tap server of this group from starting.
    let listener = listen(socket)?;

    let volumes = config.volumes.clone();
    let mut parts = TapParts::real(&config)?;
    parts.queue_bytes = memory::queue_limit(parts.queue_bytes);
    if memory::must_avoid_page_cache() {
        memory::keep_memory();
        notices.push("direct I/O: memory is shared and this process is no I/O flusher".into());
        for path in direct::bypass_page_cache(&mut parts, &config) {
            let path = path.display();
            notices.push(format!(
                "{path} has no direct I/O: memory pressure can block it"
            ));
        }
    }
    let tap = Tap::start_with(config, parts)?;
    let mut devices: Vec<(String, Arc<dyn BlockDevice>)> = Vec::with_capacity(volumes.len());
    let mut shown = Vec::with_capacity(volumes.len());
    for volume in &volumes {
        let device = tap
            .device(volume.index)
            .ok_or_else(|| Failure::internal(format!("the tap has no volume {}", volume.name)))?;
        shown.push(proto::VolumeStatus {
            index: u32::from(volume.index.0),
            name: volume.name.clone(),
            size: device.info().size,
            backing: volume.backing.to_string_lossy().into_owned(),
        });
        devices.push((volume.name.clone(), device));
    }
    let (group, unix) = (&launch.group_name, &launch.nbd_unix);
    let server = TapServer {
        tap,
        front: Front::open(devices, group, unix, tcp, notices)?,
        volumes: shown,
        cache_bytes,
        stopped: Mutex::new(None),
    };
    serve(listener, socket, &signals, server)
}

#[derive(Debug)]
struct TapServer {
    tap: Arc<Tap>,
    front: Front,
    volumes: Vec<proto::VolumeStatus>,
    cache_bytes: u64,
    /// How stopping ended, once it has.
    stopped: Mutex<Option<Result<(), Failure>>>,
}

impl Served for TapServer {
    fn front(&self) -> &Front {
        &self.front
    }

    fn status(&self) -> Outcome {
        let status = self.tap.status();
        let mountpoint = self.front.mountpoint();
        Outcome::TapStatus(proto::TapStatus {
            last_seq: status.last_seq.0,
            last_time_us: status.last_time.0,
            spooled_seq: status.spooled_seq.0,
            writes: status.writes,
            write_bytes: status.write_bytes,
            reads: status.reads,
            read_bytes: status.read_bytes,
            flushes: status.flushes,
            frame_bytes: status.frame_bytes,
            queue_bytes: status.queue_bytes,
            spool_bytes: status.spool_bytes,
            dirty_regions: status.dirty_regions,
            copy_regions_left: status.copy_regions_left,
            copy_regions_total: status.copy_regions_total,
            copy_bytes_per_s: status.copy_bytes_per_s,
            in_span: status.in_span,
            mode: status.mode.into(),
            gap_cause: status.gap_cause.unwrap_or_default().into(),
            clients: self.front.clients(),
            pid: std::process::id(),
            log_end: Some((&self.tap.log_end()).into()),
            nbd_tcp: self.front.nbd_tcp(),
            fuse_attached: mountpoint.is_some(),
            volumes: self.volumes.clone(),
            notices: self.front.notices(status.notices),
            fuse_mountpoint: mountpoint.unwrap_or_default(),
            cache_bytes: self.cache_bytes,
            slowed_writes: status.slowed_writes,
        })
    }

    fn stop(&self) -> Result<(), Failure> {
        let mut stopped = self.stopped.lock();
        stopped
            .get_or_insert_with(|| {
                self.front.stop();
                self.tap.stop().map_err(Failure::from)
            })
            .clone()
    }
}

impl Handler for TapServer {
    fn handle(&self, call: Call) -> Result<Reply, Failure> {
        match call.verb {
            Verb::Status(_) => Ok(Reply::new(self.status())),
            Verb::Bookmark(request) => {
                if request.label.is_empty() || request.label.len() > LABEL_BYTES_MAX {
                    return Err(Failure::usage(format!(
                        "a bookmark's label has 1 to {LABEL_BYTES_MAX} bytes"
                    )));
                }
                let (seq, time) = self.tap.bookmark(&request.label)?;
                let placed = proto::BookmarkPlaced {
                    seq: seq.0,
                    time_us: time.0,
                };
                Ok(Reply::new(Outcome::Bookmark(placed)))
            }
            Verb::Release(request) => {
                let incarnation = request.incarnation.as_slice().try_into();
                let position = LogPosition {
                    incarnation: IncarnationId(
                        incarnation.map_err(|_| Failure::usage("an incarnation has 16 bytes"))?,
                    ),
                    next_frame: FrameNo(request.next_frame),
                };
                self.tap.release(&position)?;
                Ok(Reply::done())
            }
            Verb::NewIncarnation(request) => {
                let (seq, time) = (Seq(request.above_seq), TimeUs(request.above_time_us));
                self.tap.new_incarnation(seq, time, request.copy)?;
                Ok(Reply::done())
            }
            Verb::AttachFuse(request) => self.front.attach(&request),
            Verb::Stop(_) => Ok(self.front.stopped(self.stop())),
            // Subscribe is the control socket's own affair.
            Verb::Subscribe(_) | Verb::Holder(_) => {
                Err(Failure::usage("a tap server does not know this verb"))
            }
        }
    }

    fn log_end(&self, seen: Option<&LogEnd>, timeout_ms: u64) -> Option<LogEnd> {
        Some(match seen {
            None => self.tap.log_end(),
            Some(seen) => self.tap.wait_log_end(seen, timeout_ms),
        })
    }
}
