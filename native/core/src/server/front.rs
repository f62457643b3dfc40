//! The front ends of a tap or view server: NBD, and FUSE on the mount of a holder.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::failure::Failure;
use super::holder::HolderLink;
use super::proto::HolderStatus;
use crate::device::BlockDevice;
use crate::fuse::FuseServer;
use crate::nbd;

/// INIT was sent when the holder mounted, so that it is answered at once.
const INIT_TIMEOUT: Duration = Duration::from_secs(5);

/// The NBD exports of named devices.
pub(super) fn exports(devices: &[(String, Arc<dyn BlockDevice>)], group: &str) -> Vec<nbd::Export> {
    let export = |(name, device): &(String, Arc<dyn BlockDevice>)| nbd::Export {
        name: name.clone(),
        description: format!("{group}/{name}"),
        device: Arc::clone(device),
    };
    devices.iter().map(export).collect()
}

/// Listens where the launch message says. Returns the bound address of TCP.
pub(super) fn listen_nbd(
    server: &nbd::Server,
    unix: &str,
    tcp: Option<SocketAddr>,
) -> Result<Option<SocketAddr>, Failure> {
    if !unix.is_empty() {
        server
            .listen_unix(Path::new(unix))
            .map_err(|error| Failure::io(&format!("serve NBD on {unix}"), &error))?;
    }
    tcp.map(|address| {
        server
            .listen_tcp(address)
            .map_err(|error| Failure::io(&format!("serve NBD on {address}"), &error))
    })
    .transpose()
}

/// Named devices that can be served through a holder's mount.
#[derive(Debug)]
pub struct FuseFront {
    files: Vec<(String, Arc<dyn BlockDevice>)>,
    serving: Mutex<Option<Serving>>,
    /// Set for good under the lock of `serving`.
    stopped: AtomicBool,
}

#[derive(Debug)]
struct Serving {
    // Dropped first: the last answer goes out before the link ends.
    server: FuseServer,
    link: HolderLink,
    status: HolderStatus,
}

impl FuseFront {
    pub fn new(files: Vec<(String, Arc<dyn BlockDevice>)>) -> Self {
        Self {
            files,
            serving: Mutex::new(None),
            stopped: AtomicBool::new(false),
        }
    }

    /// Serves the mount of the holder at `socket` from now on: takes its descriptor or, if we serve
    /// one whose holder died, gives it that. Returns the holder's status.
    pub fn attach(&self, socket: &Path) -> Result<HolderStatus, Failure> {
        let mut serving = self.serving.lock();
        // The devices end after us and would answer with errors what a successor can do.
        if self.stopped.load(Ordering::SeqCst) {
            return Err(Failure::state(
                "stopping",
                "this server is about to end and serves no mount any more",
                "its successor will",
            ));
        }
        if let Some(current) = serving.as_mut().filter(|current| !current.server.ended()) {
            if !current.link.is_alive() {
                let descriptor = current.server.descriptor();
                let descriptor =
                    descriptor.map_err(|error| Failure::io("duplicate the descriptor", &error))?;
                (current.link, current.status) = HolderLink::give(socket, &descriptor)?;
            }
            return Ok(current.status.clone());
        }
        *serving = None;
        let (mut link, status, descriptor) = HolderLink::take(socket)?;
        let resume = status.handed_out || status.initialized;
        let server = FuseServer::start(descriptor, self.files.clone(), resume)
            .map_err(|error| Failure::io("serve the FUSE mount", &error))?;
        if !server.wait_initialized(INIT_TIMEOUT) {
            return Err(Failure::internal("the kernel did not finish FUSE's INIT"));
        }
        // A holder that died just now must not cost the mount: we have its only descriptor, and the
        // next holder gets it back.
        let status = link.initialized().unwrap_or(HolderStatus {
            initialized: true,
            handed_out: true,
            served: true,
            ..status
        });
        *serving = Some(Serving {
            server,
            link,
            status: status.clone(),
        });
        Ok(status)
    }

    /// Where the files are; None if not attached.
    pub fn mountpoint(&self) -> Option<String> {
        let serving = self.serving.lock();
        let current = serving.as_ref().filter(|current| !current.server.ended())?;
        Some(current.link.mountpoint.clone())
    }

    /// What people should know of this front end.
    pub fn notice(&self) -> Option<String> {
        let serving = self.serving.lock();
        let current = serving.as_ref()?;
        (current.server.resends() == Some(false)).then(|| {
            "this kernel (before 6.9) cannot send a killed server's requests to its successor: \
             requests in flight then hang until the FUSE connection is aborted; prefer nbd"
                .to_owned()
        })
    }

    /// Answers what was read and serves no more; what comes waits for a successor.
    pub fn stop(&self) {
        let mut serving = self.serving.lock();
        self.stopped.store(true, Ordering::SeqCst);
        *serving = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_stops_does_not_take_a_mount_again() {
        let front = FuseFront::new(Vec::new());
        let nobody = Path::new("/nonexistent/holder");
        assert_ne!(front.attach(nobody).unwrap_err().code, "stopping");
        front.stop();
        assert_eq!(front.attach(nobody).unwrap_err().code, "stopping");
    }
}
