//! Replies: laid out back to back in one buffer, sent with one system call, by several threads.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno as SystemError;
use rustix::net::{SendFlags, Shutdown, send, shutdown};

use super::connection::Hangup;
use super::wire::{self, Errno};

/// Replies of a batch, in a buffer that is allocated once. Callers make sure there is room.
#[derive(Debug)]
pub(super) struct Replies {
    bytes: Vec<u8>,
    used: usize,
}

impl Replies {
    /// Bytes that any error reply fits into.
    pub(super) const ERROR_LEN_MAX: usize = 128;

    /// Lays replies out in `bytes`, all of which may be overwritten.
    pub(super) fn over(bytes: Vec<u8>) -> Self {
        Self { bytes, used: 0 }
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.used]
    }

    pub(super) fn clear(&mut self) {
        self.used = 0;
    }

    pub(super) fn capacity(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn room(&self) -> usize {
        self.bytes.len() - self.used
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.used..self.used + bytes.len()].copy_from_slice(bytes);
        self.used += bytes.len();
    }

    fn simple(&mut self, cookie: u64, error: u32) {
        self.put(&wire::SIMPLE_REPLY_MAGIC.to_be_bytes());
        self.put(&error.to_be_bytes());
        self.put(&cookie.to_be_bytes());
    }

    /// Every reply here is one chunk, hence the last.
    fn chunk(&mut self, kind: u16, cookie: u64, length: u32) {
        self.put(&wire::CHUNK_MAGIC.to_be_bytes());
        self.put(&wire::CHUNK_DONE.to_be_bytes());
        self.put(&kind.to_be_bytes());
        self.put(&cookie.to_be_bytes());
        self.put(&length.to_be_bytes());
    }

    /// Success of a request without data in its reply; also structured clients take a simple one.
    pub(super) fn done(&mut self, cookie: u64) {
        self.simple(cookie, 0);
    }

    pub(super) fn error(&mut self, structured: bool, cookie: u64, errno: Errno) {
        if !structured {
            return self.simple(cookie, errno.number());
        }
        let message = errno.message().as_bytes();
        let length = u16::try_from(message.len()).expect("invariant: messages are short");
        self.chunk(wire::CHUNK_ERROR, cookie, 6 + u32::from(length));
        self.put(&errno.number().to_be_bytes());
        self.put(&length.to_be_bytes());
        self.put(message);
    }

    /// Bytes of a read's reply.
    pub(super) fn read_len(structured: bool, length: u32) -> usize {
        let head = if structured {
            wire::CHUNK_HEADER_LEN + 8
        } else {
            wire::SIMPLE_REPLY_LEN
        };
        head + length as usize
    }

    /// Lays out a read's reply with content that `fill` puts in; nothing if that fails.
    pub(super) fn read<E>(
        &mut self,
        structured: bool,
        cookie: u64,
        offset: u64,
        length: u32,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let start = self.used;
        if !structured {
            self.simple(cookie, 0);
        } else if length == 0 {
            self.chunk(wire::CHUNK_NONE, cookie, 0);
        } else {
            self.chunk(wire::CHUNK_OFFSET_DATA, cookie, 8 + length);
            self.put(&offset.to_be_bytes());
        }
        let content = self.used..self.used + length as usize;
        match fill(&mut self.bytes[content.clone()]) {
            Ok(()) => {
                self.used = content.end;
                Ok(())
            }
            Err(error) => {
                self.used = start;
                Err(error)
            }
        }
    }

    /// Descriptors `(length, state)` of one block status reply; never empty.
    pub(super) fn block_status(&mut self, cookie: u64, extents: &[(u32, u32)]) {
        let count = u32::try_from(extents.len()).expect("invariant: extents are limited");
        self.chunk(wire::CHUNK_BLOCK_STATUS, cookie, 4 + 8 * count);
        self.put(&wire::ALLOCATION_CONTEXT_ID.to_be_bytes());
        for (length, state) in extents {
            self.put(&length.to_be_bytes());
            self.put(&state.to_be_bytes());
        }
    }
}

