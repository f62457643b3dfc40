//! Manifest: the one mutable file of a log, replaced by atomic rename.
//!
//! A 64-byte header (magic, version, lengths, version counter, XXH3-64 of the body and of itself),
//! then a UTF-8 JSON body: the list changes shape over the years, must be readable by `ebb rescue`
//! and by a person at 3 a.m., and is never on the data path.

use serde::{Deserialize, Serialize};

use xxhash_rust::xxh3::xxh3_64;

use super::FormatError;
use super::layout::{self, Field, Format};
use crate::constants::{EVENTS_MAX, VOLUME_CHANGES_MAX};

pub const MANIFEST_MAGIC: [u8; 8] = *b"EBBMANIF";
pub const MANIFEST_VERSION: u16 = 1;
pub const MANIFEST_HEADER_LEN: usize = 64;
/// Bytes of the body: about a million segments, 64 TiB of history.
pub const MANIFEST_BODY_MAX: usize = 256 << 20;

const BODY_LEN: Field = Field::new("body_len", 16, 8);
const COUNTER: Field = Field::new("manifest_version", 24, 8);
const BODY_CHECKSUM: Field = Field::new("body_checksum", 32, 8);
const RESERVED_40: Field = Field::new("reserved_40", 40, 16);
const OWN: &[Field] = &[BODY_LEN, COUNTER, BODY_CHECKSUM, RESERVED_40];

/// The header, field by field; `docs/format/manifest.md` holds the same table.
pub const LAYOUT: &[Field] = &layout::header::<{ layout::fields(OWN) }>(OWN, MANIFEST_HEADER_LEN);

/// Limits of reader and writer; the page holds the same table.
pub const LIMIT_VALUES: &[(&str, u64)] = &[
    ("MANIFEST_BODY_MAX", MANIFEST_BODY_MAX as u64),
    ("EVENTS_MAX", EVENTS_MAX as u64),
    ("VOLUME_CHANGES_MAX", VOLUME_CHANGES_MAX as u64),
];

const FORMAT: Format = Format {
    what: "manifest header",
    magic: MANIFEST_MAGIC,
    version: MANIFEST_VERSION,
    header_len: MANIFEST_HEADER_LEN,
    reserved: &[layout::FLAGS, RESERVED_40],
};

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
    /// Bytes of a gap, or size of a volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Index of a volume whose name (`label`) or size changed or that is new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<u16>,
}

impl Manifest {
    /// Encodes header and body.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0u8; MANIFEST_HEADER_LEN];
        serde_json::to_writer(&mut bytes, self)
            .expect("invariant: strings and integers are always JSON, memory does not fail");
        let (header, body) = bytes.split_at_mut(MANIFEST_HEADER_LEN);
        FORMAT.begin(header, 0);
        BODY_LEN.put(header, &(body.len() as u64).to_le_bytes());
        COUNTER.put(header, &self.version.to_le_bytes());
        BODY_CHECKSUM.put(header, &xxh3_64(body).to_le_bytes());
        FORMAT.finish(header);
        bytes
    }

    /// Parses a whole manifest file: header, then body. Refuses unknown fields, trailing bytes and
    /// identities that are not hex.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "manifest body";
        let header = FORMAT.open(bytes)?;
        let body = &bytes[MANIFEST_HEADER_LEN..];
        let body_len = BODY_LEN.u64(header);
        FORMAT.at_most(BODY_LEN, body_len, MANIFEST_BODY_MAX as u64)?;
        if (body.len() as u64) < body_len {
            let need = usize::try_from(body_len).unwrap_or(usize::MAX);
            return Err(FormatError::Truncated {
                what: WHAT,
                need,
                have: body.len(),
            });
        }
        FORMAT.require(
            body.len() as u64 == body_len,
            BODY_LEN,
            "shorter than the file",
        )?;
        let (computed, found) = (xxh3_64(body), BODY_CHECKSUM.u64(header));
        if computed != found {
            return Err(FormatError::Checksum {
                what: WHAT,
                computed,
                found,
            });
        }
        let manifest: Self = serde_json::from_slice(body).map_err(|_| FormatError::Field {
            what: WHAT,
            field: "JSON",
            reason: "not the fields of this version",
        })?;
        FORMAT.require(
            manifest.version == COUNTER.u64(header),
            COUNTER,
            "not the body's",
        )?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Checks what the types do not say: identities are hex, ranges run forward.
    pub fn check(&self) -> Result<(), FormatError> {
        let require = |ok: bool, field: &'static str, reason: &'static str| {
            if ok {
                return Ok(());
            }
            Err(FormatError::Field {
                what: "manifest body",
                field,
                reason,
            })
        };
        let hex = |text: &str, digits: usize| {
            text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit())
        };
        require(hex(&self.group, 32), "group", "not 32 hex digits")?;
        for incarnation in &self.incarnations {
            require(
                hex(&incarnation.id, 32),
                "incarnations.id",
                "not 32 hex digits",
            )?;
            require(incarnation.ordinal != 0, "incarnations.ordinal", "zero")?;
        }
        for segment in &self.segments {
            let forward = segment.first_frame <= segment.last_frame
                && segment.first_seq < segment.end_seq
                && segment.first_time_us <= segment.last_time_us;
            require(forward, "segments", "a range that runs backwards")?;
            let digest = &segment.last_digest;
            require(hex(digest, 64), "segments.last_digest", "not 64 hex digits")?;
        }
        Ok(())
    }
}
