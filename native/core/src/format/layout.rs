//! Fixed headers as lists of fields: one table that encode, parse and `docs/format/` share.
//!
//! Every module with a fixed header lists its own fields in `OWN`, exports the whole as
//! `pub const LAYOUT: &[Field] = &layout::header::<{ layout::fields(OWN) }>(OWN, HEADER_LEN);`,
//! which does not compile with a gap, and is listed in `native/core/tests/format_pages.rs`, which
//! compares it with the table of its page.

use xxhash_rust::xxh3::xxh3_64;

use super::FormatError;

/// Bytes that every fixed header begins with: magic, version, header length, flags.
pub const PREAMBLE_LEN: usize = 16;
/// Bytes of the checksum that ends every fixed header.
pub const CHECKSUM_LEN: usize = 8;

/// One field of a fixed header; offset and length in bytes. Integers are little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    pub name: &'static str,
    pub offset: usize,
    pub len: usize,
}

pub const MAGIC: Field = Field::new("magic", 0, 8);
pub const VERSION: Field = Field::new("version", 8, 2);
pub const HEADER_LEN: Field = Field::new("header_len", 10, 2);
pub const FLAGS: Field = Field::new("flags", 12, 4);
const PREAMBLE: [Field; 4] = [MAGIC, VERSION, HEADER_LEN, FLAGS];

impl Field {
    pub const fn new(name: &'static str, offset: usize, len: usize) -> Self {
        Self { name, offset, len }
    }

    /// Offset of the first byte behind the field.
    pub const fn end(self) -> usize {
        self.offset + self.len
    }

    /// Writes the field. `value` must have the field's length.
    pub fn put(self, header: &mut [u8], value: &[u8]) {
        header[self.offset..self.end()].copy_from_slice(value);
    }

    /// The field's bytes. `header` must be long enough, `N` the field's length.
    pub fn array<const N: usize>(self, header: &[u8]) -> [u8; N] {
        header[self.offset..self.end()]
            .try_into()
            .expect("invariant: N is the field's length")
    }

    pub fn u16(self, header: &[u8]) -> u16 {
        u16::from_le_bytes(self.array(header))
    }

    pub fn u32(self, header: &[u8]) -> u32 {
        u32::from_le_bytes(self.array(header))
    }

    pub fn u64(self, header: &[u8]) -> u64 {
        u64::from_le_bytes(self.array(header))
    }
}

/// Whether the fields follow one another without gap or overlap and fill `len` bytes.
pub const fn covers(layout: &[Field], len: usize) -> bool {
    let mut at = 0;
    let mut i = 0;
    while i < layout.len() {
        if layout[i].offset != at || layout[i].len == 0 {
            return false;
        }
        at += layout[i].len;
        i += 1;
    }
    at == len
}

/// Fields of a fixed header with these of its own.
pub const fn fields(own: &[Field]) -> usize {
    own.len() + PREAMBLE.len() + 1
}

/// A fixed header of `len` bytes: what every one begins with, its own fields, the checksum.
pub const fn header<const N: usize>(own: &[Field], len: usize) -> [Field; N] {
    assert!(N == fields(own), "N is not the number of fields");
    let mut all = [checksum(len); N];
    let mut i = 0;
    while i < N - 1 {
        all[i] = if i < PREAMBLE.len() {
            PREAMBLE[i]
        } else {
            own[i - PREAMBLE.len()]
        };
        i += 1;
    }
    assert!(covers(&all, len), "the fields leave a gap or overlap");
    all
}

/// The checksum that ends a fixed header of `len` bytes.
pub const fn checksum(len: usize) -> Field {
    Field::new("checksum", len - CHECKSUM_LEN, CHECKSUM_LEN)
}

/// What identifies a format and its newest version.
#[derive(Debug, Clone, Copy)]
pub struct Format {
    /// Name in findings.
    pub what: &'static str,
    pub magic: [u8; 8],
    pub version: u16,
    /// Bytes of the fixed header, checksum included; at most `u16::MAX`.
    pub header_len: usize,
    /// Fields that must be zero.
    pub reserved: &'static [Field],
}

impl Format {
    /// Writes magic, version, header length and flags.
    pub fn begin(&self, header: &mut [u8], flags: u32) {
        let header_len = u16::try_from(self.header_len).expect("invariant: a header is short");
        MAGIC.put(header, &self.magic);
        VERSION.put(header, &self.version.to_le_bytes());
        HEADER_LEN.put(header, &header_len.to_le_bytes());
        FLAGS.put(header, &flags.to_le_bytes());
    }

    /// Writes the checksum over everything before it.
    pub fn finish(&self, header: &mut [u8]) {
        let (covered, checksum) =
            header[..self.header_len].split_at_mut(self.header_len - CHECKSUM_LEN);
        checksum.copy_from_slice(&xxh3_64(covered).to_le_bytes());
    }

    /// Verifies length, magic, version, header length, reserved bytes and checksum, in this order,
    /// and returns the header's bytes. Flags and all other fields are the caller's to check.
    pub fn open<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], FormatError> {
        let what = self.what;
        let header = bytes.get(..self.header_len).ok_or(FormatError::Truncated {
            what,
            need: self.header_len,
            have: bytes.len(),
        })?;
        let found = MAGIC.array(header);
        if found != self.magic {
            return Err(FormatError::Magic {
                what,
                expected: self.magic,
                found,
            });
        }
        let version = VERSION.u16(header);
        if version != self.version {
            return Err(FormatError::Version {
                what,
                found: version,
                min: self.version,
                max: self.version,
            });
        }
        self.require(
            usize::from(HEADER_LEN.u16(header)) == self.header_len,
            HEADER_LEN,
            "not the length that this version has",
        )?;
        for field in self.reserved {
            let bytes = &header[field.offset..field.end()];
            self.require(bytes.iter().all(|byte| *byte == 0), *field, "not zero")?;
        }
        let (covered, found) = header.split_at(self.header_len - CHECKSUM_LEN);
        let found = checksum(CHECKSUM_LEN).u64(found);
        let computed = xxh3_64(covered);
        if found != computed {
            return Err(FormatError::Checksum {
                what,
                computed,
                found,
            });
        }
        Ok(header)
    }

    /// `Limit` finding for `field` unless `value` is at most `limit`.
    pub(crate) fn at_most(&self, field: Field, value: u64, limit: u64) -> Result<(), FormatError> {
        if value <= limit {
            return Ok(());
        }
        Err(FormatError::Limit {
            what: self.what,
            field: field.name,
            value,
            limit,
        })
    }

    /// `Field` finding unless `ok`.
    pub(crate) fn require(
        &self,
        ok: bool,
        field: Field,
        reason: &'static str,
    ) -> Result<(), FormatError> {
        if ok {
            Ok(())
        } else {
            Err(self.finding(field, reason))
        }
    }

    /// `Field` finding.
    pub(crate) fn finding(&self, field: Field, reason: &'static str) -> FormatError {
        FormatError::Field {
            what: self.what,
            field: field.name,
            reason,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_an_overlap_and_a_short_layout_do_not_cover() {
        let a = Field::new("a", 0, 4);
        assert!(covers(&[a, Field::new("b", 4, 4)], 8));
        assert!(!covers(&[a, Field::new("b", 5, 3)], 8));
        assert!(!covers(&[a, Field::new("b", 3, 5)], 8));
        assert!(!covers(&[a], 8));
        assert!(!covers(&[a, Field::new("b", 4, 0)], 4));
    }
}
