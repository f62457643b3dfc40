//! The kernel's side of FUSE: request headers, operations and answers as they cross /dev/fuse.
//!
//! Source: Linux `include/uapi/linux/fuse.h`, protocol 7.31 (kernel 5.4) to 7.45. All integers are
//! in host order. Nothing here does I/O; every length is checked before use.

/// Protocol major number that we speak.
pub const MAJOR: u32 = 7;
/// Newest minor number whose structures this file knows.
pub const MINOR: u32 = 40;
/// Oldest minor number served: the first with FUSE_MAX_PAGES (7.28) that is still in use.
pub const MINOR_MIN: u32 = 31;

/// Bytes of `fuse_in_header`.
pub const IN_HEADER: usize = 40;
/// Bytes of `fuse_write_in`: the payload of a WRITE begins right behind it.
pub const WRITE_IN: usize = 40;
/// Bytes of `fuse_out_header`.
pub const OUT_HEADER: usize = 16;

/// Node id of the directory.
pub const ROOT_ID: u64 = 1;

const FUSE_ASYNC_READ: u64 = 1 << 0;
const FUSE_BIG_WRITES: u64 = 1 << 5;
const FUSE_ASYNC_DIO: u64 = 1 << 15;
const FUSE_PARALLEL_DIROPS: u64 = 1 << 18;
const FUSE_MAX_PAGES: u64 = 1 << 22;
const FUSE_INIT_EXT: u64 = 1 << 30;
/// The kernel sends unanswered requests again when asked to (kernel 6.9, protocol 7.40).
pub const FUSE_HAS_RESEND: u64 = 1 << 39;

/// What we ask for where the kernel offers it. Not asked for: FUSE_WRITEBACK_CACHE (the kernel
/// would reorder writes) and FUSE_NO_OPEN_SUPPORT (direct I/O is a flag of the answer to OPEN).
const WANTED: u64 = FUSE_ASYNC_READ
    | FUSE_BIG_WRITES
    | FUSE_ASYNC_DIO
    | FUSE_PARALLEL_DIROPS
    | FUSE_MAX_PAGES
    | FUSE_INIT_EXT
    | FUSE_HAS_RESEND;

/// No page cache for this open file: each read and write reaches us, in the caller's order.
pub const FOPEN_DIRECT_IO: u32 = 1 << 0;
/// close(2) sends no FLUSH (kernel 5.16; older ones learn it from ENOSYS).
pub const FOPEN_NOFLUSH: u32 = 1 << 5;
/// Several direct writes of one file at once.
pub const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

/// Code of the notification that asks for unanswered requests again.
pub const NOTIFY_RESEND: i32 = 7;

pub const FATTR_SIZE: u32 = 1 << 3;
/// Times and the fields that only qualify a request: a SETATTR of these alone changes nothing.
pub const FATTR_HARMLESS: u32 =
    (1 << 4) | (1 << 5) | (1 << 6) | (1 << 7) | (1 << 8) | (1 << 9) | (1 << 10) | (1 << 11);

/// `fuse_in_header`, as far as we use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub opcode: u32,
    /// Identity of the request; the answer carries it unchanged, the resend bit included.
    pub unique: u64,
    pub node: u64,
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    Init {
        major: u32,
        minor: u32,
        readahead: u32,
        flags: u64,
    },
    Lookup {
        name: Vec<u8>,
    },
    GetAttr,
    SetAttr {
        valid: u32,
        size: u64,
    },
    Open {
        flags: u32,
    },
    Read {
        offset: u64,
        length: usize,
    },
    /// The payload lies behind the request's fixed part, at `IN_HEADER + WRITE_IN`.
    Write {
        offset: u64,
        length: usize,
        flags: u32,
    },
    Fsync,
    Flush,
    Release,
    Fallocate {
        offset: u64,
        length: u64,
        mode: u32,
    },
    Lseek {
        offset: u64,
        whence: u32,
    },
    OpenDir,
    ReadDir {
        offset: u64,
        length: usize,
    },
    ReleaseDir,
    FsyncDir,
    StatFs,
    Destroy,
    Interrupt,
    /// FORGET and BATCH_FORGET: the only requests without an answer. Nodes live as long as we do.
    Forget,
    /// Would change the directory, which is fixed.
    ChangesDirectory,
    Ioctl,
    /// Optional operations that we do not offer; ENOSYS makes the kernel stop asking.
    Other,
}

