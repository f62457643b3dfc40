//! Tap server, view server and holder: a control socket, front ends, and a device behind them.

mod causes;
pub mod control;
mod direct;
mod failure;
mod front;
mod holder;
mod launch;
mod loop_device;
pub mod memory;
pub mod run;
mod serve;
mod tap;
mod view;
pub mod wire;

pub use failure::{ExitCode, Failure};
pub use front::FuseFront;
pub use holder::{HolderLink, holder_main};
pub use loop_device::{
    LoopDevice, LoopError, loop_attach, loop_attach_with, loop_detach, loop_list,
};

pub use tap::tap_main;
pub use view::view_main;

/// Messages of the control sockets, generated from `proto/ebbtide/v1/control.proto`.
pub mod proto {
    #![allow(clippy::all, clippy::pedantic, missing_debug_implementations)]
    include!(concat!(env!("OUT_DIR"), "/ebbtide.v1.rs"));
}
