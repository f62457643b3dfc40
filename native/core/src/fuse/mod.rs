//! FUSE front end: each volume is a file, for a loop device where the kernel has neither nbd nor
//! ublk. Speaks the kernel protocol (include/uapi/linux/fuse.h) on a descriptor that a holder
//! process keeps, so that a new server takes over and has the kernel resend what was in flight.
//!
//! Several threads read one descriptor. FUSE_DEV_IOC_CLONE would give each its own queue, but the
//! kernel fails what a clone had in flight when the clone is closed, hence when we are killed.
//!
//! Takeover: a request that a killed server read and did not answer comes again. A write is then
//! perhaps done twice; that is sound, because nobody was told of the first time: until a write is
//! answered no order to another write of the same blocks is promised, and history shows it as two
//! records of equal content. It is why only one server may serve a descriptor (the holder sees to
//! that): a resend under a living one would repeat writes that it is about to answer.
//!
//! Before kernel 6.9 there is no resend: the successor serves new requests, but what was in flight
//! waits until the connection is aborted (`/sys/fs/fuse/connections/N/abort`), which fails it.
//! `resends` says which kernel this is; `attach` prefers nbd there.

mod abi;
mod buffer;
mod files;
pub mod mount;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use crate::device::BlockDevice;
use abi::{Header, Limits, Operation};
use buffer::Buffer;
use files::{Answer, Files, REQUEST_BYTES_MAX};

/// Threads that read and run requests. Each runs one at a time and holds one locked buffer of
/// 1 MiB; more would only help a backing that is fast at more than this depth.
const THREADS: usize = 8;
/// Direct I/O requests that the kernel keeps outstanding; more wait in the kernel.
const MAX_BACKGROUND: u16 = 64;
/// A reader's stack: the deepest call is a device's write.
const STACK_BYTES: usize = 512 << 10;

/// Serves devices as files of a flat directory. Stops when dropped.
#[derive(Debug)]
pub struct FuseServer {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    device: OwnedFd,
    files: Files,
    /// Becomes readable, and stays so, when the readers must end.
    wake: OwnedFd,
    stopping: AtomicBool,
    requests: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    initialized: bool,
    /// None: not known yet.
    resends: Option<bool>,
    /// The file system was unmounted or its connection aborted.
    ended: bool,
}

impl FuseServer {
    /// Takes over an already mounted /dev/fuse descriptor. `resume`: an earlier server had it; asks
    /// the kernel to resend (FUSE_NOTIFY_RESEND) what that one had not answered, INIT included.
    ///
    /// No other server may be reading the descriptor.
    pub fn start(
        descriptor: OwnedFd,
        files: Vec<(String, Arc<dyn BlockDevice>)>,
        resume: bool,
    ) -> io::Result<Self> {
        // Readers must be able to stop without taking a request that they would then owe.
        let flags = fcntl_getfl(&descriptor)?;
        fcntl_setfl(&descriptor, flags | OFlags::NONBLOCK)?;
        let mut state = State {
            initialized: resume,
            ..State::default()
        };
        if resume {
            state.resends = Some(ask_to_resend(&descriptor)?);
        }
        let shared = Arc::new(Shared {
            device: descriptor,
            files: Files::new(files)?,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            stopping: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let server = Self {
            shared,
            threads: Mutex::default(),
        };
        for index in 0..THREADS {
            // What can fail is done here, so that a started thread serves.
            let mut reader = Reader::new(Arc::clone(&server.shared))?;
            let thread = std::thread::Builder::new()
                .name(format!("fuse-{index}"))
                .stack_size(STACK_BYTES)
                .spawn(move || reader.run())?;
            server.threads.lock().push(thread);
        }
        Ok(server)
    }

    /// INIT was answered: by us, or by a predecessor.
    pub fn initialized(&self) -> bool {
        self.shared.state.lock().initialized
    }

    /// Waits until INIT was answered, at most `timeout`; returns whether it was.
    pub fn wait_initialized(&self, timeout: std::time::Duration) -> bool {
        let mut state = self.shared.state.lock();
        let deadline = std::time::Instant::now() + timeout;
        while !state.initialized && !state.ended {
            if self
                .shared
                .changed
                .wait_until(&mut state, deadline)
                .timed_out()
            {
                break;
            }
        }
        state.initialized
    }

    /// Whether this kernel sends a killed server's requests to its successor; None before INIT.
    pub fn resends(&self) -> Option<bool> {
        self.shared.state.lock().resends
    }

    /// The file system was unmounted, or its connection aborted: nothing more will come.
    pub fn ended(&self) -> bool {
        self.shared.state.lock().ended
    }

    /// Requests read so far.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// A duplicate of the descriptor, to give to a new holder.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.shared.device.try_clone()
    }

    /// Answers what was read, reads no more, and returns. What comes now waits in the kernel for a
    /// successor as long as somebody (the holder) keeps the descriptor open.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Cannot fail: the counter is far from its limit. The readers see `stopping` in any case.
        let _ = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            // A reader catches the panics of the devices; it has none of its own to report.
            let _ = thread.join();
        }
    }
}

