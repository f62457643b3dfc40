//! A device in memory and a client that says exactly what a test wants said.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::wire;
use crate::device::{Allocation, BlockDevice, DeviceError, DeviceInfo, RequestFlags};

/// A volume in memory. Its first half counts as data, its second half as a hole.
#[derive(Debug)]
pub(super) struct MemoryDevice {
    pub info: DeviceInfo,
    /// Declines everything with `nowait`.
    pub waits: bool,
    pub content: Mutex<Vec<u8>>,
    /// Requests that ran: name and flags.
    pub log: Mutex<Vec<(&'static str, RequestFlags)>>,
    /// Failure of every request.
    pub failure: Mutex<Option<DeviceError>>,
    pub held: Mutex<bool>,
    /// Requests that wait because of `held`.
    pub waiting: AtomicUsize,
    pub released: Condvar,
}

impl MemoryDevice {
    pub(super) fn new(size: u64) -> Self {
        Self {
            info: DeviceInfo {
                size,
                read_only: false,
                multi_conn: true,
            },
            waits: false,
            content: Mutex::new(vec![0; usize::try_from(size).unwrap()]),
            log: Mutex::default(),
            failure: Mutex::default(),
            held: Mutex::new(false),
            waiting: AtomicUsize::new(0),
            released: Condvar::new(),
        }
    }

    /// While held, requests that may wait do so.
    pub(super) fn hold(&self, held: bool) {
        *self.held.lock() = held;
        self.released.notify_all();
    }

    fn enter(&self, name: &'static str, flags: RequestFlags) -> Result<(), DeviceError> {
        if flags.nowait && self.waits {
            return Err(DeviceError::WouldBlock);
        }
        let mut held = self.held.lock();
        while *held && !flags.nowait {
            self.waiting.fetch_add(1, Ordering::SeqCst);
            self.released.wait(&mut held);
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        }
        self.log.lock().push((name, flags));
        (*self.failure.lock()).map_or(Ok(()), Err)
    }

    fn fill(&self, offset: u64, length: u64, byte: u8) {
        let start = usize::try_from(offset).unwrap();
        self.content.lock()[start..start + usize::try_from(length).unwrap()].fill(byte);
    }
}

impl BlockDevice for MemoryDevice {
    fn info(&self) -> DeviceInfo {
        self.info
    }

    fn read(&self, buffer: &mut [u8], offset: u64, flags: RequestFlags) -> Result<(), DeviceError> {
        self.enter("read", flags)?;
        let start = usize::try_from(offset).unwrap();
        buffer.copy_from_slice(&self.content.lock()[start..start + buffer.len()]);
        Ok(())
    }

    fn write(&self, data: &[u8], offset: u64, flags: RequestFlags) -> Result<(), DeviceError> {
        self.enter("write", flags)?;
        let start = usize::try_from(offset).unwrap();
        self.content.lock()[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self, flags: RequestFlags) -> Result<(), DeviceError> {
        self.enter("flush", flags)
    }

    fn trim(&self, offset: u64, length: u64, flags: RequestFlags) -> Result<(), DeviceError> {
        self.enter("trim", flags)?;
        self.fill(offset, length, 0);
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, flags: RequestFlags) -> Result<(), DeviceError> {
        self.enter("zero", flags)?;
        self.fill(offset, length, 0);
        Ok(())
    }

    fn allocation(
        &self,
        offset: u64,
        length: u64,
        each: &mut dyn FnMut(Allocation) -> bool,
    ) -> Result<(), DeviceError> {
        self.enter("allocation", RequestFlags::default())?;
        let (middle, end) = (self.info.size / 2, offset + length);
        let mut at = offset;
        // In runs of at most 64 KiB, so that there is something to merge.
        while at < end {
            let hole = at >= middle;
            let border = if hole { end } else { end.min(middle) };
            let length = (border - at).min(64 * 1024);
            if !each(Allocation {
                length,
                hole,
                zero: hole,
            }) {
                break;
            }
            at += length;
        }
        Ok(())
    }
}

/// A reply in the transmission phase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reply {
    /// Simple, with the error number.
    Simple(u32),
    Data(u64, Vec<u8>),
    Status(Vec<(u32, u32)>),
    Error(u32),
    None,
}

/// A client that checks nothing but the magic numbers.
#[derive(Debug)]
pub(super) struct Client {
    pub stream: UnixStream,
    pub size: u64,
    pub flags: u16,
}

pub(super) fn request(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = wire::REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

pub(super) fn write_request(cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap();
    [
        request(wire::CMD_WRITE, 0, cookie, offset, length),
        data.to_vec(),
    ]
    .concat()
}

/// A length-prefixed string.
pub(super) fn text(text: &str) -> Vec<u8> {
    [
        &u32::try_from(text.len()).unwrap().to_be_bytes(),
        text.as_bytes(),
    ]
    .concat()
}

impl Client {
    /// Connects and exchanges greetings.
    pub(super) fn greet(path: &Path, client_flags: u32) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
            .set_write_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut client = Self {
            stream,
            size: 0,
            flags: 0,
        };
        let greeting = client.take::<18>();
        assert_eq!(greeting[..8], wire::SERVER_MAGIC.to_be_bytes());
        assert_eq!(greeting[8..16], wire::OPTION_MAGIC.to_be_bytes());
        assert_eq!(greeting[16..], [0, 3]);
        client.send(&client_flags.to_be_bytes());
        client
    }

    /// Connects up to transmission on the export `name`.
    pub(super) fn connect(path: &Path, name: &str, structured: bool) -> Self {
        let mut client = Self::greet(path, 3);
        if structured {
            client.ask(wire::OPT_STRUCTURED_REPLY, &[], wire::REP_ACK);
            let query = [text(name), vec![0, 0, 0, 1], text("base:allocation")].concat();
            client.ask(wire::OPT_SET_META_CONTEXT, &query, wire::REP_ACK);
        }
        let replies = client.ask(
            wire::OPT_GO,
            &[text(name), vec![0, 0]].concat(),
            wire::REP_ACK,
        );
        let info = &replies[0].1;
        client.size = u64::from_be_bytes(info[2..10].try_into().unwrap());
        client.flags = u16::from_be_bytes(info[10..12].try_into().unwrap());
        client
    }

    pub(super) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub(super) fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub(super) fn take_vec(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take())
    }

