//! GCM with the two block ciphers (NIST SP 800-38D; 96-bit nonce, 128-bit tag).

use std::fmt;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use super::{CryptoError, Suite, TAG_LEN, sm4};
use crate::types::FrameNo;

pub const NONCE_LEN: usize = 12;

/// GCM with one key of one suite: our SM4, a library's AES. Frames use it through `FrameCipher`,
/// which makes the nonces.
pub enum Gcm {
    Sm4(Box<sm4::Gcm>),
    Aes256(Box<LessSafeKey>),
}

impl fmt::Debug for Gcm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gcm(..)")
    }
}

impl Gcm {
    /// `key` has the suite's length.
    pub fn new(suite: Suite, key: &[u8]) -> Self {
        const FITS: &str = "invariant: the key has the suite's length";
        match suite {
            Suite::Sm4Gcm => {
                let kernel = sm4::Kernel::chosen()
                    .expect("invariant: who starts the process has asked for the kernel");
                let key = key.try_into().expect(FITS);
                Self::Sm4(Box::new(sm4::Gcm::new(kernel, key)))
            }
            Suite::Aes256Gcm => {
                let key = UnboundKey::new(&AES_256_GCM, key).expect(FITS);
                Self::Aes256(Box::new(LessSafeKey::new(key)))
            }
        }
    }

    /// Encrypts `buffer` in place and returns its tag. Once only for each `nonce`.
    pub fn seal(&self, nonce: [u8; NONCE_LEN], aad: &[u8], buffer: &mut [u8]) -> [u8; TAG_LEN] {
        const SHORT: &str = "invariant: a cell is far below GCM's limit of 64 GiB";
        match self {
            Self::Sm4(gcm) => gcm.seal(&nonce, aad, buffer),
            Self::Aes256(key) => {
                let nonce = Nonce::assume_unique_for_key(nonce);
                let tag = key.seal_in_place_separate_tag(nonce, Aad::from(aad), buffer);
                let tag = tag.expect(SHORT);
                tag.as_ref()
                    .try_into()
                    .expect("invariant: GCM's tag has 16 bytes")
            }
        }
    }

    /// Decrypts `buffer` in place; its content is unspecified after an error, but never the text.
    pub fn open(
        &self,
        nonce: [u8; NONCE_LEN],
        aad: &[u8],
        buffer: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<(), CryptoError> {
        match self {
            Self::Sm4(gcm) => gcm.open(&nonce, aad, buffer, tag),
            Self::Aes256(key) => {
                let nonce = Nonce::assume_unique_for_key(nonce);
                key.open_in_place_separate_tag(nonce, Aad::from(aad), (*tag).into(), buffer, 0..)
                    .map(|_| ())
                    .map_err(|_| CryptoError::InvalidTag)
            }
        }
    }
}

/// Seals and opens the cells of one frame.
pub struct FrameCipher {
    gcm: Gcm,
    frame_no: FrameNo,
    nonce_random: u32,
}

impl fmt::Debug for FrameCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameCipher")
            .field("frame_no", &self.frame_no)
            .finish_non_exhaustive()
    }
}

impl FrameCipher {
    pub(super) fn new(suite: Suite, key: &[u8], frame_no: FrameNo, nonce_random: u32) -> Self {
        Self {
            gcm: Gcm::new(suite, key),
            frame_no,
            nonce_random,
        }
    }

    /// Encrypts `buffer` in place and returns its tag. Once only for each `cell`.
    pub fn seal(&self, cell: u32, aad: &[u8], buffer: &mut [u8]) -> [u8; TAG_LEN] {
        self.gcm.seal(self.nonce(cell), aad, buffer)
    }

    /// Decrypts `buffer` in place; its content is unspecified after an error.
    pub fn open(
        &self,
        cell: u32,
        aad: &[u8],
        buffer: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<(), CryptoError> {
        self.gcm.open(self.nonce(cell), aad, buffer, tag)
    }

    fn nonce(&self, cell: u32) -> [u8; NONCE_LEN] {
        let mut nonce = [0; NONCE_LEN];
        nonce[..4].copy_from_slice(&self.frame_no.0.to_le_bytes());
        nonce[4..8].copy_from_slice(&cell.to_le_bytes());
        nonce[8..].copy_from_slice(&self.nonce_random.to_le_bytes());
        nonce
    }
}

#[cfg(test)]
pub(super) mod raw {
    //! The seam without frames, for published vectors.

    use super::{CryptoError, Gcm, NONCE_LEN, Suite, TAG_LEN};

    pub fn seal(
        suite: Suite,
        key: &[u8],
        nonce: [u8; NONCE_LEN],
        aad: &[u8],
        buffer: &mut [u8],
    ) -> [u8; TAG_LEN] {
        Gcm::new(suite, key).seal(nonce, aad, buffer)
    }

    pub fn open(
        suite: Suite,
        key: &[u8],
        nonce: [u8; NONCE_LEN],
        aad: &[u8],
        buffer: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<(), CryptoError> {
        Gcm::new(suite, key).open(nonce, aad, buffer, tag)
    }
}
