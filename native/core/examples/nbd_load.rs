//! A load generator for NBD servers that writes recorded pages, which fio cannot.
//!
//! Usage: `nbd_load SOCKET EXPORT --rw randwrite|randread|write|read --block BYTES --depth N
//! --size BYTES (--seconds S | --count N) [--warmup S] [--pages FILE] [--rate PER_SECOND]
//! [--seed N] [--answers FILE]`. Prints one JSON object.
//!
//! Each 4 KiB of a write is the next page of FILE with its first eight bytes replaced by a counter,
//! as a database's log position would be, so that no two writes are the same. One thread keeps
//! `depth` requests under way. With `--rate`, requests start on a clock and not when there is room,
//! and latency counts from when they were due.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::{Duration, Instant};

type Failure = Box<dyn std::error::Error>;

const PAGE: usize = 4096;

#[derive(Debug, Default)]
struct Options {
    socket: String,
    export: String,
    rw: String,
    block: usize,
    depth: usize,
    size: u64,
    seconds: f64,
    count: u64,
    warmup: f64,
    pages: String,
    rate: f64,
    seed: u64,
    answers: String,
}

impl Options {
    fn parse() -> Result<Self, Failure> {
        let mut arguments = std::env::args().skip(1);
        let mut options = Self {
            socket: arguments.next().ok_or("which socket?")?,
            export: arguments.next().ok_or("which export?")?,
            block: PAGE,
            depth: 1,
            seed: 1,
            ..Self::default()
        };
        while let Some(name) = arguments.next() {
            let value = arguments.next().ok_or(format!("{name} needs a value"))?;
            match name.as_str() {
                "--rw" => options.rw = value,
                "--block" => options.block = value.parse()?,
                "--depth" => options.depth = value.parse()?,
                "--size" => options.size = value.parse()?,
                "--seconds" => options.seconds = value.parse()?,
                "--count" => options.count = value.parse()?,
                "--warmup" => options.warmup = value.parse()?,
                "--pages" => options.pages = value,
                "--rate" => options.rate = value.parse()?,
                "--seed" => options.seed = value.parse()?,
                "--answers" => options.answers = value,
                _ => return Err(format!("unknown argument {name}").into()),
            }
        }
        let known = ["randwrite", "randread", "write", "read"].contains(&options.rw.as_str());
        if !known || options.block == 0 || options.depth == 0 {
            return Err("--rw, --block and --depth must make sense".into());
        }
        if options.seconds <= 0.0 && options.count == 0 {
            return Err("either --seconds or --count is needed".into());
        }
        Ok(options)
    }
}

/// Sebastiano Vigna's splitmix64: good enough to spread offsets.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

/// Connects up to transmission; returns the export's size.
fn connect(socket: &str, export: &str) -> Result<(UnixStream, u64), Failure> {
    let mut stream = UnixStream::connect(socket)?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    let mut hello = 3u32.to_be_bytes().to_vec();
    hello.extend_from_slice(b"IHAVEOPT");
    hello.extend_from_slice(&7u32.to_be_bytes());
    let name_len = u32::try_from(export.len())?;
    hello.extend_from_slice(&(name_len + 6).to_be_bytes());
    hello.extend_from_slice(&name_len.to_be_bytes());
    hello.extend_from_slice(export.as_bytes());
    hello.extend_from_slice(&[0, 0]);
    stream.write_all(&hello)?;
    let mut size = 0;
    loop {
        let mut header = [0; 20];
        stream.read_exact(&mut header)?;
        let kind = u32::from_be_bytes(header[12..16].try_into()?);
        let mut body = vec![0; u32::from_be_bytes(header[16..20].try_into()?) as usize];
        stream.read_exact(&mut body)?;
        match kind {
            1 => return Ok((stream, size)),
            3 if body[..2] == [0, 0] => size = u64::from_be_bytes(body[2..10].try_into()?),
            kind if kind >> 31 == 1 => {
                return Err(format!("refused: {}", String::from_utf8_lossy(&body)).into());
            }
            _ => {}
        }
    }
}

