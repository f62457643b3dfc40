//! The view server: a group as of a point, its front ends, its control socket.

use std::path::Path;
use std::sync::Arc;

use prost::Message;
use zeroize::Zeroize;

use super::control::{Call, Handler, Reply, listen};
use super::failure::Failure;
use super::launch::{address, group_id, group_key, log_end, path};
use super::memory;
use super::proto::request::Verb;
use super::proto::response::Result as Outcome;
use super::proto::view_launch::Point as Asked;
use super::proto::{self, ViewLaunch};
use super::run::{Signals, finish};
use super::serve::{Front, Served, serve};
use crate::constants::CACHE_BYTES;
use crate::crypto::sm4::Kernel;
use crate::device::BlockDevice;
use crate::index::{History, Point, PointSpec};
use crate::storage::{Directory, DiskDirectory};
use crate::types::{Seq, TimeUs};
use crate::view::View;

/// Runs a view server until it is told to stop. `launch` is an encoded `ViewLaunch`.
///
/// Writes one length-prefixed `Response` on standard output when it serves or has failed, and
/// returns the exit code. To be called on the main thread of a process with no other threads.
pub fn view_main(launch: &[u8]) -> i32 {
    finish(run(launch))
}

fn open(directory: &Path, create: bool) -> Result<Arc<dyn Directory>, Failure> {
    if create {
        std::fs::create_dir_all(directory)
            .map_err(|error| Failure::io(&format!("make {}", directory.display()), &error))?;
    }
    let opened = DiskDirectory::open(directory)
        .map_err(|error| Failure::io(&format!("open {}", directory.display()), &error))?;
    Ok(Arc::new(opened))
}

fn run(launch: &[u8]) -> Result<(), Failure> {
    let mut launch = ViewLaunch::decode(launch)
        .map_err(|error| Failure::usage(format!("the launch message is damaged: {error}")))?;
    memory::forbid_core_files();
    Kernel::chosen()?;
    let signals = Signals::block()?;
    let mut notices = Vec::new();
    if !launch.overlay_dir.is_empty() {
        // A writable view can have a mount above it: it is in that one's write-back path.
        notices = memory::enter_write_back_path();
    }
    let key = group_key(&launch.key);
    launch.key.zeroize();
    let key = key?.ok_or_else(|| {
        Failure::state(
            "locked",
            "history cannot be read without its key",
            "unlock the keys",
        )
    })?;
    let group = group_id(&launch.group)?;
    let tcp = address(&launch.nbd_tcp)?;
    let socket = path("the control socket", &launch.control_socket)?;
    let listener = listen(socket)?;

    let log = open(path("the log", &launch.log_dir)?, false)?;
    let end = launch.end.as_ref().map(log_end).transpose()?;
    let history = Arc::new(History::open(Arc::clone(&log), group, end.as_ref())?);
    let asked = match launch.point.take() {
        None => PointSpec::Newest,
        Some(Asked::AtTimeUs(time)) => PointSpec::At(TimeUs(time)),
        Some(Asked::AtSeq(seq)) => PointSpec::AtSeq(Seq(seq)),
        Some(Asked::Bookmark(label)) => PointSpec::Bookmark(label),
    };
    let point = history.resolve(&asked, launch.exact)?;
    let overlay = match launch.overlay_dir.as_str() {
        "" => None,
        text => Some(open(path("the overlay", text)?, true)?),
    };
    let wanted = if launch.cache_bytes == 0 {
        CACHE_BYTES as u64
    } else {
        launch.cache_bytes
    };
    let cache_bytes = memory::cache_limit(wanted);
    let view = View::open(
        Arc::clone(&history),
        log,
        key,
        point,
        overlay,
        launch.overlay_bytes_max,
        cache_bytes,
    )?;

    let mut devices: Vec<(String, Arc<dyn BlockDevice>)> = Vec::new();
    let mut volumes = Vec::new();
    for (index, name, size) in history.volumes(point.seq) {
        devices.push((name.clone(), view.device(index)?));
        let index = u32::from(index.0);
        volumes.push(proto::VolumeStatus {
            index,
            name,
            size,
            backing: String::new(),
        });
    }
    let (group, unix) = (&launch.group_name, &launch.nbd_unix);
    let server = ViewServer {
        view,
        point,
        writable: !launch.overlay_dir.is_empty(),
        front: Front::open(devices.clone(), group, unix, tcp, notices)?,
        devices,
        volumes,
    };
    serve(listener, socket, &signals, server)
}

#[derive(Debug)]
struct ViewServer {
    view: View,
    point: Point,
    writable: bool,
    front: Front,
    devices: Vec<(String, Arc<dyn BlockDevice>)>,
    volumes: Vec<proto::VolumeStatus>,
}

impl Served for ViewServer {
    fn front(&self) -> &Front {
        &self.front
    }

    fn status(&self) -> Outcome {
        let mountpoint = self.front.mountpoint();
        let found = self.view.findings().into_iter().map(|finding| {
            let (volume, block) = (finding.volume.0, finding.block.0);
            format!(
                "volume {volume}, block {block} cannot be read: {}",
                finding.what
            )
        });
        Outcome::ViewStatus(proto::ViewStatus {
            seq: self.point.seq.0,
            time_us: self.point.time.0,
            writable: self.writable,
            overlay_bytes: self.view.overlay_bytes(),
            clients: self.front.clients(),
            pid: std::process::id(),
            nbd_tcp: self.front.nbd_tcp(),
            fuse_attached: mountpoint.is_some(),
            volumes: self.volumes.clone(),
            cells_opened: self.view.cells_opened(),
            fuse_mountpoint: mountpoint.unwrap_or_default(),
            notices: self.front.notices(found),
        })
    }

    /// Front ends first, then what the overlay holds becomes durable.
    fn stop(&self) -> Result<(), Failure> {
        self.front.stop();
        if self.writable {
            for (name, device) in &self.devices {
                device
                    .flush(crate::device::RequestFlags::default())
                    .map_err(|error| {
                        Failure::internal(format!("the overlay of {name} is not durable: {error}"))
                    })?;
            }
        }
        Ok(())
    }
}

impl Handler for ViewServer {
    fn handle(&self, call: Call) -> Result<Reply, Failure> {
        match call.verb {
            Verb::Status(_) => Ok(Reply::new(self.status())),
            Verb::AttachFuse(request) => self.front.attach(&request),
            Verb::Stop(_) => Ok(self.front.stopped(self.stop())),
            _ => Err(Failure::usage("a view server does not know this verb")),
        }
    }
}