/// The sending side of a connection.
///
/// Its own thread may block in a send; the pool's threads never do, or one client that does not
/// read would stop the others: what the socket does not take stays in the backlog, which the own
/// thread sends. The backlog is bounded by what the connection may have in flight.
#[derive(Debug)]
pub(super) struct Writer {
    socket: Arc<OwnedFd>,
    /// Readable when the backlog waits for the own thread.
    wake: OwnedFd,
    queued: AtomicBool,
    outbox: Mutex<Outbox>,
}

#[derive(Debug, Default)]
struct Outbox {
    backlog: Vec<u8>,
    /// The own thread is in the middle of a send: all others append.
    busy: bool,
    dead: bool,
}

impl Writer {
    pub(super) fn new(socket: Arc<OwnedFd>) -> Result<Self, Hangup> {
        let wake =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(Hangup::Io)?;
        Ok(Self {
            socket,
            wake,
            queued: AtomicBool::new(false),
            outbox: Mutex::default(),
        })
    }

    pub(super) fn wake_fd(&self) -> &OwnedFd {
        &self.wake
    }

    /// The backlog waits for the own thread.
    pub(super) fn queued(&self) -> bool {
        self.queued.load(Ordering::Acquire)
    }

    /// Sends the backlog and `bytes`; waits for the client. For the connection's own thread.
    pub(super) fn send(&self, bytes: &[u8]) -> Result<(), Hangup> {
        let mut backlog = self.begin()?;
        let mut result = Ok(());
        let mut bytes = bytes;
        loop {
            if !backlog.is_empty() {
                result = result.and_then(|()| self.send_all(&backlog));
            }
            if !bytes.is_empty() {
                result = result.and_then(|()| self.send_all(bytes));
                bytes = &[];
            }
            let mut outbox = self.outbox.lock();
            if result.is_err() {
                outbox.dead = true;
                outbox.backlog = Vec::new();
            }
            if outbox.backlog.is_empty() {
                outbox.busy = false;
                self.queued.store(false, Ordering::Release);
                return result;
            }
            backlog = std::mem::take(&mut outbox.backlog);
        }
    }

    fn begin(&self) -> Result<Vec<u8>, Hangup> {
        let mut outbox = self.outbox.lock();
        if outbox.dead {
            return Err(Hangup::Closed);
        }
        outbox.busy = true;
        Ok(std::mem::take(&mut outbox.backlog))
    }

    fn send_all(&self, mut bytes: &[u8]) -> Result<(), Hangup> {
        while !bytes.is_empty() {
            match send(&*self.socket, bytes, SendFlags::NOSIGNAL) {
                Ok(count) => bytes = &bytes[count..],
                Err(SystemError::INTR) => {}
                Err(errno) => return Err(Hangup::Io(errno)),
            }
        }
        Ok(())
    }

    /// Sends `bytes` without ever waiting for the client. For the pool's threads.
    pub(super) fn send_without_waiting(&self, mut bytes: &[u8]) {
        let mut outbox = self.outbox.lock();
        if outbox.dead {
            return;
        }
        while !outbox.busy && outbox.backlog.is_empty() && !bytes.is_empty() {
            match send(
                &*self.socket,
                bytes,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(count) => bytes = &bytes[count..],
                Err(SystemError::INTR) => {}
                Err(SystemError::AGAIN) => break,
                Err(_) => {
                    outbox.dead = true;
                    // Ends the own thread's wait; that the socket is gone already is no matter.
                    let _ = shutdown(self.socket.as_fd(), Shutdown::Both);
                    return;
                }
            }
        }
        if !bytes.is_empty() {
            outbox.backlog.extend_from_slice(bytes);
            if !outbox.busy {
                self.queued.store(true, Ordering::Release);
                // A full counter is readable as well, which is all that matters.
                let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
            }
        }
    }
}
