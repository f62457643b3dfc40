//! LEB128 and zigzag integers of at most 64 bits; overlong forms are refused.

use super::FormatError;

/// Most bytes of one varint.
pub const VARINT_LEN_MAX: usize = 10;

/// Appends `value`, 7 bits a byte, lowest first; the top bit says that more follow.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

/// Appends a signed value: 0, -1, 1, -2, ... become 0, 1, 2, 3, ...
pub fn put_zigzag(out: &mut Vec<u8>, value: i64) {
    put_varint(
        out,
        (value.cast_unsigned() << 1) ^ (value >> 63).cast_unsigned(),
    );
}

/// Reads from the front of foreign bytes; `what` names the structure in findings.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    what: &'static str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, bytes, at: 0 }
    }

    /// Bytes not yet read.
    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub fn take(&mut self, len: usize) -> Result<&'a [u8], FormatError> {
        if len > self.remaining() {
            return Err(FormatError::Truncated {
                what: self.what,
                need: self.at.saturating_add(len),
                have: self.bytes.len(),
            });
        }
        let taken = &self.bytes[self.at..self.at + len];
        self.at += len;
        Ok(taken)
    }

    pub fn u8(&mut self) -> Result<u8, FormatError> {
        Ok(self.take(1)?[0])
    }

    /// 24 bits, lowest byte first.
    pub fn u24(&mut self) -> Result<u32, FormatError> {
        let bytes = self.take(3)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]))
    }

    pub fn varint(&mut self, field: &'static str) -> Result<u64, FormatError> {
        let mut value = 0u64;
        for index in 0..VARINT_LEN_MAX {
            let byte = self.u8()?;
            let last = index == VARINT_LEN_MAX - 1;
            if last && byte > 1 {
                return Err(self.malformed(field, "more than 64 bits"));
            }
            value |= u64::from(byte & 0x7f) << (7 * index);
            if byte < 0x80 {
                if byte == 0 && index > 0 {
                    return Err(self.malformed(field, "longer than it needs to be"));
                }
                return Ok(value);
            }
        }
        Err(self.malformed(field, "more than 64 bits"))
    }

    pub fn zigzag(&mut self, field: &'static str) -> Result<i64, FormatError> {
        let value = self.varint(field)?;
        Ok((value >> 1).cast_signed() ^ -(value & 1).cast_signed())
    }

    /// A varint of at most `limit`.
    pub fn varint_at_most(&mut self, field: &'static str, limit: u64) -> Result<u64, FormatError> {
        let value = self.varint(field)?;
        if value > limit {
            return Err(FormatError::Limit {
                what: self.what,
                field,
                value,
                limit,
            });
        }
        Ok(value)
    }

    /// One byte of length, then so much UTF-8.
    pub fn text(&mut self, field: &'static str) -> Result<&'a str, FormatError> {
        let len = usize::from(self.u8()?);
        let bytes = self.take(len)?;
        std::str::from_utf8(bytes).map_err(|_| self.malformed(field, "not UTF-8"))
    }

    /// A finding about what was just read.
    pub fn malformed(&self, field: &'static str, reason: &'static str) -> FormatError {
        FormatError::Field {
            what: self.what,
            field,
            reason,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn varint(bytes: &[u8]) -> Result<u64, FormatError> {
        Reader::new("test", bytes).varint("v")
    }

    #[test]
    fn limits_and_overlong_forms() {
        let mut max = vec![0xff; 9];
        max.push(1);
        assert_eq!(varint(&max), Ok(u64::MAX));
        max[9] = 2;
        assert!(varint(&max).is_err(), "a 65th bit");
        max[9] = 0x81;
        max.push(0);
        assert!(varint(&max).is_err(), "an eleventh byte");
        assert!(varint(&[0x80, 0x00]).is_err(), "overlong zero");
        assert!(varint(&[0x81, 0x80, 0x00]).is_err(), "overlong one");
        assert!(varint(&[0x80]).is_err(), "cut");
        assert!(varint(&[]).is_err(), "empty");
        assert_eq!(varint(&[0]), Ok(0));
    }

    proptest! {
        #[test]
        fn round_trip(values in prop::collection::vec((any::<u64>(), 0u32..64), 1..50)) {
            let mut bytes = Vec::new();
            for &(value, shift) in &values {
                put_varint(&mut bytes, value >> shift);
                put_zigzag(&mut bytes, value.cast_signed() >> shift);
            }
            let mut reader = Reader::new("test", &bytes);
            for &(value, shift) in &values {
                prop_assert_eq!(reader.varint("v"), Ok(value >> shift));
                prop_assert_eq!(reader.zigzag("z"), Ok(value.cast_signed() >> shift));
            }
            prop_assert_eq!(reader.remaining(), 0);
        }

        /// One value has one form.
        #[test]
        fn what_is_read_is_written_alike(bytes in prop::collection::vec(any::<u8>(), 0..12)) {
            let mut reader = Reader::new("test", &bytes);
            if let Ok(value) = reader.varint("v") {
                let mut again = Vec::new();
                put_varint(&mut again, value);
                prop_assert_eq!(&bytes[..bytes.len() - reader.remaining()], &again[..]);
            }
        }
    }
}
