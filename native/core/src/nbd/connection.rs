//! One client: its thread parses what arrived, runs it, and answers a batch with one send.
//!
//! Memory of a connection: receive buffer, reply buffer, one large read or write, and what
//! `Admission` lets wait in the pool.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, poll};

use super::options::Terms;
use super::pool::{Job, Pool};
use super::receiver::Receiver;
use super::reply::{Replies, Writer};
use super::transmission::{Command, Request, check, execute, reply_len_max};
use super::wire::{self, Errno, RequestHeader};
use crate::constants::NBD_PAYLOAD_MAX;

/// Holds what a socket brings at once, and any write that is parsed in place.
pub(super) const RECEIVE_LEN: usize = 512 * 1024;
/// A longer write is read into a buffer of its own instead of being moved about in this one.
const IN_PLACE_MAX: usize = RECEIVE_LEN / 2;
/// Replies gathered for one send; a longer one is sent alone.
const REPLIES_LEN: usize = 256 * 1024;
/// Requests of one connection in the pool.
const DEFERRED_MAX: usize = 64;
/// Payload bytes, in or out, of one connection's requests in the pool: one largest request.
const DEFERRED_BYTES_MAX: usize = NBD_PAYLOAD_MAX + 64 * 1024;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Hangup {
    #[error("the connection was closed")]
    Closed,
    #[error("the client took too long")]
    Timeout,
    #[error("the client broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("the socket failed: {0}")]
    Io(rustix::io::Errno),
}

/// What the connection's thread shares with the pool's.
#[derive(Debug)]
pub(super) struct Channel {
    terms: Terms,
    writer: Writer,
    /// Mirror of `deferred.count`, read on every wait for input.
    deferred_count: AtomicUsize,
    deferred: Mutex<Deferred>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Deferred {
    count: usize,
    bytes: usize,
}

impl Channel {
    pub(super) fn terms(&self) -> &Terms {
        &self.terms
    }

    pub(super) fn writer(&self) -> &Writer {
        &self.writer
    }

    /// Leave for a request of `bytes` payload to wait in the pool; None: the limit is reached.
    fn admit(self: &Arc<Self>, bytes: usize) -> Option<Admission> {
        let mut deferred = self.deferred.lock();
        if deferred.count == DEFERRED_MAX || deferred.bytes + bytes > DEFERRED_BYTES_MAX {
            return None;
        }
        deferred.count += 1;
        deferred.bytes += bytes;
        self.deferred_count.store(deferred.count, Ordering::Release);
        Some(Admission {
            channel: Arc::clone(self),
            bytes,
        })
    }

    /// The pool has requests of this connection, or left replies behind.
    fn has_company(&self) -> bool {
        // In this order: a pool thread queues its reply before it gives its admission back.
        self.deferred_count.load(Ordering::Acquire) > 0 || self.writer.queued()
    }

    /// Waits until the pool has answered everything and all of it is sent.
    fn drain(&self) -> Result<(), Hangup> {
        loop {
            let mut deferred = self.deferred.lock();
            let last = deferred.count == 0;
            if !last && !self.writer.queued() {
                self.changed.wait(&mut deferred);
            }
            drop(deferred);
            let sent = self.writer.send(&[]);
            if last {
                return sent;
            }
        }
    }
}

/// Leave of one request to wait in the pool; ends when dropped.
#[derive(Debug)]
pub(super) struct Admission {
    channel: Arc<Channel>,
    bytes: usize,
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut deferred = self.channel.deferred.lock();
        deferred.count -= 1;
        deferred.bytes -= self.bytes;
        self.channel
            .deferred_count
            .store(deferred.count, Ordering::Release);
        self.channel.changed.notify_all();
    }
}

/// The connection's own side.
#[derive(Debug)]
pub(super) struct Connection<'a> {
    socket: BorrowedFd<'a>,
    channel: Arc<Channel>,
    pool: &'a Pool,
    stopping: &'a AtomicBool,
    input: Receiver,
    replies: Replies,
}

/// What is to be done with the bytes at the head of the receive buffer.
enum Next {
    /// A message of this many bytes is not complete.
    Wait(usize),
    Request(RequestHeader),
}

