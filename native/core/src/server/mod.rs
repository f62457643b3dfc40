//! Tap server, view server and holder: a control socket, front ends, and a device behind them.

pub mod control;
mod failure;
mod front;
mod holder;
mod loop_device;
pub mod memory;
pub mod run;
pub mod wire;

pub use failure::{ExitCode, Failure};
pub use front::FuseFront;
pub use holder::{HolderLink, holder_main};
pub use loop_device::{
    LoopDevice, LoopError, loop_attach, loop_attach_with, loop_detach, loop_list,
};

use crate::log::LogEnd;

/// Messages of the control sockets, generated from `proto/ebbtide/v1/control.proto`.
pub mod proto {
    #![allow(clippy::all, clippy::pedantic, missing_debug_implementations)]
    include!(concat!(env!("OUT_DIR"), "/ebbtide.v1.rs"));
}

impl From<&LogEnd> for proto::LogEnd {
    fn from(end: &LogEnd) -> Self {
        Self {
            incarnation: end.incarnation.map(|id| id.0.to_vec()).unwrap_or_default(),
            ordinal: end.ordinal,
            has_frame: end.last_frame.is_some(),
            last_frame: end.last_frame.unwrap_or_default().0,
            last_digest: AsRef::<[u8]>::as_ref(&end.last_digest).to_vec(),
            last_seq: end.last_seq.0,
            last_time_us: end.last_time.0,
            has_open: end.open_first_frame.is_some(),
            open_first_frame: end.open_first_frame.unwrap_or_default().0,
            committed_len: end.committed_len,
            total_bytes: end.total_bytes,
        }
    }
}
