//! Manifest: the one mutable file of a log, replaced by atomic rename.
//!
//! A 64-byte header (magic, version, lengths, version counter, XXH3-64 of the body and of itself),
//! then a UTF-8 JSON body: the list changes shape over the years, must be readable by `ebb rescue`
//! and by a person at 3 a.m., and is never on the data path.

use serde::{Deserialize, Serialize};

use super::FormatError;

pub const MANIFEST_MAGIC: [u8; 8] = *b"EBBMANIF";
pub const MANIFEST_VERSION: u16 = 1;
pub const MANIFEST_HEADER_LEN: usize = 64;

/// The body. Identities and digests are hex strings, times microseconds, lengths bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Grows by one with each replacement.
    pub version: u64,
    pub group: String,
    pub volumes: Vec<VolumeEntry>,
    pub incarnations: Vec<IncarnationEntry>,
    /// Sealed segments, oldest first, in the order of their first seq.
    pub segments: Vec<SegmentEntry>,
    pub events: Vec<EventEntry>,
    /// Oldest seq that a view may be opened at; 0 if history begins with the first record.
    pub horizon_seq: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeEntry {
    pub index: u16,
    pub name: String,
    pub size: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IncarnationEntry {
    /// Position in this log, part of the names of its segment files; from 1.
    pub ordinal: u32,
    pub id: String,
    pub generation_counter: u64,
    pub generation_site: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentEntry {
    pub ordinal: u32,
    pub first_frame: u32,
    pub last_frame: u32,
    pub first_seq: u64,
    pub end_seq: u64,
    pub first_time_us: u64,
    pub last_time_us: u64,
    pub bytes: u64,
    pub records: u64,
    /// Frame digest of the last frame: the next segment's first `prev`.
    pub last_digest: String,
    /// The index run beside the segment is complete.
    pub indexed: bool,
}

/// A record that is not plain data, kept so that points are listed without reading segments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventEntry {
    pub seq: u64,
    pub time_us: u64,
    /// "bookmark" | "span_begin" | "span_end" | "gap" | "clock_step" | "volume"
    pub kind: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub label: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<u8>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gap_first_time_us: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
}

impl Manifest {
    pub fn encode(&self) -> Vec<u8> {
        todo!()
    }

    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let _ = bytes;
        todo!()
    }
}
