//! What a front end (NBD, FUSE) serves: the tap of a volume, or a view of one.

use std::fmt::Debug;

/// What a device can do; a front end advertises just this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Bytes; any number, the last block may be partial.
    pub size: u64,
    pub read_only: bool,
    /// Several connections see one another's flushed writes (NBD_FLAG_CAN_MULTI_CONN).
    pub multi_conn: bool,
}

/// Options of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RequestFlags {
    /// Forced unit access: answered when durable.
    pub fua: bool,
    /// Return `DeviceError::WouldBlock`, with nothing done, rather than wait for a lock, a disk or
    /// another request. A front end then repeats the request on a thread that may wait.
    pub nowait: bool,
    /// WRITE_ZEROES that must allocate (NBD_CMD_FLAG_NO_HOLE).
    pub no_hole: bool,
}

/// Why a request failed, as far as a client can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    #[error("the request would wait")]
    WouldBlock,
    #[error("the device is read-only")]
    ReadOnly,
    #[error("the range lies outside the device")]
    OutOfRange,
    #[error("no space is left behind the device")]
    NoSpace,
    #[error("the device is shutting down or locked")]
    Shutdown,
    #[error("input/output error {0} (errno)")]
    Io(i32),
}

/// What a range holds, for NBD's `base:allocation` and SEEK_HOLE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    pub length: u64,
    pub hole: bool,
    pub zero: bool,
}

/// A block device that a front end serves. Offsets and lengths are bytes, of any alignment.
///
/// All methods may be called from many threads at once. A method that returns `Ok` for a write has
/// done what `async` promises (backing written, record queued); durability is `flush`'s and FUA's.
pub trait BlockDevice: Send + Sync + Debug {
    fn info(&self) -> DeviceInfo;

    /// Fills `buffer` from `offset`.
    fn read(&self, buffer: &mut [u8], offset: u64, flags: RequestFlags) -> Result<(), DeviceError>;

    /// Writes `data` at `offset`. `data` is borrowed: what must outlive the call is copied, once.
    fn write(&self, data: &[u8], offset: u64, flags: RequestFlags) -> Result<(), DeviceError>;

    /// Waits until everything answered before the call is durable.
    fn flush(&self, flags: RequestFlags) -> Result<(), DeviceError>;

    /// Discards a range; it reads as zeroes afterwards. Partial blocks are zeroed.
    fn trim(&self, offset: u64, length: u64, flags: RequestFlags) -> Result<(), DeviceError>;

    /// Makes a range read as zeroes.
    fn zero(&self, offset: u64, length: u64, flags: RequestFlags) -> Result<(), DeviceError>;

    /// Calls `each` for consecutive runs that cover `[offset, offset + length)` from the start,
    /// until the range ends or `each` returns false. Runs are never empty.
    fn allocation(
        &self,
        offset: u64,
        length: u64,
        each: &mut dyn FnMut(Allocation) -> bool,
    ) -> Result<(), DeviceError>;
}
