//! Threads for requests that would wait. They answer themselves and never wait for a client.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use super::connection::{Admission, Channel};
use super::reply::Replies;
use super::transmission::{Request, execute, reply_len_max};
use crate::constants::NBD_PAYLOAD_MAX;

/// Lengths of buffers, and how many of each are kept while nobody uses them: a fresh large buffer
/// costs a page fault for every 4 KiB. The last holds the largest request and its header.
const BUFFER_CLASSES: [(usize, usize); 3] =
    [(256 << 10, 32), (2 << 20, 4), (NBD_PAYLOAD_MAX + 4096, 1)];
/// Buffers made ahead, so that the first requests under memory pressure find some.
const BUFFERS_AHEAD: usize = 8;

/// A request on its way to a thread that may wait.
#[derive(Debug)]
pub(super) struct Job {
    pub channel: Arc<Channel>,
    pub request: Request,
    /// At least as long as a write's length.
    pub payload: Option<Vec<u8>>,
    /// Given back when the job is dropped, whatever became of it.
    pub admission: Admission,
}

#[derive(Debug, Default)]
struct Queue {
    /// Bounded by the connections' admissions.
    jobs: VecDeque<Job>,
    closed: bool,
}

/// Shared by a server's connections.
#[derive(Debug)]
pub(super) struct Pool {
    queue: Mutex<Queue>,
    ready: Condvar,
    buffers: [Mutex<Vec<Vec<u8>>>; BUFFER_CLASSES.len()],
    threads: Mutex<Vec<JoinHandle<()>>>,
    threads_wanted: usize,
}

impl Pool {
    pub(super) fn new(threads: usize) -> Self {
        assert!(threads > 0);
        let pool = Self {
            queue: Mutex::new(Queue {
                jobs: VecDeque::with_capacity(1024),
                closed: false,
            }),
            ready: Condvar::new(),
            buffers: BUFFER_CLASSES.map(|(_, kept)| Mutex::new(Vec::with_capacity(kept))),
            threads: Mutex::default(),
            threads_wanted: threads,
        };
        for _ in 0..BUFFERS_AHEAD {
            pool.give_buffer(vec![0; BUFFER_CLASSES[0].0]);
        }
        pool
    }

    /// Starts the threads, once.
    pub(super) fn start(self: &Arc<Self>) -> std::io::Result<()> {
        let mut threads = self.threads.lock();
        while threads.len() < self.threads_wanted {
            let pool = Arc::clone(self);
            let name = format!("nbd-pool-{}", threads.len());
            threads.push(
                std::thread::Builder::new()
                    .name(name)
                    .spawn(move || pool.work())?,
            );
        }
        Ok(())
    }

    pub(super) fn submit(&self, job: Job) {
        self.queue.lock().jobs.push_back(job);
        self.ready.notify_one();
    }

    /// Lets the threads end when the queue is empty, and waits for them.
    pub(super) fn stop(&self) {
        self.queue.lock().closed = true;
        self.ready.notify_all();
        for thread in std::mem::take(&mut *self.threads.lock()) {
            // A panic of a device was reported by its thread already.
            let _ = thread.join();
        }
    }

    /// A buffer of at least `length` bytes with any content.
    pub(super) fn take_buffer(&self, length: usize) -> Vec<u8> {
        let class = BUFFER_CLASSES.iter().position(|(size, _)| length <= *size);
        let class = class.expect("invariant: requests are limited");
        let kept = self.buffers[class].lock().pop();
        kept.unwrap_or_else(|| vec![0; BUFFER_CLASSES[class].0])
    }

    pub(super) fn give_buffer(&self, buffer: Vec<u8>) {
        let class = BUFFER_CLASSES
            .iter()
            .position(|(size, _)| buffer.len() == *size);
        let class = class.expect("invariant: it was taken here");
        let mut buffers = self.buffers[class].lock();
        if buffers.len() < BUFFER_CLASSES[class].1 {
            buffers.push(buffer);
        }
    }

    fn next(&self) -> Option<Job> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            self.ready.wait(&mut queue);
        }
    }

    fn work(&self) {
        while let Some(job) = self.next() {
            let terms = job.channel.terms();
            let buffer = self.take_buffer(reply_len_max(&job.request, terms));
            let mut replies = Replies::over(buffer);
            let payload = job.payload.as_deref().unwrap_or_default();
            let payload = &payload[..payload.len().min(job.request.length as usize)];
            if execute(&job.request, payload, terms, false, &mut replies).is_ok() {
                job.channel
                    .writer()
                    .send_without_waiting(replies.as_slice());
            }
            self.give_buffer(replies.into_bytes());
            if let Some(payload) = job.payload {
                self.give_buffer(payload);
            }
            drop(job.admission);
        }
    }
}
