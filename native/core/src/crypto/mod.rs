//! Keys, suites and seals. Our SM4 and a library's AES behind one seam.
//!
//! Key tree: group key --HKDF(salt = incarnation salt)--> incarnation key --HKDF-Expand(frame
//! number)--> frame key. One frame can be disclosed without the others. Suites: SM4-GCM with
//! HKDF-SM3 (national), AES-256-GCM with HKDF-SHA-256. The nonce is frame number (u32), cell index
//! (u32; `u32::MAX` for the header tag) and the frame's 32 random bits, each little-endian.
//!
//! A (key, nonce) pair must never seal twice: a frame number is used once in an incarnation, a
//! cell index once in a frame. The random bits are the second line, for a machine that was rolled
//! back with its numbering.

mod cipher;
mod kdf;
pub mod sm4;

use std::fmt;
use std::sync::Arc;

use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

pub use cipher::{FrameCipher, Gcm, NONCE_LEN};
use kdf::Hkdf;

use crate::types::{FrameNo, GroupId, IncarnationId};

pub const TAG_LEN: usize = 16;
/// Cell index of the header tag's nonce.
pub const HEADER_CELL: u32 = u32::MAX;

/// Bytes of HKDF's `info` before the fields of the incarnation key.
const INCARNATION_INFO: &[u8] = b"ebbtide incarnation v1\0";
/// Bytes of HKDF's `info` before the frame number.
const FRAME_INFO: &[u8] = b"ebbtide frame v1\0";

/// Which algorithms seal a frame. Values are on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Suite {
    /// SM4-GCM (GB/T 32907, RFC 8998), HKDF with SM3.
    Sm4Gcm = 1,
    /// AES-256-GCM, HKDF with SHA-256.
    Aes256Gcm = 2,
}

/// Numbers of the suites; `docs/format/frame.md` holds the same table.
pub const SUITE_VALUES: &[(&str, u64)] = &[
    ("SM4-GCM", Suite::Sm4Gcm as u64),
    ("AES-256-GCM", Suite::Aes256Gcm as u64),
];

impl Suite {
    /// Bytes of a frame key.
    pub fn key_len(self) -> usize {
        match self {
            Self::Sm4Gcm => 16,
            Self::Aes256Gcm => 32,
        }
    }
}

impl TryFrom<u16> for Suite {
    type Error = CryptoError;

    fn try_from(value: u16) -> Result<Self, CryptoError> {
        match value {
            1 => Ok(Self::Sm4Gcm),
            2 => Ok(Self::Aes256Gcm),
            _ => Err(CryptoError::UnknownSuite(value)),
        }
    }
}

/// What goes wrong with keys and seals. Says nothing about the bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CryptoError {
    #[error("authentication failed: wrong key, or the bytes were changed")]
    InvalidTag,
    #[error("suite {0} is unknown")]
    UnknownSuite(u16),
    #[error("the operating system gave no random bytes")]
    NoRandom,
    #[error("the text has a length that the mode cannot have")]
    TextLength,
}

/// Bytes from the operating system's generator.
pub fn random_bytes<const N: usize>() -> Result<[u8; N], CryptoError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|_| CryptoError::NoRandom)?;
    Ok(bytes)
}

/// 32 bytes from which the keys of all incarnations of a group are derived.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct GroupKey(pub [u8; 32]);

impl fmt::Debug for GroupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GroupKey(..)")
    }
}

/// Key of one incarnation; makes the sealing keys of its frames. Clones share one copy.
#[derive(Clone)]
pub struct IncarnationKey {
    suite: Suite,
    hkdf: Arc<Hkdf>,
}

impl fmt::Debug for IncarnationKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IncarnationKey")
            .field("suite", &self.suite)
            .finish_non_exhaustive()
    }
}

impl IncarnationKey {
    /// HKDF-Extract(salt, group key), then HKDF-Expand to 32 bytes with
    /// `"ebbtide incarnation v1\0" | suite u16 | group | incarnation` (RFC 5869).
    pub fn derive(
        suite: Suite,
        group_key: &GroupKey,
        group: GroupId,
        incarnation: IncarnationId,
        salt: &[u8; 32],
    ) -> Self {
        let mut key = Zeroizing::new([0u8; 32]);
        let info = [
            INCARNATION_INFO,
            &(suite as u16).to_le_bytes(),
            &group.0,
            &incarnation.0,
        ];
        Hkdf::extract(suite, salt, &group_key.0).expand(&info, &mut *key);
        Self {
            suite,
            hkdf: Arc::new(Hkdf::from_key(suite, &key)),
        }
    }

    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// The cipher of one frame, key schedule done. The key is HKDF-Expand with the incarnation key
    /// and `"ebbtide frame v1\0" | frame number u32`.
    pub fn frame(&self, frame_no: FrameNo, nonce_random: u32) -> FrameCipher {
        let mut key = Zeroizing::new([0u8; 32]);
        let key = &mut key[..self.suite.key_len()];
        self.hkdf
            .expand(&[FRAME_INFO, &frame_no.0.to_le_bytes()], key);
        FrameCipher::new(self.suite, key, frame_no, nonce_random)
    }
}

#[cfg(test)]
mod tests;
