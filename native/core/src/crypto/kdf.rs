//! HKDF (RFC 5869) over the hash of a suite.

use sha2::Sha256;
use sm3::Sm3;

use super::Suite;

/// The expanding half of HKDF, keyed: a pseudorandom key with its HMAC state made.
pub(super) enum Hkdf {
    Sm3(hkdf::Hkdf<Sm3>),
    Sha256(hkdf::Hkdf<Sha256>),
}

impl Hkdf {
    /// HKDF-Extract.
    pub(super) fn extract(suite: Suite, salt: &[u8], secret: &[u8]) -> Self {
        match suite {
            Suite::Sm4Gcm => Self::Sm3(hkdf::Hkdf::new(Some(salt), secret)),
            Suite::Aes256Gcm => Self::Sha256(hkdf::Hkdf::new(Some(salt), secret)),
        }
    }

    /// A key that is uniform already, used as pseudorandom key.
    pub(super) fn from_key(suite: Suite, key: &[u8; 32]) -> Self {
        const FITS: &str = "invariant: both hashes have 32 bytes";
        match suite {
            Suite::Sm4Gcm => Self::Sm3(hkdf::Hkdf::from_prk(key).expect(FITS)),
            Suite::Aes256Gcm => Self::Sha256(hkdf::Hkdf::from_prk(key).expect(FITS)),
        }
    }

    /// HKDF-Expand with the concatenation of `info`. `out` is at most 255 hashes long.
    pub(super) fn expand(&self, info: &[&[u8]], out: &mut [u8]) {
        match self {
            Self::Sm3(hkdf) => hkdf.expand_multi_info(info, out),
            Self::Sha256(hkdf) => hkdf.expand_multi_info(info, out),
        }
        .expect("invariant: keys are shorter than 255 hashes");
    }
}
