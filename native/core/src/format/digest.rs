//! SHA-256: what binds a frame to its header, its table and its predecessor.

use sha2::{Digest as _, Sha256};

/// 32 bytes of SHA-256.
pub type Digest = [u8; 32];

/// SHA-256 of `bytes` (FIPS 180-4).
pub fn sha256(bytes: &[u8]) -> Digest {
    Sha256::digest(bytes).into()
}
