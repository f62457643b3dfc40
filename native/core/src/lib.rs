//! Ebbtide's data path. Knows no Python.
//!
//! A write: `nbd` or `fuse` parse it -> `tap` takes range lock, seq and time, queues it and writes
//! the backing -> encoder threads build frames with `codec` and `crypto` -> `log` appends them to
//! the spool -> the agent ships the same bytes -> `index::Journal` appends them on the target.
//! A read of history: `nbd` or `fuse` -> `view` -> `index::History` -> `codec::open_cell`.
//!
//! Imports point one way: `format <- codec, crypto, storage <- log <- index <- view, tap <- nbd,
//! fuse, server`. `format`, `codec` and `crypto` do no I/O.

pub mod codec;
pub mod constants;
pub mod crypto;
pub mod device;
pub mod format;
pub mod fuse;
pub mod index;
pub mod log;
pub mod nbd;
pub mod server;
pub mod storage;
pub mod tap;
pub mod types;
pub mod view;
