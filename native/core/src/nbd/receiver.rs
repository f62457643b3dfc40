//! Receive buffer of a connection: one read brings many requests, which are parsed in place.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::connection::Hangup;

/// Bytes between `head` and `tail` have arrived and wait to be consumed.
#[derive(Debug)]
pub(super) struct Receiver {
    buffer: Vec<u8>,
    head: usize,
    tail: usize,
}

impl Receiver {
    /// Room that a read finds at least, so that it is worth its system call.
    const READ_MIN: usize = 64 * 1024;

    pub(super) fn new(capacity: usize) -> Self {
        assert!(capacity > Self::READ_MIN);
        Self {
            buffer: vec![0; capacity],
            head: 0,
            tail: 0,
        }
    }

    pub(super) fn data(&self) -> &[u8] {
        &self.buffer[self.head..self.tail]
    }

    pub(super) fn consume(&mut self, count: usize) {
        assert!(count <= self.tail - self.head);
        self.head += count;
        if self.head == self.tail {
            self.head = 0;
            self.tail = 0;
        }
    }

    /// Waits for more bytes of a message of `whole` bytes that begins at the head.
    pub(super) fn fill(&mut self, socket: BorrowedFd<'_>, whole: usize) -> Result<(), Hangup> {
        assert!(whole <= self.buffer.len());
        let end = self.buffer.len();
        if self.head > 0 && (end - self.head < whole || end - self.tail < Self::READ_MIN) {
            self.buffer.copy_within(self.head..self.tail, 0);
            self.tail -= self.head;
            self.head = 0;
        }
        let room = &mut self.buffer[self.tail..];
        assert!(
            !room.is_empty(),
            "invariant: a message that fits is not yet complete"
        );
        let count = receive(socket, room, RecvFlags::empty())?;
        self.tail += count;
        Ok(())
    }

    /// Makes `whole` bytes available before `deadline`.
    pub(super) fn fill_until(
        &mut self,
        socket: BorrowedFd<'_>,
        whole: usize,
        deadline: Instant,
    ) -> Result<(), Hangup> {
        while self.data().len() < whole {
            wait_until(socket, PollFlags::IN, deadline)?;
            self.fill(socket, whole)?;
        }
        Ok(())
    }

    /// Moves the next `target.len()` bytes of the stream into `target`: what is here already, then
    /// straight from the socket.
    pub(super) fn read_exact(
        &mut self,
        socket: BorrowedFd<'_>,
        target: &mut [u8],
    ) -> Result<(), Hangup> {
        let here = target.len().min(self.tail - self.head);
        target[..here].copy_from_slice(&self.buffer[self.head..self.head + here]);
        self.consume(here);
        let mut done = here;
        while done < target.len() {
            done += receive(socket, &mut target[done..], RecvFlags::WAITALL)?;
        }
        Ok(())
    }
}

fn receive(socket: BorrowedFd<'_>, room: &mut [u8], flags: RecvFlags) -> Result<usize, Hangup> {
    loop {
        match recv(socket, &mut *room, flags) {
            Ok((0, _)) => return Err(Hangup::Closed),
            Ok((count, _)) => return Ok(count),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Hangup::Io(errno)),
        }
    }
}

/// Sends everything before `deadline`; for the handshake, where a client may read nothing.
pub(super) fn send_until(
    socket: BorrowedFd<'_>,
    mut bytes: &[u8],
    deadline: Instant,
) -> Result<(), Hangup> {
    while !bytes.is_empty() {
        match send(socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_until(socket, PollFlags::OUT, deadline)?,
            Err(errno) => return Err(Hangup::Io(errno)),
        }
    }
    Ok(())
}

fn wait_until(socket: BorrowedFd<'_>, event: PollFlags, deadline: Instant) -> Result<(), Hangup> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|_| Hangup::Timeout)?;
        match poll(
            &mut [PollFd::from_borrowed_fd(socket.as_fd(), event)],
            Some(&timeout),
        ) {
            Ok(0) => return Err(Hangup::Timeout),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Hangup::Io(errno)),
        }
    }
}
