//! What tap and view server have in common: the front ends with what is said of them, and the life
//! of the process from the ready report to the end of the control socket.

use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use super::control::{ControlServer, Handler, Reply};
use super::failure::Failure;
use super::front::{FuseFront, exports, listen_nbd};
use super::proto::AttachFuseRequest;
use super::proto::response::Result as Outcome;
use super::run::{Exit, Signals, report_ready};
use crate::device::BlockDevice;
use crate::nbd;

/// NBD and FUSE in front of named devices.
#[derive(Debug)]
pub(super) struct Front {
    nbd: nbd::Server,
    nbd_tcp: Option<SocketAddr>,
    fuse: FuseFront,
    /// What the start found.
    notices: Vec<String>,
    exit: Exit,
}

impl Front {
    /// Serves NBD from now on; FUSE when a holder asks for it.
    pub(super) fn open(
        devices: Vec<(String, Arc<dyn BlockDevice>)>,
        group: &str,
        unix: &str,
        tcp: Option<SocketAddr>,
        notices: Vec<String>,
    ) -> Result<Self, Failure> {
        let nbd = nbd::Server::new(exports(&devices, group));
        let nbd_tcp = listen_nbd(&nbd, unix, tcp)?;
        Ok(Self {
            nbd,
            nbd_tcp,
            fuse: FuseFront::new(devices),
            notices,
            exit: Exit::new()?,
        })
    }

    pub(super) fn clients(&self) -> u32 {
        u32::try_from(self.nbd.clients()).unwrap_or(u32::MAX)
    }

    /// Address of TCP; empty if none.
    pub(super) fn nbd_tcp(&self) -> String {
        let address = self.nbd_tcp.map(|address| address.to_string());
        address.unwrap_or_default()
    }

    /// Where the files are; None if not attached.
    pub(super) fn mountpoint(&self) -> Option<String> {
        self.fuse.mountpoint()
    }

    /// What the start found, what is found now, and what people should know of the front ends.
    pub(super) fn notices(&self, now: impl IntoIterator<Item = String>) -> Vec<String> {
        let start = self.notices.iter().cloned();
        start.chain(now).chain(self.fuse.notice()).collect()
    }

    pub(super) fn attach(&self, request: &AttachFuseRequest) -> Result<Reply, Failure> {
        let status = self.fuse.attach(Path::new(&request.holder_socket))?;
        Ok(Reply::new(Outcome::HolderStatus(status)))
    }

    /// What is not yet read from the FUSE mount then waits for the next server instead of failing.
    pub(super) fn stop(&self) {
        self.fuse.stop();
        self.nbd.stop();
    }

    /// The answer to a stop that ended so; the process ends once it is sent.
    pub(super) fn stopped(&self, outcome: Result<(), Failure>) -> Reply {
        let exit = self.exit.clone();
        Reply {
            then: Some(Box::new(move || exit.request())),
            ..outcome.map_or_else(Reply::from, |()| Reply::done())
        }
    }
}

/// A server that `serve` can run.
pub(super) trait Served: Handler {
    fn front(&self) -> &Front;

    /// What is reported when it is ready.
    fn status(&self) -> Outcome;

    /// Front ends first. Repeating it tells how it ended.
    fn stop(&self) -> Result<(), Failure>;
}

/// Answers on the control socket until a signal or a stop request comes, then stops the server.
pub(super) fn serve<S: Served>(
    listener: UnixListener,
    socket: &Path,
    signals: &Signals,
    server: S,
) -> Result<(), Failure> {
    let server = Arc::new(server);
    let control = ControlServer::start(listener, socket, Arc::clone(&server) as _)
        .map_err(|error| Failure::io("serve the control socket", &error))?;
    report_ready(server.status());
    signals.wait(&server.front().exit);
    let result = server.stop();
    control.stop();
    result
}
