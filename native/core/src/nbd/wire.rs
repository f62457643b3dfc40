//! Numbers and fixed layouts of the NBD protocol (`doc/proto.md` of the NBD project). Big-endian.

use crate::device::DeviceError;

// Handshake
pub(super) const SERVER_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1;
pub(super) const FLAG_NO_ZEROES: u16 = 1 << 1;
pub(super) const CLIENT_FIXED_NEWSTYLE: u32 = 1;
pub(super) const CLIENT_NO_ZEROES: u32 = 1 << 1;
/// Bytes of an option's header: magic, option, length.
pub(super) const OPTION_HEADER_LEN: usize = 16;
/// Zeroes behind the answer to EXPORT_NAME unless NO_ZEROES was agreed.
pub(super) const EXPORT_NAME_ZEROES: usize = 124;
/// Longest string of the protocol.
pub(super) const STRING_MAX: usize = 4096;
/// Longest data of one option: two longest strings and room for lists. More is an attack.
pub(super) const OPTION_DATA_MAX: usize = 16 * 1024;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_LIST_META_CONTEXT: u32 = 9;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_SERVER: u32 = 2;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
pub(super) const REP_ERR_UNSUP: u32 = (1 << 31) + 1;
pub(super) const REP_ERR_INVALID: u32 = (1 << 31) + 3;
pub(super) const REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;
pub(super) const REP_ERR_SHUTDOWN: u32 = (1 << 31) + 7;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_NAME: u16 = 1;
pub(super) const INFO_DESCRIPTION: u16 = 2;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// The one metadata context served.
pub(super) const ALLOCATION_CONTEXT: &str = "base:allocation";
/// Its id on the wire; any number will do.
pub(super) const ALLOCATION_CONTEXT_ID: u32 = 1;
pub(super) const STATE_HOLE: u32 = 1;
pub(super) const STATE_ZERO: u32 = 1 << 1;

// Transmission flags of an export
pub(super) const EXPORT_HAS_FLAGS: u16 = 1;
pub(super) const EXPORT_READ_ONLY: u16 = 1 << 1;
pub(super) const EXPORT_SEND_FLUSH: u16 = 1 << 2;
pub(super) const EXPORT_SEND_FUA: u16 = 1 << 3;
pub(super) const EXPORT_SEND_TRIM: u16 = 1 << 5;
pub(super) const EXPORT_SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(super) const EXPORT_SEND_DF: u16 = 1 << 7;
pub(super) const EXPORT_CAN_MULTI_CONN: u16 = 1 << 8;

// Transmission
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const CHUNK_MAGIC: u32 = 0x668e_33ef;
pub(super) const REQUEST_LEN: usize = 28;
pub(super) const SIMPLE_REPLY_LEN: usize = 16;
pub(super) const CHUNK_HEADER_LEN: usize = 20;

pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_FLUSH: u16 = 3;
pub(super) const CMD_TRIM: u16 = 4;
pub(super) const CMD_WRITE_ZEROES: u16 = 6;
pub(super) const CMD_BLOCK_STATUS: u16 = 7;

pub(super) const CMD_FLAG_FUA: u16 = 1;
pub(super) const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
pub(super) const CMD_FLAG_DF: u16 = 1 << 2;
pub(super) const CMD_FLAG_REQ_ONE: u16 = 1 << 3;

pub(super) const CHUNK_DONE: u16 = 1;
pub(super) const CHUNK_NONE: u16 = 0;
pub(super) const CHUNK_OFFSET_DATA: u16 = 1;
pub(super) const CHUNK_BLOCK_STATUS: u16 = 5;
pub(super) const CHUNK_ERROR: u16 = (1 << 15) + 1;

/// Error numbers of replies: a closed set, whatever the system's errno are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Errno {
    Perm = 1,
    Io = 5,
    NoMem = 12,
    Inval = 22,
    NoSpc = 28,
    Overflow = 75,
    Shutdown = 108,
}

impl Errno {
    pub(super) fn number(self) -> u32 {
        self as u32
    }

    /// What a client is told in a structured error.
    pub(super) fn message(self) -> &'static str {
        match self {
            Self::Perm => "the export is read-only",
            Self::Io => "input/output error",
            Self::NoMem => "out of memory",
            Self::Inval => "invalid request",
            Self::NoSpc => "no space, or beyond the end of the export",
            Self::Overflow => "longer than the largest payload",
            Self::Shutdown => "the server is shutting down",
        }
    }

    /// `writes`: the request would have put content somewhere, which decides what "outside" means.
    pub(super) fn from_device(error: DeviceError, writes: bool) -> Self {
        match error {
            DeviceError::ReadOnly | DeviceError::Io(libc::EPERM | libc::EACCES | libc::EROFS) => {
                Self::Perm
            }
            DeviceError::OutOfRange if !writes => Self::Inval,
            DeviceError::OutOfRange
            | DeviceError::NoSpace
            | DeviceError::Io(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Self::NoSpc,
            DeviceError::Shutdown => Self::Shutdown,
            DeviceError::Io(libc::ENOMEM) => Self::NoMem,
            // A call that may wait and still says WouldBlock broke the device's contract.
            DeviceError::Io(_) | DeviceError::WouldBlock => Self::Io,
        }
    }
}

/// The fixed part of a request, before anything but the magic was judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RequestHeader {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
}

impl RequestHeader {
    /// None: the magic is wrong, so the stream can no longer be understood.
    pub(super) fn parse(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u32()? != REQUEST_MAGIC {
            return None;
        }
        Some(Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u32()?,
        })
    }

    /// Bytes that follow the header on the wire.
    pub(super) fn payload_len(&self) -> usize {
        if self.command == CMD_WRITE {
            self.length as usize
        } else {
            0
        }
    }
}

/// Takes fields off the front of a message; None when it is too short.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string behind its 32-bit length, within the protocol's rules for strings.
    pub(super) fn string(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?).ok()?;
        let (text, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        string(text)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// At most 4096 bytes of UTF-8 without NUL.
pub(super) fn string(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > STRING_MAX || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}
