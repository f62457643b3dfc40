//! NBD server: fixed newstyle handshake, simple and structured replies, over unix sockets and TCP.
//! Protocol: the NBD project's `doc/proto.md`.
//!
//! One thread a connection parses all requests that one read brought, runs them with `nowait`, and
//! answers with one writev. What would wait goes to a small pool of threads that answer themselves.

use std::path::Path;
use std::sync::Arc;

use crate::device::BlockDevice;

/// A named device.
#[derive(Debug, Clone)]
pub struct Export {
    pub name: String,
    pub description: String,
    pub device: Arc<dyn BlockDevice>,
}

/// A running server; stops when dropped.
#[derive(Debug)]
pub struct Server {
    _private: (),
}

impl Server {
    pub fn new(exports: Vec<Export>) -> Self {
        let _ = exports;
        todo!()
    }

    /// Serves a unix socket; an old socket file of a dead server is replaced.
    pub fn listen_unix(&self, path: &Path) -> std::io::Result<()> {
        let _ = path;
        todo!()
    }

    /// Serves TCP; returns the bound address (port 0 picks one).
    pub fn listen_tcp(&self, address: std::net::SocketAddr) -> std::io::Result<std::net::SocketAddr> {
        let _ = address;
        todo!()
    }

    /// Number of connected clients.
    pub fn clients(&self) -> usize {
        todo!()
    }

    /// Stops accepting, lets running requests finish, closes connections.
    pub fn stop(&self) {
        todo!()
    }
}