/// Takes integers off the front of a request's body.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], i32> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or(libc::EINVAL)?;
        self.0 = tail;
        Ok(*head)
    }

    fn u32(&mut self) -> Result<u32, i32> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64, i32> {
        self.take().map(u64::from_ne_bytes)
    }

    fn size(&mut self) -> Result<usize, i32> {
        usize::try_from(self.u32()?).map_err(|_| libc::EINVAL)
    }
}

/// Reads the header of `message`. `None` if it is shorter than a header or than it says.
pub fn parse_header(message: &[u8]) -> Option<Header> {
    let mut fields = Fields(message.get(..IN_HEADER)?);
    let length = fields.size().ok()?;
    let header = Header {
        opcode: fields.u32().ok()?,
        unique: fields.u64().ok()?,
        node: fields.u64().ok()?,
    };
    (length == message.len()).then_some(header)
}

/// Reads the operation of `message`, whose header is `header`. The error is an errno.
pub fn parse_operation(header: &Header, message: &[u8]) -> Result<Operation, i32> {
    let mut fields = Fields(message.get(IN_HEADER..).ok_or(libc::EINVAL)?);
    Ok(match header.opcode {
        1 => {
            let (0, name) = fields.0.split_last().ok_or(libc::EINVAL)? else {
                return Err(libc::EINVAL);
            };
            Operation::Lookup {
                name: name.to_vec(),
            }
        }
        2 | 42 => Operation::Forget,
        3 => Operation::GetAttr,
        4 => {
            let valid = fields.u32()?;
            fields.take::<12>()?; // padding, fh
            Operation::SetAttr {
                valid,
                size: fields.u64()?,
            }
        }
        // SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, CREATE, RENAME2, TMPFILE
        6 | 8..=13 | 35 | 45 | 51 => Operation::ChangesDirectory,
        14 => Operation::Open {
            flags: fields.u32()?,
        },
        15 => {
            fields.u64()?; // fh
            Operation::Read {
                offset: fields.u64()?,
                length: fields.size()?,
            }
        }
        16 => {
            fields.u64()?; // fh
            let offset = fields.u64()?;
            let length = fields.size()?;
            fields.take::<12>()?; // write_flags, lock_owner
            let flags = fields.u32()?;
            fields.u32()?; // padding
            if fields.0.len() != length {
                return Err(libc::EINVAL);
            }
            Operation::Write {
                offset,
                length,
                flags,
            }
        }
        17 => Operation::StatFs,
        18 => Operation::Release,
        20 => Operation::Fsync,
        25 => Operation::Flush,
        26 => {
            let (major, minor) = (fields.u32()?, fields.u32()?);
            let (readahead, low) = (fields.u32()?, fields.u32()?);
            let high = if u64::from(low) & FUSE_INIT_EXT == 0 {
                0
            } else {
                fields.u32()?
            };
            Operation::Init {
                major,
                minor,
                readahead,
                flags: u64::from(high) << 32 | u64::from(low),
            }
        }
        27 => Operation::OpenDir,
        28 => {
            fields.u64()?; // fh
            Operation::ReadDir {
                offset: fields.u64()?,
                length: fields.size()?,
            }
        }
        29 => Operation::ReleaseDir,
        30 => Operation::FsyncDir,
        36 => Operation::Interrupt,
        38 => Operation::Destroy,
        39 => Operation::Ioctl,
        43 => {
            fields.u64()?; // fh
            let (offset, length) = (fields.u64()?, fields.u64()?);
            Operation::Fallocate {
                offset,
                length,
                mode: fields.u32()?,
            }
        }
        46 => {
            fields.u64()?; // fh
            Operation::Lseek {
                offset: fields.u64()?,
                whence: fields.u32()?,
            }
        }
        _ => Operation::Other,
    })
}

/// `fuse_out_header` of an answer with `body` bytes behind it; `error` is 0 or a negative errno.
pub fn out_header(body: usize, error: i32, unique: u64) -> [u8; OUT_HEADER] {
    let length = u32::try_from(OUT_HEADER + body).expect("invariant: an answer is below 4 GiB");
    let mut header = [0; OUT_HEADER];
    header[..4].copy_from_slice(&length.to_ne_bytes());
    header[4..8].copy_from_slice(&error.to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}

/// The numbers of `fuse_init_out` that are ours to choose.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub max_write: u32,
    pub max_background: u16,
}

