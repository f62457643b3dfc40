//! NBD server: fixed newstyle handshake, simple and structured replies, over unix sockets and TCP.
//! Protocol: the NBD project's `doc/proto.md`.
//!
//! One thread a connection parses all requests that one read brought, runs them with `nowait`, and
//! answers with one send. What would wait goes to a small pool of threads that answer themselves.
//!
//! Every length that a client states is checked before it is used; a client that breaks the
//! protocol, or takes too long to say what it wants, is disconnected.

mod connection;
mod handshake;
mod listen;
mod options;
mod pool;
mod receiver;
mod reply;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod transmission;
mod wire;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{Shutdown, SocketFlags, accept_with, shutdown};

use self::connection::{Connection, Hangup, RECEIVE_LEN};
use self::listen::SocketFile;
use self::pool::Pool;
use self::receiver::Receiver;
use crate::device::BlockDevice;

/// A named device.
#[derive(Debug, Clone)]
pub struct Export {
    pub name: String,
    pub description: String,
    pub device: Arc<dyn BlockDevice>,
}

/// Bounds of a server.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Clients at a time; a further one is disconnected at once.
    pub connections: usize,
    /// Time from accepting a client to its first request.
    pub handshake: Duration,
    /// Threads for requests that would wait.
    pub pool_threads: usize,
    /// After `stop`: how long clients may take to read the replies to what was running.
    pub stop_grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 128,
            handshake: Duration::from_secs(10),
            pool_threads: 16,
            stop_grace: Duration::from_secs(5),
        }
    }
}

/// A running server; stops when dropped.
#[derive(Debug)]
pub struct Server {
    inner: Arc<Inner>,
    listeners: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Inner {
    exports: Vec<Export>,
    limits: Limits,
    pool: Arc<Pool>,
    stopping: AtomicBool,
    /// Created with the first listener; readable once the server stops.
    stop_event: Mutex<Option<Arc<OwnedFd>>>,
    clients: Mutex<Clients>,
    client_left: Condvar,
}

#[derive(Debug, Default)]
struct Clients {
    next_id: u64,
    sockets: HashMap<u64, Arc<OwnedFd>>,
}

impl Server {
    pub fn new(exports: Vec<Export>) -> Self {
        Self::with_limits(exports, Limits::default())
    }

    pub fn with_limits(exports: Vec<Export>, limits: Limits) -> Self {
        let inner = Inner {
            exports,
            limits,
            pool: Arc::new(Pool::new(limits.pool_threads)),
            stopping: AtomicBool::new(false),
            stop_event: Mutex::default(),
            clients: Mutex::default(),
            client_left: Condvar::new(),
        };
        Self {
            inner: Arc::new(inner),
            listeners: Mutex::default(),
        }
    }

    /// Serves a unix socket, open to this user only; an old socket file of a dead server is
    /// replaced, a live server's is `AddrInUse`.
    pub fn listen_unix(&self, path: &Path) -> std::io::Result<()> {
        let (socket, file) = listen::unix(path)?;
        self.listen(socket, Some(file), "nbd-unix")
    }

    /// Serves TCP; returns the bound address (port 0 picks one).
    pub fn listen_tcp(&self, address: SocketAddr) -> std::io::Result<SocketAddr> {
        let (socket, bound) = listen::tcp(address)?;
        self.listen(socket, None, "nbd-tcp")?;
        Ok(bound)
    }

    /// Number of connected clients.
    pub fn clients(&self) -> usize {
        self.inner.clients.lock().sockets.len()
    }

    /// Stops accepting, lets running requests finish, closes connections. Later requests are
    /// answered with ESHUTDOWN, or not at all where only simple replies were agreed on. Returns
    /// when all of its threads have ended.
    pub fn stop(&self) {
        let inner = &self.inner;
        inner.stopping.store(true, Ordering::SeqCst);
        if let Some(event) = &*inner.stop_event.lock() {
            // It is readable already if this fails.
            let _ = rustix::io::write(event, &1u64.to_ne_bytes());
        }
        for listener in std::mem::take(&mut *self.listeners.lock()) {
            // A panic was reported by its thread already.
            let _ = listener.join();
        }
        let mut clients = inner.clients.lock();
        shut(&clients, Shutdown::Read);
        let deadline = Instant::now() + inner.limits.stop_grace;
        while !clients.sockets.is_empty() {
            if inner
                .client_left
                .wait_until(&mut clients, deadline)
                .timed_out()
            {
                break;
            }
        }
        shut(&clients, Shutdown::Both);
        while !clients.sockets.is_empty() {
            inner.client_left.wait(&mut clients);
        }
        drop(clients);
        inner.pool.stop();
    }

