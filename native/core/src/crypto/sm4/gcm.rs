//! GCM (NIST SP 800-38D, RFC 8998) with nonces of 96 bits and tags of 128.

use std::fmt;

use zeroize::Zeroize;

use super::kernel::GcmStart;
use super::{BLOCK_LEN, KEY_LEN, Kernel, Powers, RoundKeys};
use crate::crypto::{CryptoError, TAG_LEN};

/// Bytes of a nonce.
pub const NONCE_LEN: usize = 12;
/// Longest text: the counter has 32 bits, and two of its values are not for text.
const TEXT_LEN_MAX: u64 = (1 << 36) - 32;

/// One key.
pub struct Gcm {
    kernel: Kernel,
    keys: RoundKeys,
    powers: Powers,
}

impl fmt::Debug for Gcm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gcm")
            .field("kernel", &self.kernel)
            .finish_non_exhaustive()
    }
}

impl Gcm {
    pub fn new(kernel: Kernel, key: &[u8; KEY_LEN]) -> Self {
        let keys = kernel.expand(key);
        let mut hash_key = kernel.block(&keys, [0; BLOCK_LEN]);
        let powers = kernel.powers(u128::from_be_bytes(hash_key));
        hash_key.zeroize();
        Self {
            kernel,
            keys,
            powers,
        }
    }

    /// Encrypts `text` in place and returns its tag.
    pub fn seal(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], text: &mut [u8]) -> [u8; TAG_LEN] {
        self.run::<true>(nonce, aad, text)
    }

    /// Decrypts `text` in place. It is zeros after an error: nothing leaves that was not
    /// authenticated.
    pub fn open(
        &self,
        nonce: &[u8; NONCE_LEN],
        aad: &[u8],
        text: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<(), CryptoError> {
        let expected = self.run::<false>(nonce, aad, text);
        // The number of equal bytes must not show in the time taken.
        let difference = u128::from_ne_bytes(expected) ^ u128::from_ne_bytes(*tag);
        if std::hint::black_box(difference) == 0 {
            return Ok(());
        }
        text.fill(0);
        Err(CryptoError::InvalidTag)
    }

    fn run<const SEAL: bool>(
        &self,
        nonce: &[u8; NONCE_LEN],
        aad: &[u8],
        text: &mut [u8],
    ) -> [u8; TAG_LEN] {
        assert!(text.len() as u64 <= TEXT_LEN_MAX, "GCM's limit of 64 GiB");
        let mut counter = [0; BLOCK_LEN];
        counter[..NONCE_LEN].copy_from_slice(nonce);
        counter[BLOCK_LEN - 1] = 1;
        let start = GcmStart {
            counter,
            hash: self.kernel.ghash(&self.powers, 0, aad),
            lengths: (aad.len() as u128 * 8) << 64 | (text.len() as u128 * 8),
        };
        let tag = self
            .kernel
            .gcm::<SEAL>(&self.keys, &self.powers, &start, text);
        tag.to_be_bytes()
    }
}