/// Body of the answer to INIT, and the flags that both sides now use.
pub fn init_out(minor: u32, readahead: u32, offered: u64, limits: Limits) -> (Vec<u8>, u64) {
    let flags = WANTED & offered;
    let pages = u16::try_from(limits.max_write / 4096).unwrap_or(u16::MAX);
    let low = u32::try_from(flags & 0xffff_ffff).expect("invariant: masked to 32 bits");
    let high = u32::try_from(flags >> 32).expect("invariant: shifted to 32 bits");
    let mut out = Vec::with_capacity(64);
    for word in [MAJOR, minor.min(MINOR), readahead, low] {
        out.extend_from_slice(&word.to_ne_bytes());
    }
    for half in [limits.max_background, limits.max_background / 4 * 3] {
        out.extend_from_slice(&half.to_ne_bytes());
    }
    out.extend_from_slice(&limits.max_write.to_ne_bytes());
    out.extend_from_slice(&1u32.to_ne_bytes()); // time_gran: 1 ns
    for half in [pages, 0] {
        out.extend_from_slice(&half.to_ne_bytes()); // max_pages, map_alignment
    }
    out.extend_from_slice(&high.to_ne_bytes());
    out.resize(64, 0);
    (out, flags)
}

/// What `stat` shows of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    pub node: u64,
    pub size: u64,
    pub mode: u32,
    pub links: u32,
    pub owner: u32,
    pub group: u32,
    /// Seconds since the Unix epoch; all three times.
    pub time_s: u64,
}

impl Attributes {
    fn put(&self, out: &mut Vec<u8>) {
        for word in [self.node, self.size, self.size.div_ceil(512)] {
            out.extend_from_slice(&word.to_ne_bytes());
        }
        for _ in 0..3 {
            out.extend_from_slice(&self.time_s.to_ne_bytes());
        }
        for word in [
            0, 0, 0, self.mode, self.links, self.owner, self.group, 0, 4096, 0,
        ] {
            out.extend_from_slice(&u32::to_ne_bytes(word));
        }
    }
}

/// Body of the answer to LOOKUP (`fuse_entry_out`); both caches are valid for `valid_s` seconds.
pub fn entry_out(attributes: &Attributes, valid_s: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    for word in [attributes.node, 0, valid_s, valid_s, 0] {
        out.extend_from_slice(&word.to_ne_bytes());
    }
    attributes.put(&mut out);
    out
}

/// Body of the answer to GETATTR and SETATTR (`fuse_attr_out`).
pub fn attr_out(attributes: &Attributes, valid_s: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(104);
    for word in [valid_s, 0] {
        out.extend_from_slice(&word.to_ne_bytes());
    }
    attributes.put(&mut out);
    out
}

/// Body of the answer to OPEN and OPENDIR (`fuse_open_out`).
pub fn open_out(handle: u64, flags: u32) -> Vec<u8> {
    let mut out = handle.to_ne_bytes().to_vec();
    out.extend_from_slice(&flags.to_ne_bytes());
    out.resize(16, 0);
    out
}

/// Body of the answer to WRITE (`fuse_write_out`).
pub fn write_out(length: u32) -> Vec<u8> {
    let mut out = length.to_ne_bytes().to_vec();
    out.resize(8, 0);
    out
}

/// Body of the answer to STATFS (`fuse_statfs_out`): `blocks` of 4 KiB in `files` files, all used.
pub fn statfs_out(blocks: u64, files: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(80);
    for word in [blocks, 0, 0, files, 0] {
        out.extend_from_slice(&word.to_ne_bytes());
    }
    for word in [4096u32, 255, 4096] {
        out.extend_from_slice(&word.to_ne_bytes());
    }
    out.resize(80, 0);
    out
}