    fn listen(&self, socket: OwnedFd, file: Option<SocketFile>, name: &str) -> std::io::Result<()> {
        if self.inner.stopping.load(Ordering::SeqCst) {
            return Err(Errno::SHUTDOWN.into());
        }
        self.inner.pool.start()?;
        let stop_event = self.inner.stop_event()?;
        let inner = Arc::clone(&self.inner);
        let accept = move || {
            let tcp = file.is_none();
            inner.accept_loop(&socket, &stop_event, tcp);
            // Before the socket closes: its file must not outlive it.
            drop(file);
        };
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(accept)?;
        self.listeners.lock().push(thread);
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn shut(clients: &Clients, how: Shutdown) {
    for socket in clients.sockets.values() {
        // The client may have gone already.
        let _ = shutdown(socket.as_fd(), how);
    }
}

impl Inner {
    fn stop_event(&self) -> std::io::Result<Arc<OwnedFd>> {
        let mut event = self.stop_event.lock();
        if let Some(event) = &*event {
            return Ok(Arc::clone(event));
        }
        let new = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        *event = Some(Arc::clone(&new));
        Ok(new)
    }

    fn accept_loop(self: &Arc<Self>, listener: &OwnedFd, stop_event: &OwnedFd, tcp: bool) {
        while !self.stopping.load(Ordering::SeqCst) {
            let mut events = [
                PollFd::new(listener, PollFlags::IN),
                PollFd::new(stop_event, PollFlags::IN),
            ];
            // Errors need no name here: accept meets them again.
            let _ = poll(&mut events, None);
            if self.stopping.load(Ordering::SeqCst) {
                break;
            }
            match accept_with(listener, SocketFlags::CLOEXEC) {
                Ok(socket) => self.welcome(socket, tcp),
                // Out of descriptors or memory: what is connected goes on, and ends some time.
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    std::thread::sleep(Duration::from_millis(100));
                }
                // The client went before it was accepted.
                Err(_) => {}
            }
        }
    }

    /// Starts the thread of a new client, unless there are too many.
    fn welcome(self: &Arc<Self>, socket: OwnedFd, tcp: bool) {
        if tcp && listen::prepare_tcp(&socket).is_err() {
            return;
        }
        let socket = Arc::new(socket);
        let Some(registration) = self.register(&socket) else {
            return;
        };
        let thread = std::thread::Builder::new().name(format!("nbd-{}", registration.id));
        // If there is no thread to be had, dropping the closure disconnects the client.
        let _ = thread.spawn(move || {
            let inner = Arc::clone(&registration.inner);
            inner.serve(&socket);
            // Closed before it is counted as gone.
            let _ = shutdown(socket.as_fd(), Shutdown::Both);
            drop(socket);
            drop(registration);
        });
    }

    fn register(self: &Arc<Self>, socket: &Arc<OwnedFd>) -> Option<Registration> {
        let mut clients = self.clients.lock();
        if clients.sockets.len() >= self.limits.connections {
            return None;
        }
        let id = clients.next_id;
        clients.next_id += 1;
        clients.sockets.insert(id, Arc::clone(socket));
        Some(Registration {
            inner: Arc::clone(self),
            id,
        })
    }

    fn serve(&self, socket: &Arc<OwnedFd>) -> Hangup {
        let mut input = Receiver::new(RECEIVE_LEN);
        let deadline = Instant::now() + self.limits.handshake;
        let stopping = || self.stopping.load(Ordering::SeqCst);
        let terms = handshake::negotiate(
            socket.as_fd(),
            &mut input,
            &self.exports,
            deadline,
            &stopping,
        );
        let connection = terms
            .and_then(|terms| Connection::new(socket, input, terms, &self.pool, &self.stopping));
        match connection {
            Ok(connection) => connection.serve(),
            Err(hangup) => hangup,
        }
    }
}

/// A client's entry in the list of clients.
#[derive(Debug)]
struct Registration {
    inner: Arc<Inner>,
    id: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.inner.clients.lock().sockets.remove(&self.id);
        self.inner.client_left.notify_all();
    }
}
