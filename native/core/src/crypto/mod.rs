//! Keys, suites and seals. A library's ciphers behind one seam; own SM4 kernels take the same place.
//!
//! Key tree: group key --HKDF(salt = incarnation salt)--> incarnation key --HKDF-Expand(frame
//! number)--> frame key. One frame can be disclosed without the others. Suites: SM4-GCM with
//! HKDF-SM3 (national), AES-256-GCM with HKDF-SHA-256. The nonce is frame number (u32), cell index
//! (u32; `u32::MAX` for the header tag) and the frame's 32 random bits, each little-endian.

use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::types::{FrameNo, GroupId, IncarnationId};

pub const TAG_LEN: usize = 16;
/// Cell index of the header tag's nonce.
pub const HEADER_CELL: u32 = u32::MAX;

/// Which algorithms seal a frame. Values are on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Suite {
    /// SM4-GCM (GB/T 32907, RFC 8998), HKDF with SM3.
    Sm4Gcm = 1,
    /// AES-256-GCM, HKDF with SHA-256.
    Aes256Gcm = 2,
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
}

/// 32 bytes from which the keys of all incarnations of a group are derived.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct GroupKey(pub [u8; 32]);

impl std::fmt::Debug for GroupKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GroupKey(..)")
    }
}

/// Key of one incarnation; makes the sealing keys of its frames.
#[derive(Clone, Debug)]
pub struct IncarnationKey {
    _private: (),
}

impl IncarnationKey {
    pub fn derive(
        suite: Suite,
        group_key: &GroupKey,
        group: GroupId,
        incarnation: IncarnationId,
        salt: &[u8; 32],
    ) -> Self {
        let _ = (suite, group_key, group, incarnation, salt);
        todo!()
    }

    /// The cipher of one frame, key schedule done.
    pub fn frame(&self, frame_no: FrameNo, nonce_random: u32) -> FrameCipher {
        let _ = (frame_no, nonce_random);
        todo!()
    }
}

/// Seals and opens the cells of one frame.
#[derive(Debug)]
pub struct FrameCipher {
    _private: (),
}

impl FrameCipher {
    /// Encrypts `buffer` in place and returns its tag.
    pub fn seal(&self, cell: u32, aad: &[u8], buffer: &mut [u8]) -> [u8; TAG_LEN] {
        let _ = (cell, aad, buffer);
        todo!()
    }

    /// Decrypts `buffer` in place; its content is unspecified after an error.
    pub fn open(
        &self,
        cell: u32,
        aad: &[u8],
        buffer: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<(), CryptoError> {
        let _ = (cell, aad, buffer, tag);
        todo!()
    }
}