impl<'a> Connection<'a> {
    pub(super) fn new(
        socket: &'a Arc<OwnedFd>,
        input: Receiver,
        terms: Terms,
        pool: &'a Pool,
        stopping: &'a AtomicBool,
    ) -> Result<Self, Hangup> {
        let channel = Channel {
            terms,
            writer: Writer::new(Arc::clone(socket))?,
            deferred_count: AtomicUsize::new(0),
            deferred: Mutex::default(),
            changed: Condvar::new(),
        };
        Ok(Self {
            socket: socket.as_fd(),
            channel: Arc::new(channel),
            pool,
            stopping,
            input,
            replies: Replies::over(vec![0; REPLIES_LEN]),
        })
    }

    /// Serves requests until the client goes; all that was begun is finished.
    pub(super) fn serve(mut self) -> Hangup {
        let reason = match self.transmit() {
            Ok(()) => Hangup::Closed,
            Err(hangup) => hangup,
        };
        // A client may have closed only its sending side and wait for answers.
        let _ = self.flush().and_then(|()| self.channel.drain());
        self.wait_for_pool();
        reason
    }

    /// After a failed send, `drain` gives up early; what runs still uses the device.
    fn wait_for_pool(&self) {
        let mut deferred = self.channel.deferred.lock();
        while deferred.count > 0 {
            self.channel.changed.wait(&mut deferred);
        }
    }

    fn transmit(&mut self) -> Result<(), Hangup> {
        loop {
            match self.next()? {
                Next::Wait(whole) => {
                    self.flush()?;
                    if self.stopping.load(Ordering::Acquire) {
                        return Ok(());
                    }
                    self.wait_for_input()?;
                    self.input.fill(self.socket, whole)?;
                }
                Next::Request(header) => {
                    // A client that knows simple replies only is most likely the kernel. It hands
                    // an error on to the file system above, but what was not answered it sends
                    // again to the next server.
                    let patient = !self.channel.terms.structured;
                    if patient && self.stopping.load(Ordering::Acquire) {
                        return self.flush();
                    }
                    if header.command == wire::CMD_DISC {
                        return Ok(());
                    }
                    self.handle(&header)?;
                }
            }
        }
    }

    fn next(&self) -> Result<Next, Hangup> {
        let data = self.input.data();
        let Some(bytes) = data.first_chunk() else {
            return Ok(Next::Wait(wire::REQUEST_LEN));
        };
        let header =
            RequestHeader::parse(bytes).ok_or(Hangup::Protocol("wrong magic before a request"))?;
        let payload = header.payload_len();
        if payload > NBD_PAYLOAD_MAX {
            return Err(Hangup::Protocol("a write longer than the largest payload"));
        }
        if payload <= IN_PLACE_MAX && data.len() < wire::REQUEST_LEN + payload {
            return Ok(Next::Wait(wire::REQUEST_LEN + payload));
        }
        Ok(Next::Request(header))
    }

    /// Runs the request at the head of the buffer, whose payload is there unless it is large.
    fn handle(&mut self, header: &RequestHeader) -> Result<(), Hangup> {
        let mut verdict = check(header, &self.channel.terms);
        // Not to a patient client, if the stop has come just now: the device still works.
        if self.channel.terms.structured && self.stopping.load(Ordering::Relaxed) {
            verdict = Err(Errno::Shutdown);
        }
        let payload = header.payload_len();
        if payload > IN_PLACE_MAX {
            self.flush()?;
            self.input.consume(wire::REQUEST_LEN);
            return self.large_write(header, verdict);
        }
        let whole = wire::REQUEST_LEN + payload;
        let outcome = match verdict {
            Ok(request) => self.run_in_place(&request),
            Err(errno) => self.refuse(header.cookie, errno),
        };
        self.input.consume(whole);
        outcome
    }

    fn refuse(&mut self, cookie: u64, errno: Errno) -> Result<(), Hangup> {
        self.make_room(Replies::ERROR_LEN_MAX)?;
        self.replies
            .error(self.channel.terms.structured, cookie, errno);
        Ok(())
    }