/// Appends one `fuse_dirent`, padded to 8 bytes, unless `out` would grow beyond `limit`.
pub fn put_dirent(
    out: &mut Vec<u8>,
    limit: usize,
    node: u64,
    next: u64,
    directory: bool,
    name: &[u8],
) -> bool {
    let kind = if directory {
        u32::from(libc::DT_DIR)
    } else {
        u32::from(libc::DT_REG)
    };
    let padded = (24 + name.len()).next_multiple_of(8);
    let Ok(length) = u32::try_from(name.len()) else {
        return false;
    };
    if out.len() + padded > limit {
        return false;
    }
    let end = out.len() + padded;
    for word in [node, next] {
        out.extend_from_slice(&word.to_ne_bytes());
    }
    for word in [length, kind] {
        out.extend_from_slice(&word.to_ne_bytes());
    }
    out.extend_from_slice(name);
    out.resize(end, 0);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(opcode: u32, body: &[u8]) -> Vec<u8> {
        let mut out = u32::try_from(IN_HEADER + body.len())
            .unwrap()
            .to_ne_bytes()
            .to_vec();
        out.extend_from_slice(&opcode.to_ne_bytes());
        out.extend_from_slice(&7u64.to_ne_bytes());
        out.extend_from_slice(&3u64.to_ne_bytes());
        out.resize(IN_HEADER, 0);
        out.extend_from_slice(body);
        out
    }

    fn parse(message: &[u8]) -> Result<Operation, i32> {
        parse_operation(&parse_header(message).expect("a whole header"), message)
    }

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn header_that_lies_about_its_length_is_refused() {
        let mut bytes = message(3, &[0; 16]);
        assert_eq!(
            parse_header(&bytes),
            Some(Header {
                opcode: 3,
                unique: 7,
                node: 3
            })
        );
        bytes.push(0);
        assert_eq!(parse_header(&bytes), None);
        assert_eq!(parse_header(&bytes[..IN_HEADER - 1]), None);
    }

    #[test]
    fn write_payload_must_be_as_long_as_announced() {
        let fixed = |length: u32| {
            let mut body = words(&[9, 8192]);
            body.extend_from_slice(&length.to_ne_bytes());
            body.extend_from_slice(&[0; 12]);
            body.extend_from_slice(&0o10000u32.to_ne_bytes());
            body.extend_from_slice(&[0; 4]);
            assert_eq!(body.len(), WRITE_IN);
            body.extend_from_slice(&[0xab; 512]);
            message(16, &body)
        };
        assert_eq!(
            parse(&fixed(512)),
            Ok(Operation::Write {
                offset: 8192,
                length: 512,
                flags: 0o10000
            })
        );
        assert_eq!(parse(&fixed(511)), Err(libc::EINVAL));
        assert_eq!(parse(&fixed(u32::MAX)), Err(libc::EINVAL));
    }

    #[test]
    fn every_truncation_of_every_operation_is_an_error_or_an_operation() {
        for opcode in 0..64 {
            for length in 0..96 {
                let _ = parse(&message(opcode, &vec![0; length]));
            }
        }
        assert_eq!(parse(&message(15, &[0; 19])), Err(libc::EINVAL));
        assert_eq!(parse(&message(1, b"name")), Err(libc::EINVAL));
        assert_eq!(
            parse(&message(1, b"name\0")),
            Ok(Operation::Lookup {
                name: b"name".into()
            })
        );
        assert_eq!(parse(&message(999, &[])), Ok(Operation::Other));
    }

    #[test]
    fn init_takes_the_high_flags_only_where_they_exist() {
        let body = |flags: u32| {
            let mut body = Vec::new();
            for word in [7u32, 31, 65536, flags, 1 << 7] {
                body.extend_from_slice(&word.to_ne_bytes());
            }
            body
        };
        let old = parse(&message(26, &body(1)[..16])).unwrap();
        assert_eq!(
            old,
            Operation::Init {
                major: 7,
                minor: 31,
                readahead: 65536,
                flags: 1
            }
        );
        let extended = u32::try_from(FUSE_INIT_EXT).unwrap();
        let Operation::Init { flags, .. } = parse(&message(26, &body(extended))).unwrap() else {
            panic!("not INIT");
        };
        assert_eq!(flags, FUSE_INIT_EXT | FUSE_HAS_RESEND);
    }

    #[test]
    fn init_answer_never_asks_for_what_was_not_offered_nor_for_the_write_back_cache() {
        let limits = Limits {
            max_write: 1 << 20,
            max_background: 64,
        };
        let (out, flags) = init_out(45, 65536, u64::MAX, limits);
        assert_eq!(out.len(), 64);
        assert_eq!(flags & (1 << 16), 0);
        assert_eq!(u32::from_ne_bytes(out[4..8].try_into().unwrap()), MINOR);
        assert_eq!(u16::from_ne_bytes(out[28..30].try_into().unwrap()), 256);
        assert_eq!(init_out(31, 0, FUSE_ASYNC_READ, limits).1, FUSE_ASYNC_READ);
    }

    #[test]
    fn answers_have_the_kernels_sizes() {
        let attributes = Attributes {
            node: 2,
            size: 513,
            mode: 0o100_600,
            links: 1,
            owner: 0,
            group: 0,
            time_s: 1,
        };
        assert_eq!(entry_out(&attributes, 1).len(), 128);
        assert_eq!(attr_out(&attributes, 1).len(), 104);
        assert_eq!(open_out(1, 0).len(), 16);
        assert_eq!(write_out(1).len(), 8);
        assert_eq!(statfs_out(1, 1).len(), 80);
        let mut out = Vec::new();
        assert!(put_dirent(&mut out, 32, 2, 1, false, b"name"));
        assert_eq!(out.len(), 32);
        assert!(!put_dirent(&mut out, 63, 2, 1, false, b"name"));
        assert_eq!(out.len(), 32);
    }
}
