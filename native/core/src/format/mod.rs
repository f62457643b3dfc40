//! Bytes only: layouts, checksums, versions. No I/O, no keys.
//!
//! Every format begins with the same 16 bytes: magic (8), version (2), header length (2) and
//! flags (4), and ends its fixed header with an XXH3-64 of all header bytes before it. Reserved
//! bytes are verified zero. `docs/format/` has a page per format; a test compares its table with
//! the constants here.

pub mod digest;
mod directory;
pub mod error;
pub mod frame;
pub mod layout;
pub mod manifest;
pub mod record;
pub mod segment;
mod table;
pub mod varint;

pub use error::FormatError;
pub use layout::Field;

#[cfg(test)]
pub(crate) mod tests;
