//! XTS, for data that is read and written at random places: a tweak for each data unit (a sector,
//! a block of an overlay) and one for each block in it, ciphertext stealing for the last bytes.
//!
//! Both standards derive a block's tweak from the one before by multiplication with x modulo
//! x^128 + x^7 + x^2 + x + 1; they disagree on where the coefficients lie. IEEE 1619: x^0 is the
//! lowest bit of the first byte, multiplication moves bits up through the bytes. GB/T 17964-2021:
//! x^0 is the *highest* bit of the first byte, as in GCM. So a GB tweak is an IEEE tweak with the
//! bits of each byte turned around, and one kernel does both. The first block of a unit is the
//! same in both.

use std::fmt;

use super::{BLOCK_LEN, KEY_LEN, Kernel, RoundKeys};
use crate::crypto::CryptoError;

/// Whose order of bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XtsStandard {
    /// GB/T 17964-2021; the one for SM4.
    Gb,
    /// IEEE 1619.
    Ieee,
}

/// Tweaks of units that are encrypted in one go.
const GO: usize = 64;

/// A tweak times x.
#[inline(always)]
pub(super) fn double(tweak: u128) -> u128 {
    (tweak << 1) ^ ((tweak >> 127).wrapping_neg() & 0x87)
}

/// A tweak as bytes; kept as number it has IEEE's order.
#[inline(always)]
pub(super) fn to_bytes(tweak: u128, gb: bool) -> [u8; BLOCK_LEN] {
    // All bits turned around, then the bytes turned back.
    let tweak = if gb {
        tweak.reverse_bits().swap_bytes()
    } else {
        tweak
    };
    tweak.to_le_bytes()
}

fn from_bytes(tweak: [u8; BLOCK_LEN], gb: bool) -> u128 {
    let tweak = u128::from_le_bytes(tweak);
    if gb {
        tweak.reverse_bits().swap_bytes()
    } else {
        tweak
    }
}

/// One pair of keys.
pub struct Xts {
    kernel: Kernel,
    encryption: RoundKeys,
    decryption: RoundKeys,
    tweaks: RoundKeys,
    gb: bool,
}

impl fmt::Debug for Xts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Xts")
            .field("kernel", &self.kernel)
            .field("gb", &self.gb)
            .finish_non_exhaustive()
    }
}

impl Xts {
    /// The key for text and the key for tweaks; they must differ.
    pub fn new(
        kernel: Kernel,
        standard: XtsStandard,
        text_key: &[u8; KEY_LEN],
        tweak_key: &[u8; KEY_LEN],
    ) -> Self {
        let encryption = kernel.expand(text_key);
        Self {
            kernel,
            decryption: encryption.reversed(),
            encryption,
            tweaks: kernel.expand(tweak_key),
            gb: standard == XtsStandard::Gb,
        }
    }

    /// One data unit of at least 16 bytes.
    pub fn encrypt(&self, tweak: &[u8; BLOCK_LEN], unit: &mut [u8]) -> Result<(), CryptoError> {
        self.unit::<true>(self.kernel.block(&self.tweaks, *tweak), unit)
    }

    /// One data unit of at least 16 bytes.
    pub fn decrypt(&self, tweak: &[u8; BLOCK_LEN], unit: &mut [u8]) -> Result<(), CryptoError> {
        self.unit::<false>(self.kernel.block(&self.tweaks, *tweak), unit)
    }

    /// Consecutive data units of `unit_len`; tweaks are their numbers, little-endian.
    pub fn encrypt_units(
        &self,
        first: u64,
        unit_len: usize,
        text: &mut [u8],
    ) -> Result<(), CryptoError> {
        self.units::<true>(first, unit_len, text)
    }

    /// The reverse of `encrypt_units`.
    pub fn decrypt_units(
        &self,
        first: u64,
        unit_len: usize,
        text: &mut [u8],
    ) -> Result<(), CryptoError> {
        self.units::<false>(first, unit_len, text)
    }

    fn units<const ENCRYPT: bool>(
        &self,
        first: u64,
        unit_len: usize,
        text: &mut [u8],
    ) -> Result<(), CryptoError> {
        if unit_len < BLOCK_LEN || !text.len().is_multiple_of(unit_len) {
            return Err(CryptoError::TextLength);
        }
        let mut number = u128::from(first);
        for go in text.chunks_mut(GO * unit_len) {
            let mut tweaks = [0; GO * BLOCK_LEN];
            let tweaks = &mut tweaks[..go.len() / unit_len * BLOCK_LEN];
            for tweak in tweaks.as_chunks_mut().0 {
                *tweak = number.to_le_bytes();
                number += 1;
            }
            self.kernel.blocks(&self.tweaks, tweaks);
            for (unit, tweak) in go.chunks_mut(unit_len).zip(tweaks.as_chunks().0) {
                self.unit::<ENCRYPT>(*tweak, unit)?;
            }
        }
        Ok(())
    }

    /// `tweak` is encrypted already.
    fn unit<const ENCRYPT: bool>(
        &self,
        tweak: [u8; BLOCK_LEN],
        unit: &mut [u8],
    ) -> Result<(), CryptoError> {
        if unit.len() < BLOCK_LEN {
            return Err(CryptoError::TextLength);
        }
        let keys = if ENCRYPT {
            &self.encryption
        } else {
            &self.decryption
        };
        let xts = |tweak, text: &mut [u8]| self.kernel.xts(self.gb, keys, tweak, text);
        let tweak = from_bytes(tweak, self.gb);
        let stolen = unit.len() % BLOCK_LEN;
        if stolen == 0 {
            xts(tweak, unit);
            return Ok(());
        }
        // The last whole block goes through twice, the second time with the bytes after it in
        // front; what it gives away for them ends the unit.
        let (whole, last) = unit.split_at_mut(unit.len() - BLOCK_LEN - stolen);
        let tweak = xts(tweak, whole);
        let (first, second) = if ENCRYPT {
            (tweak, double(tweak))
        } else {
            (double(tweak), tweak)
        };
        let (block, end) = last.split_at_mut(BLOCK_LEN);
        xts(first, block);
        block[..stolen].swap_with_slice(end);
        xts(second, block);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition of GB/T 17964: the block shifted right as a string of bits, 0xe1 where a one
    /// fell out.
    #[test]
    fn a_gb_tweak_doubles_from_the_left() {
        let mut tweak = from_bytes(*b"\x01sixteen bytes!\x81", true);
        for _ in 0..300 {
            let before = u128::from_be_bytes(to_bytes(tweak, true));
            let carry = if before & 1 == 1 { 0xe1 << 120 } else { 0 };
            tweak = double(tweak);
            assert_eq!(to_bytes(tweak, true), ((before >> 1) ^ carry).to_be_bytes());
        }
    }
}
