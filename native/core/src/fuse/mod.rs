//! FUSE front end: each volume is a file, for a loop device where the kernel has neither nbd nor
//! ublk. Speaks the kernel protocol (include/uapi/linux/fuse.h) on a descriptor that a holder
//! process keeps, so that a new server takes over and has the kernel resend what was in flight.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::device::BlockDevice;

/// Serves devices as files of a flat directory.
#[derive(Debug)]
pub struct FuseServer {
    _private: (),
}

impl FuseServer {
    /// Takes over an already mounted /dev/fuse descriptor. `resume`: INIT was answered by an earlier
    /// server; asks the kernel to resend (FUSE_NOTIFY_RESEND) what it had not answered.
    pub fn start(
        descriptor: OwnedFd,
        files: Vec<(String, Arc<dyn BlockDevice>)>,
        resume: bool,
    ) -> std::io::Result<Self> {
        let _ = (descriptor, files, resume);
        todo!()
    }

    pub fn stop(&self) {
        todo!()
    }
}