impl Drop for FuseServer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Sends FUSE_NOTIFY_RESEND. False if the kernel does not know it.
fn ask_to_resend(descriptor: &OwnedFd) -> io::Result<bool> {
    match rustix::io::write(descriptor, &abi::out_header(0, abi::NOTIFY_RESEND, 0)) {
        Ok(_) => Ok(true),
        Err(Errno::INVAL) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// One thread: reads a request, runs it, answers it.
struct Reader {
    shared: Arc<Shared>,
    poll: OwnedFd,
    buffer: Buffer,
}

impl Reader {
    fn new(shared: Arc<Shared>) -> io::Result<Self> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // EXCLUSIVE: one request wakes one reader. The other descriptor wakes all, for good.
        let data = epoll::EventData::new_u64(0);
        let exclusive = epoll::EventFlags::IN | epoll::EventFlags::EXCLUSIVE;
        epoll::add(&poll, &shared.device, data, exclusive)?;
        epoll::add(&poll, &shared.wake, data, epoll::EventFlags::IN)?;
        Ok(Self {
            shared,
            poll,
            buffer: Buffer::new(REQUEST_BYTES_MAX),
        })
    }

    fn run(&mut self) {
        while !self.shared.stopping.load(Ordering::SeqCst) {
            match rustix::io::read(&self.shared.device, self.buffer.whole()) {
                Ok(length) => {
                    self.shared.requests.fetch_add(1, Ordering::Relaxed);
                    self.serve(length);
                }
                Err(Errno::AGAIN) => self.wait(),
                // NOENT: the request was withdrawn while it was copied.
                Err(Errno::INTR | Errno::NOENT) => {}
                // NODEV: unmounted. Anything else: the connection is of no more use.
                Err(_) => {
                    self.shared.state.lock().ended = true;
                    self.shared.changed.notify_all();
                    return;
                }
            }
        }
    }

    fn wait(&self) {
        let mut events = Vec::with_capacity(2);
        // An error here (INTR) only means another attempt to read.
        let _ = epoll::wait(
            &self.poll,
            rustix::buffer::spare_capacity(&mut events),
            None,
        );
    }

    fn serve(&mut self, length: usize) {
        let Some(header) = abi::parse_header(self.buffer.message(length)) else {
            // Without a header there is nobody to answer. The kernel does not send such.
            return;
        };
        let answer = match abi::parse_operation(&header, self.buffer.message(length)) {
            Ok(Operation::Init {
                major,
                minor,
                readahead,
                flags,
            }) => self.init(major, minor, readahead, flags),
            Ok(operation) => {
                // A panic in a device must not leave its request unanswered for ever.
                let data = self.buffer.data();
                let run = || self.shared.files.run(header.node, &operation, data);
                catch_unwind(AssertUnwindSafe(run)).unwrap_or(Answer::Error(libc::EIO))
            }
            Err(code) => Answer::Error(code),
        };
        self.answer(&header, answer);
    }

    fn init(&self, major: u32, minor: u32, readahead: u32, flags: u64) -> Answer {
        if major < abi::MAJOR || (major == abi::MAJOR && minor < abi::MINOR_MIN) {
            return Answer::Error(libc::EPROTO);
        }
        let max_write = u32::try_from(REQUEST_BYTES_MAX).expect("invariant: 1 MiB");
        let limits = Limits {
            max_write,
            max_background: MAX_BACKGROUND,
        };
        let (body, flags) = abi::init_out(minor, readahead, flags, limits);
        // A newer major number: the kernel reads ours from the answer and sends INIT again.
        if major == abi::MAJOR {
            let mut state = self.shared.state.lock();
            state.initialized = true;
            state.resends = Some(flags & abi::FUSE_HAS_RESEND != 0);
            self.shared.changed.notify_all();
        }
        Answer::Body(body)
    }

    fn answer(&mut self, header: &Header, answer: Answer) {
        let message = match answer {
            Answer::None => return,
            Answer::Error(code) => {
                // The kernel takes no errno beyond 511 (and would then keep the request).
                let code = if (1..512).contains(&code) {
                    code
                } else {
                    libc::EIO
                };
                self.buffer
                    .answer(abi::out_header(0, -code, header.unique), 0)
            }
            Answer::Body(body) => {
                self.buffer.data()[..body.len()].copy_from_slice(&body);
                self.buffer
                    .answer(abi::out_header(body.len(), 0, header.unique), body.len())
            }
            Answer::Data(length) => self
                .buffer
                .answer(abi::out_header(length, 0, header.unique), length),
        };
        // An error has nobody to go to. NOENT: the request was withdrawn. NODEV: unmounted, which
        // the next read sees too. A body of a wrong length: the kernel has failed the request.
        let _ = rustix::io::write(self.shared.device.as_fd(), message);
    }
}