/// One request under way, by cookie.
#[derive(Clone, Copy)]
struct Slot {
    begun: Instant,
    counted: bool,
}

struct Load {
    options: Options,
    stream: UnixStream,
    write: bool,
    /// Blocks that requests may address.
    blocks: u64,
    pages: Vec<u8>,
    next_page: usize,
    stamp: u64,
    next_block: u64,
    random: Random,
    out: Vec<u8>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    input: Vec<u8>,
    head: usize,
    tail: usize,
}

impl Load {
    fn new(options: Options) -> Result<Self, Failure> {
        let (stream, export_size) = connect(&options.socket, &options.export)?;
        let size = if options.size == 0 {
            export_size
        } else {
            options.size.min(export_size)
        };
        let mut pages = Vec::new();
        if options.pages.is_empty() {
            pages.resize(PAGE, 0x5a);
        } else {
            File::open(&options.pages)?.read_to_end(&mut pages)?;
            pages.truncate(pages.len() / PAGE * PAGE);
        }
        if pages.is_empty() {
            return Err("no pages".into());
        }
        let write = options.rw.ends_with("write");
        let reply_len = 16 + if write { 0 } else { options.block };
        Ok(Self {
            write,
            blocks: size / options.block as u64,
            pages,
            next_page: 0,
            stamp: options.seed << 40,
            next_block: 0,
            random: Random(options.seed),
            out: Vec::with_capacity(options.depth * (28 + options.block)),
            slots: vec![
                Slot {
                    begun: Instant::now(),
                    counted: false
                };
                options.depth
            ],
            free: (0..options.depth).collect(),
            input: vec![0; (options.depth * reply_len).clamp(64 << 10, 4 << 20)],
            head: 0,
            tail: 0,
            stream,
            options,
        })
    }

    /// Adds a request to the send buffer.
    fn issue(&mut self, begun: Instant, counted: bool) {
        let cookie = self.free.pop().expect("the caller saw a free slot");
        self.slots[cookie] = Slot { begun, counted };
        let block = if self.options.rw.starts_with("rand") {
            self.random.below(self.blocks)
        } else {
            self.next_block = (self.next_block + 1) % self.blocks;
            self.next_block
        };
        let offset = block * self.options.block as u64;
        let length = u32::try_from(self.options.block).expect("a block is short");
        self.out.extend_from_slice(&0x2560_9513u32.to_be_bytes());
        self.out.extend_from_slice(&[0, 0, 0, u8::from(self.write)]);
        self.out.extend_from_slice(&(cookie as u64).to_be_bytes());
        self.out.extend_from_slice(&offset.to_be_bytes());
        self.out.extend_from_slice(&length.to_be_bytes());
        if self.write {
            let mut left = self.options.block;
            while left > 0 {
                let part = left.min(PAGE);
                let page = &self.pages[self.next_page..self.next_page + part];
                let start = self.out.len();
                self.out.extend_from_slice(page);
                self.stamp += 1;
                let stamp = self.stamp.to_be_bytes();
                let stamped = part.min(stamp.len());
                self.out[start..start + stamped].copy_from_slice(&stamp[..stamped]);
                self.next_page = (self.next_page + PAGE) % self.pages.len();
                left -= part;
            }
        }
    }

    /// Waits for replies; calls `each` for every one.
    fn collect(&mut self, mut each: impl FnMut(Slot, Instant)) -> Result<(), Failure> {
        let body = if self.write { 0 } else { self.options.block };
        if self.head == self.tail {
            (self.head, self.tail) = (0, 0);
        } else if self.input.len() - self.head < 16 + body || self.tail == self.input.len() {
            self.input.copy_within(self.head..self.tail, 0);
            (self.head, self.tail) = (0, self.tail - self.head);
        }
        let count = self.stream.read(&mut self.input[self.tail..])?;
        if count == 0 {
            return Err("the server closed the connection".into());
        }
        self.tail += count;
        let now = Instant::now();
        while self.tail - self.head >= 16 + body {
            let reply = &self.input[self.head..self.head + 16];
            if reply[..8] != [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0] {
                return Err(format!("an error reply: {reply:x?}").into());
            }
            let cookie = usize::try_from(u64::from_be_bytes(reply[8..].try_into()?))?;
            self.head += 16 + body;
            self.free.push(cookie);
            each(*self.slots.get(cookie).ok_or("an unknown cookie")?, now);
        }
        Ok(())
    }