    pub(super) fn send_option(&mut self, option: u32, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap();
        let header = [
            &wire::OPTION_MAGIC.to_be_bytes()[..],
            &option.to_be_bytes(),
            &length.to_be_bytes(),
            data,
        ];
        self.send(&header.concat());
    }

    /// Sends an option; returns its replies up to the final one, which must be `last`.
    pub(super) fn ask(&mut self, option: u32, data: &[u8], last: u32) -> Vec<(u32, Vec<u8>)> {
        self.send_option(option, data);
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.take(), wire::OPTION_REPLY_MAGIC.to_be_bytes());
            assert_eq!(self.u32(), option);
            let kind = self.u32();
            let length = self.u32();
            let body = self.take_vec(length as usize);
            if kind == wire::REP_ACK || kind >> 31 == 1 {
                assert_eq!(kind, last);
                return replies;
            }
            replies.push((kind, body));
        }
    }

    /// Takes the next reply; `read` is the length of a simple reply's data if it is a read's.
    pub(super) fn reply(&mut self, read: Option<usize>) -> (u64, Reply) {
        let magic = self.u32();
        if magic == wire::SIMPLE_REPLY_MAGIC {
            let error = self.u32();
            let cookie = u64::from_be_bytes(self.take());
            return match read {
                Some(length) if error == 0 => (cookie, Reply::Data(0, self.take_vec(length))),
                _ => (cookie, Reply::Simple(error)),
            };
        }
        assert_eq!(magic, wire::CHUNK_MAGIC);
        assert_eq!(self.take(), wire::CHUNK_DONE.to_be_bytes());
        let kind = u16::from_be_bytes(self.take());
        let cookie = u64::from_be_bytes(self.take());
        let length = self.u32() as usize;
        let body = self.take_vec(length);
        let mut fields = wire::Fields(&body);
        let reply = match kind {
            wire::CHUNK_NONE => Reply::None,
            wire::CHUNK_OFFSET_DATA => Reply::Data(fields.u64().unwrap(), fields.0.to_vec()),
            wire::CHUNK_ERROR => Reply::Error(fields.u32().unwrap()),
            wire::CHUNK_BLOCK_STATUS => {
                assert_eq!(fields.u32(), Some(wire::ALLOCATION_CONTEXT_ID));
                let mut extents = Vec::new();
                while !fields.is_empty() {
                    extents.push((fields.u32().unwrap(), fields.u32().unwrap()));
                }
                Reply::Status(extents)
            }
            _ => panic!("chunk type {kind}"),
        };
        (cookie, reply)
    }

    /// Sends one request and takes its reply.
    pub(super) fn call(&mut self, command: u16, flags: u16, offset: u64, length: u32) -> Reply {
        self.send(&request(command, flags, 77, offset, length));
        let read = (command == wire::CMD_READ).then_some(length as usize);
        let (cookie, reply) = self.reply(read);
        assert_eq!(cookie, 77);
        reply
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Reply {
        self.send(&write_request(78, offset, data));
        let (cookie, reply) = self.reply(None);
        assert_eq!(cookie, 78);
        reply
    }

    /// The server has closed the connection, and sent nothing more.
    pub(super) fn assert_closed(&mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => assert!(rest.is_empty(), "{rest:?}"),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
}
