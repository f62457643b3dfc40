//! What all three servers share: signals, the wish to end, the report on standard output.

#![allow(unsafe_code)]

use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::failure::{ExitCode, Failure};
use super::proto::Response;
use super::proto::response::Result as Outcome;
use super::wire;

/// A wish to end the process, settable from any thread.
#[derive(Debug, Clone)]
pub struct Exit(Arc<OwnedFd>);

impl Exit {
    pub fn new() -> Result<Self, Failure> {
        let descriptor = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Failure::io("make an event descriptor", &error.into()))?;
        Ok(Self(Arc::new(descriptor)))
    }

    pub fn request(&self) {
        // The counter cannot overflow: it counts wishes to end.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }
}

/// SIGTERM and SIGINT as a readable descriptor.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks the signals in this thread and those that it starts from now on.
    pub fn block() -> Result<Self, Failure> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initializes the set; the other calls only read it. A null old-set
        // pointer is allowed, and signalfd gives a new descriptor, which we own.
        let descriptor = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
            libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if descriptor < 0 {
            return Err(Failure::io(
                "receive signals",
                &std::io::Error::last_os_error(),
            ));
        }
        // SAFETY: just made, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    }

    /// Returns when a signal came or the process is wished to end.
    pub fn wait(&self, exit: &Exit) {
        loop {
            let mut wanted = [
                PollFd::new(&self.0, PollFlags::IN),
                PollFd::new(&*exit.0, PollFlags::IN),
            ];
            // An interrupted poll leaves no events and is repeated.
            if poll(&mut wanted, None).is_ok() {
                return;
            }
        }
    }
}

/// Writes the first and only response on standard output, and closes that: the launcher sees the
/// end, and a reader that is gone cannot disturb us later.
pub fn report_ready(outcome: Outcome) {
    let response = Response {
        id: 0,
        result: Some(outcome),
    };
    let bytes = wire::frame(&response).expect("invariant: a status is below 1 MiB");
    let mut out = std::io::stdout().lock();
    // A launcher that does not listen is its own affair: the control socket serves others.
    let _ = out.write_all(&bytes).and_then(|()| out.flush());
    if let Ok(null) = std::fs::OpenOptions::new().write(true).open("/dev/null") {
        // SAFETY: dup2 replaces our standard output by /dev/null; both descriptors are ours.
        unsafe { libc::dup2(null.as_raw_fd(), libc::STDOUT_FILENO) };
    }
}

/// Turns how a server ended into its exit code. A failure goes out as the response: before the
/// server was ready there was none, and afterwards nobody reads.
pub fn finish(result: Result<(), Failure>) -> i32 {
    match result {
        Ok(()) => i32::from(ExitCode::Ok as u8),
        Err(failure) => {
            let code = failure.exit;
            // Standard error is the process's log.
            eprintln!(
                "{}: {} (hint: {})",
                failure.code, failure.message, failure.hint
            );
            report_ready(Outcome::Failure(failure.into()));
            i32::from(code as u8)
        }
    }
}