    fn send(&mut self) -> Result<(), Failure> {
        self.stream.write_all(&self.out)?;
        self.out.clear();
        Ok(())
    }

    fn run(&mut self) -> Result<(), Failure> {
        let started = Instant::now();
        let counting = started + Duration::from_secs_f64(self.options.warmup);
        let end = (self.options.seconds > 0.0)
            .then(|| counting + Duration::from_secs_f64(self.options.seconds));
        let limit = if self.options.count > 0 {
            self.options.count
        } else {
            u64::MAX
        };
        let mut answers = if self.options.answers.is_empty() {
            None
        } else {
            Some(BufWriter::new(File::create(&self.options.answers)?))
        };
        let mut latencies: Vec<u32> = Vec::with_capacity(4 << 20);
        let mut issued = 0u64;
        let mut last = started;
        loop {
            let now = Instant::now();
            let over = issued >= limit || end.is_some_and(|end| now >= end);
            while !over && !self.free.is_empty() && issued < limit {
                let mut due = now;
                if self.options.rate > 0.0 {
                    #[expect(clippy::cast_precision_loss, reason = "counts below 2^52")]
                    let after = Duration::from_secs_f64(issued as f64 / self.options.rate);
                    due = started + after;
                    if due > now {
                        break;
                    }
                }
                self.issue(due, due >= counting);
                issued += 1;
            }
            if self.free.len() == self.options.depth && self.out.is_empty() {
                if over {
                    break;
                }
                // Only a rate leaves a gap; its clock is finer than a sleep's slack would allow.
                std::thread::sleep(Duration::from_micros(20));
                continue;
            }
            self.send()?;
            let mut written = Ok(());
            self.collect(|slot, now| {
                last = now;
                if slot.counted {
                    let ns = now.duration_since(slot.begun).as_nanos();
                    latencies.push(u32::try_from(ns).unwrap_or(u32::MAX));
                }
                if let Some(file) = &mut answers {
                    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
                    let ns = time.tv_sec * 1_000_000_000 + time.tv_nsec;
                    written = file.write_all(&ns.to_le_bytes());
                }
            })?;
            written?;
        }
        if let Some(file) = &mut answers {
            file.flush()?;
        }
        self.report(latencies, last.duration_since(counting.min(last)), issued);
        Ok(())
    }

    fn report(&self, mut latencies: Vec<u32>, elapsed: Duration, issued: u64) {
        latencies.sort_unstable();
        let at = |percent: usize| {
            let index = (latencies.len() * percent / 100).min(latencies.len().saturating_sub(1));
            f64::from(latencies.get(index).copied().unwrap_or(0)) / 1000.0
        };
        let seconds = elapsed.as_secs_f64().max(1e-9);
        #[expect(clippy::cast_precision_loss, reason = "counts below 2^52")]
        let iops = latencies.len() as f64 / seconds;
        println!(
            "{{\"ops\": {}, \"issued\": {issued}, \"seconds\": {seconds:.6}, \"iops\": {iops:.1}, \
             \"block\": {}, \"p50_us\": {:.1}, \"p99_us\": {:.1}}}",
            latencies.len(),
            self.options.block,
            at(50),
            at(99),
        );
    }
}

fn main() -> ExitCode {
    match Options::parse()
        .and_then(Load::new)
        .and_then(|mut load| load.run())
    {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nbd_load: {error}");
            ExitCode::FAILURE
        }
    }
}
