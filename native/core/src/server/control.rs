//! A control socket: a unix stream socket that serves a few local clients, one thread each.
//!
//! Only root and our own user are served. A slow client delays nobody else: events coalesce (only
//! the newest log end is sent), and each client's writes wait on its own thread.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{FlockOperation, flock};

use super::failure::Failure;
use super::proto::request::Verb;
use super::proto::response::Result as Outcome;
use super::proto::{Done, Request, Response};
use super::wire;
use crate::log::LogEnd;

/// Clients at once: the agent, a few commands, the front ends of a holder.
const CLIENTS_MAX: usize = 64;
/// Stack of a client's thread.
const STACK_BYTES: usize = 512 << 10;
/// A client that does not take its answer for so long is dropped.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// A subscriber looks whether its client or the server has ended this often.
const WATCH_MS: u64 = 500;

/// One request as the handler sees it.
#[derive(Debug)]
pub struct Call {
    pub verb: Verb,
    /// Which connection asks; never used twice.
    pub connection: u64,
    /// Descriptor that came beside the request.
    pub descriptor: Option<OwnedFd>,
}

/// The answer to a request.
pub struct Reply {
    pub outcome: Outcome,
    pub descriptor: Option<OwnedFd>,
    /// Runs once the answer is sent, such as ending the process.
    pub then: Option<Box<dyn FnOnce() + Send>>,
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reply")
            .field("outcome", &self.outcome)
            .finish_non_exhaustive()
    }
}

impl Reply {
    pub fn new(outcome: Outcome) -> Self {
        Self {
            outcome,
            descriptor: None,
            then: None,
        }
    }

    pub fn done() -> Self {
        Self::new(Outcome::Done(Done {}))
    }
}

impl From<Failure> for Reply {
    fn from(failure: Failure) -> Self {
        Self::new(Outcome::Failure(failure.into()))
    }
}

/// What a server does with requests. Called from many threads.
pub trait Handler: Send + Sync + 'static {
    /// Answers anything but Subscribe.
    fn handle(&self, call: Call) -> Result<Reply, Failure>;

    /// A connection has ended; all its requests are answered.
    fn closed(&self, connection: u64) {
        let _ = connection;
    }

    /// The log whose end subscribers follow: waits until it differs from `seen` (None: at once) or
    /// the time is over. None if this server has no log.
    fn log_end(&self, seen: Option<&LogEnd>, timeout_ms: u64) -> Option<LogEnd> {
        let _ = (seen, timeout_ms);
        None
    }
}

/// A listening control socket. Stops when dropped.
#[derive(Debug)]
pub struct ControlServer {
    shared: Arc<Shared>,
    path: PathBuf,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    stopping: AtomicBool,
    wake: OwnedFd,
    clients: Mutex<Vec<Client>>,
    next_connection: AtomicU64,
}

#[derive(Debug)]
struct Client {
    connection: u64,
    stream: Arc<UnixStream>,
}