    fn run_in_place(&mut self, request: &Request) -> Result<(), Hangup> {
        let reply_len = reply_len_max(request, &self.channel.terms);
        if reply_len > self.replies.capacity() {
            return self.large_read(request, reply_len);
        }
        self.make_room(reply_len)?;
        let length = if request.command == Command::Write {
            request.length as usize
        } else {
            0
        };
        let payload = &self.input.data()[wire::REQUEST_LEN..][..length];
        let terms = &self.channel.terms;
        if execute(request, payload, terms, true, &mut self.replies).is_ok() {
            return Ok(());
        }
        if let Some(admission) = self.channel.admit(length.max(reply_len)) {
            let payload = (length > 0).then(|| {
                let mut copy = self.pool.take_buffer(length);
                copy[..length].copy_from_slice(payload);
                copy
            });
            let channel = Arc::clone(&self.channel);
            self.pool.submit(Job {
                channel,
                request: *request,
                payload,
                admission,
            });
            return Ok(());
        }
        // The pool has its share of this connection: wait here, which slows the client.
        self.flush()?;
        let payload = &self.input.data()[wire::REQUEST_LEN..][..length];
        run_waiting(request, payload, &self.channel.terms, &mut self.replies);
        Ok(())
    }

    fn large_read(&mut self, request: &Request, reply_len: usize) -> Result<(), Hangup> {
        self.flush()?;
        let terms = &self.channel.terms;
        let mut replies = Replies::over(self.pool.take_buffer(reply_len));
        if execute(request, &[], terms, true, &mut replies).is_err() {
            if let Some(admission) = self.channel.admit(reply_len) {
                self.pool.give_buffer(replies.into_bytes());
                let channel = Arc::clone(&self.channel);
                self.pool.submit(Job {
                    channel,
                    request: *request,
                    payload: None,
                    admission,
                });
                return Ok(());
            }
            run_waiting(request, &[], terms, &mut replies);
        }
        let sent = self.channel.writer.send(replies.as_slice());
        self.pool.give_buffer(replies.into_bytes());
        sent
    }

    fn large_write(
        &mut self,
        header: &RequestHeader,
        verdict: Result<Request, Errno>,
    ) -> Result<(), Hangup> {
        let length = header.payload_len();
        let mut payload = self.pool.take_buffer(length);
        self.input.read_exact(self.socket, &mut payload[..length])?;
        let request = match verdict {
            Ok(request) => request,
            Err(errno) => {
                self.pool.give_buffer(payload);
                return self.refuse(header.cookie, errno);
            }
        };
        self.make_room(Replies::ERROR_LEN_MAX)?;
        let terms = &self.channel.terms;
        if execute(&request, &payload[..length], terms, true, &mut self.replies).is_err() {
            if let Some(admission) = self.channel.admit(length) {
                let channel = Arc::clone(&self.channel);
                self.pool.submit(Job {
                    channel,
                    request,
                    payload: Some(payload),
                    admission,
                });
                return Ok(());
            }
            run_waiting(&request, &payload[..length], terms, &mut self.replies);
        }
        self.pool.give_buffer(payload);
        Ok(())
    }

    fn make_room(&mut self, length: usize) -> Result<(), Hangup> {
        if self.replies.room() < length {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Hangup> {
        if self.replies.as_slice().is_empty() {
            return Ok(());
        }
        let sent = self.channel.writer.send(self.replies.as_slice());
        self.replies.clear();
        sent
    }

    /// While the pool works for this connection, its leftover replies are to be sent as well.
    fn wait_for_input(&self) -> Result<(), Hangup> {
        while self.channel.has_company() {
            if self.channel.writer.queued() {
                self.channel.writer.send(&[])?;
            }
            let wake = self.channel.writer.wake_fd();
            let mut events = [
                PollFd::new(&self.socket, PollFlags::IN),
                PollFd::new(wake, PollFlags::IN),
            ];
            match poll(&mut events, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(Hangup::Io(errno)),
            }
            if !events[1].revents().is_empty() {
                // Resets the counter; that there was nothing left is fine.
                let _ = rustix::io::read(wake, &mut [0; 8]);
            }
            if !events[0].revents().is_empty() {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Runs a request on a thread that may wait.
fn run_waiting(request: &Request, payload: &[u8], terms: &Terms, replies: &mut Replies) {
    let done = execute(request, payload, terms, false, replies);
    assert!(
        done.is_ok(),
        "invariant: only a request that must not wait can decline"
    );
}
