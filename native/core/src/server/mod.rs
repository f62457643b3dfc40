//! Tap server and view server: a control socket, front ends, and a device behind them.

/// Messages of the control sockets, generated from `proto/ebbtide/v1/control.proto`.
pub mod proto {
    #![allow(clippy::all, clippy::pedantic, missing_debug_implementations)]
    include!(concat!(env!("OUT_DIR"), "/ebbtide.v1.rs"));
}