/// Binds a unix socket for us alone. A socket file that nobody listens on is replaced.
///
/// Two servers may start at once, such as one of a killed agent and one of its successor: without
/// the lock one could take the socket away that the other has just bound.
pub fn listen(path: &Path) -> Result<UnixListener, Failure> {
    if path.as_os_str().len() > 107 {
        return Err(Failure::config(format!(
            "{}: the path of a unix socket has at most 107 bytes",
            path.display()
        )));
    }
    let failed = |error: &io::Error| Failure::io(&format!("listen on {}", path.display()), error);
    let directory = path
        .parent()
        .filter(|directory| !directory.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let turn = std::fs::File::open(directory).map_err(|error| failed(&error))?;
    flock(&turn, FlockOperation::LockExclusive).map_err(|error| failed(&error.into()))?;
    let is_socket =
        std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if is_socket {
        if UnixStream::connect(path).is_ok() {
            return Err(Failure::state(
                "in-use",
                format!("{}: another server listens here", path.display()),
                "is this server running already?",
            ));
        }
        let _ = std::fs::remove_file(path);
    }
    let bound = UnixListener::bind(path).and_then(|listener| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    bound.map_err(|error| failed(&error))
}

impl ControlServer {
    /// Serves `listener`, which was bound to `path`.
    pub fn start(
        listener: UnixListener,
        path: &Path,
        handler: Arc<dyn Handler>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            stopping: AtomicBool::new(false),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            clients: Mutex::default(),
            next_connection: AtomicU64::new(1),
        });
        let acceptor = std::thread::Builder::new()
            .name("control".into())
            .stack_size(STACK_BYTES)
            .spawn({
                let shared = Arc::clone(&shared);
                move || accept(&shared, &listener, &handler)
            })?;
        Ok(Self {
            shared,
            path: path.to_owned(),
            acceptor: Mutex::new(Some(acceptor)),
        })
    }

    /// Connected clients.
    pub fn clients(&self) -> usize {
        self.shared.clients.lock().len()
    }

    /// Accepts no more, closes all connections, removes the socket file.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let _ = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
        let Some(acceptor) = self.acceptor.lock().take() else {
            return;
        };
        // Its panics were ours; there is nothing more to do with them here.
        let _ = acceptor.join();
        let _ = std::fs::remove_file(&self.path);
        for client in self.shared.clients.lock().iter() {
            let _ = client.stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener, handler: &Arc<dyn Handler>) {
    while !shared.stopping.load(Ordering::SeqCst) {
        let mut wanted = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(&shared.wake, PollFlags::IN),
        ];
        let _ = poll(&mut wanted, None);
        match listener.accept() {
            Ok((stream, _)) => {
                // A client that cannot be given a thread is dropped: it sees the end at once.
                let _ = admit(shared, stream, handler);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // Out of descriptors or memory: do not spin.
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn admit(shared: &Arc<Shared>, stream: UnixStream, handler: &Arc<dyn Handler>) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(SEND_TIMEOUT))?;
    let peer = rustix::net::sockopt::socket_peercred(&stream)?;
    let refusal = if !peer.uid.is_root() && peer.uid != rustix::process::geteuid() {
        Some(Failure::new(
            "privilege",
            super::ExitCode::Privilege,
            "only root and the server's own user may control it",
            "run the command as root",
        ))
    } else if shared.clients.lock().len() >= CLIENTS_MAX {
        Some(Failure::state(
            "busy",
            "too many clients are connected",
            "try again later",
        ))
    } else {
        None
    };
    if let Some(refusal) = refusal {
        let result = Some(Outcome::Failure(refusal.into()));
        return wire::send(&stream, &Response { id: 0, result }, None);
    }
    let connection = shared.next_connection.fetch_add(1, Ordering::Relaxed);
    let stream = Arc::new(stream);
    shared.clients.lock().push(Client {
        connection,
        stream: Arc::clone(&stream),
    });
    let spawned = std::thread::Builder::new()
        .name("control-client".into())
        .stack_size(STACK_BYTES)
        .spawn({
            let (shared, handler) = (Arc::clone(shared), Arc::clone(handler));
            move || {
                let link = Arc::new(Link {
                    stream,
                    sending: Mutex::new(()),
                });
                // An error of the connection ends it, and concerns only its client.
                let _ = converse(&shared, &link, &handler, connection);
                let _ = link.stream.shutdown(std::net::Shutdown::Both);
                shared
                    .clients
                    .lock()
                    .retain(|client| client.connection != connection);
                handler.closed(connection);
            }
        });
    if let Err(error) = spawned {
        shared
            .clients
            .lock()
            .retain(|client| client.connection != connection);
        return Err(error);
    }
    Ok(())
}

/// The sending side of a connection, shared by answers and events.
#[derive(Debug)]
struct Link {
    stream: Arc<UnixStream>,
    sending: Mutex<()>,
}

impl Link {
    fn send(&self, id: u64, outcome: Outcome, descriptor: Option<&OwnedFd>) -> io::Result<()> {
        let _whole_messages = self.sending.lock();
        let response = Response {
            id,
            result: Some(outcome),
        };
        wire::send(&self.stream, &response, descriptor.map(AsFd::as_fd))
    }
}

fn converse(
    shared: &Arc<Shared>,
    link: &Arc<Link>,
    handler: &Arc<dyn Handler>,
    connection: u64,
) -> io::Result<()> {
    let ended = Arc::new(AtomicBool::new(false));
    let result = serve(shared, link, handler, connection, &ended);
    ended.store(true, Ordering::SeqCst);
    result
}

fn serve(
    shared: &Arc<Shared>,
    link: &Arc<Link>,
    handler: &Arc<dyn Handler>,
    connection: u64,
    ended: &Arc<AtomicBool>,
) -> io::Result<()> {
    let mut subscribed = false;
    while let Some((request, descriptor)) = wire::receive::<Request>(&link.stream)? {
        let reply = match request.verb {
            None => Failure::usage("the request names no known verb").into(),
            Some(Verb::Subscribe(_)) => match handler.log_end(None, 0) {
                None => Failure::usage("this server has no log to follow").into(),
                Some(end) => {
                    link.send(request.id, Outcome::LogEnd((&end).into()), None)?;
                    if !subscribed {
                        subscribed = true;
                        watch(shared, link, handler, ended, end)?;
                    }
                    continue;
                }
            },
            Some(verb) => {
                let call = Call {
                    verb,
                    connection,
                    descriptor,
                };
                handler.handle(call).unwrap_or_else(Reply::from)
            }
        };
        let sent = link.send(request.id, reply.outcome, reply.descriptor.as_ref());
        if let Some(then) = reply.then {
            then();
        }
        sent?;
    }
    Ok(())
}

/// Sends the log's end whenever it has moved.
fn watch(
    shared: &Arc<Shared>,
    link: &Arc<Link>,
    handler: &Arc<dyn Handler>,
    ended: &Arc<AtomicBool>,
    mut seen: LogEnd,
) -> io::Result<()> {
    let (shared, link) = (Arc::clone(shared), Arc::clone(link));
    let (handler, ended) = (Arc::clone(handler), Arc::clone(ended));
    let follow = move || {
        while !ended.load(Ordering::SeqCst) && !shared.stopping.load(Ordering::SeqCst) {
            let Some(end) = handler.log_end(Some(&seen), WATCH_MS) else {
                return;
            };
            if end != seen {
                if link.send(0, Outcome::LogEnd((&end).into()), None).is_err() {
                    // The client is gone, or so slow that it must begin again.
                    let _ = link.stream.shutdown(std::net::Shutdown::Both);
                    return;
                }
                seen = end;
            }
        }
    };
    let builder = std::thread::Builder::new().name("control-events".into());
    builder.stack_size(STACK_BYTES).spawn(follow).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn of_servers_that_start_at_once_one_has_the_socket_and_keeps_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        for round in 0..200 {
            // What a killed server left.
            drop(UnixListener::bind(&path).unwrap());
            let start = Barrier::new(4);
            let listeners: Vec<UnixListener> = std::thread::scope(|scope| {
                let one = || {
                    start.wait();
                    listen(&path).ok()
                };
                let threads = [(); 4].map(|()| scope.spawn(one));
                threads
                    .into_iter()
                    .filter_map(|thread| thread.join().unwrap())
                    .collect()
            });
            assert_eq!(listeners.len(), 1, "round {round}");
            assert!(UnixStream::connect(&path).is_ok(), "round {round}");
            std::fs::remove_file(&path).unwrap();
        }
    }
}
