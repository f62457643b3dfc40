//! Which kernels there are, and which one is used.
#![allow(unsafe_code)]

use std::fmt;
use std::sync::OnceLock;

use super::{BLOCK_LEN, KEY_LEN, Powers, RoundKeys, portable};

/// Environment variable that names the kernel to use instead of the best one.
pub const KERNEL_VARIABLE: &str = "EBB_SM4_KERNEL";

/// What a kernel offers to the modes. Callers have checked the processor.
pub(super) struct Operations {
    pub name: &'static str,
    pub is_supported: fn() -> bool,
    /// Key schedule.
    pub expand: unsafe fn(&[u8; KEY_LEN]) -> RoundKeys,
    /// The bare cipher on whole blocks.
    pub blocks: unsafe fn(&RoundKeys, &mut [u8]),
    /// XOR with the cipher of a counter block whose last four bytes count up, modulo 2^32.
    pub ctr32: unsafe fn(&RoundKeys, &[u8; BLOCK_LEN], &mut [u8]),
    /// Powers of a GHASH key.
    pub powers: unsafe fn(u128) -> Powers,
    /// GHASH goes on over bytes, the last block completed with zeros.
    pub ghash: unsafe fn(&Powers, u128, &[u8]) -> u128,
    /// `ctr32` and GHASH of the ciphertext, which is what comes out, and of the block of lengths.
    /// Returns the tag.
    pub seal: unsafe fn(&RoundKeys, &Powers, &GcmStart, &mut [u8]) -> u128,
    /// The same, where the ciphertext is what goes in.
    pub open: unsafe fn(&RoundKeys, &Powers, &GcmStart, &mut [u8]) -> u128,
    /// XTS on whole blocks, tweaks as IEEE 1619 orders them. Returns the next block's.
    pub xts_ieee: unsafe fn(&RoundKeys, u128, &mut [u8]) -> u128,
    /// The same in the order of GB/T 17964; `tweak` has the bits of each byte turned around.
    pub xts_gb: unsafe fn(&RoundKeys, u128, &mut [u8]) -> u128,
}

/// Where the text of a GCM message begins.
pub(super) struct GcmStart {
    /// Counter block that masks the hash; that of the first block of text is the next one.
    pub counter: [u8; BLOCK_LEN],
    /// GHASH after the additional data.
    pub hash: u128,
    /// The block of lengths.
    pub lengths: u128,
}

/// Best first.
static ALL: &[&Operations] = &[
    #[cfg(target_arch = "x86_64")]
    &super::lanes512::gfni512::OPERATIONS,
    #[cfg(target_arch = "x86_64")]
    &super::lanes256::gfni256::OPERATIONS,
    #[cfg(target_arch = "x86_64")]
    &super::lanes256::gfni256_pclmul::OPERATIONS,
    #[cfg(target_arch = "x86_64")]
    &super::lanes256::aesni::OPERATIONS,
    &portable::OPERATIONS,
];

/// Why there is no such kernel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    #[error("SM4 kernel {name:?} is unknown; there are {}", names().join(", "))]
    Unknown { name: String },
    #[error(
        "this processor lacks what SM4 kernel {name:?} needs; it has {}",
        supported().join(", ")
    )]
    Unsupported { name: &'static str },
}

fn names() -> Vec<&'static str> {
    ALL.iter().map(|operations| operations.name).collect()
}

fn supported() -> Vec<&'static str> {
    Kernel::all().into_iter().map(Kernel::name).collect()
}

/// A kernel that this processor can run: there is no other way to get one than by checking.
#[derive(Clone, Copy)]
pub struct Kernel(&'static Operations);

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Kernel").field(&self.0.name).finish()
    }
}

impl PartialEq for Kernel {
    fn eq(&self, other: &Self) -> bool {
        self.0.name == other.0.name
    }
}

impl Eq for Kernel {}

impl Kernel {
    /// All that this processor can run, the best first.
    pub fn all() -> Vec<Self> {
        let supported = ALL.iter().filter(|operations| (operations.is_supported)());
        supported.map(|operations| Self(operations)).collect()
    }

    pub fn by_name(name: &str) -> Result<Self, KernelError> {
        let found = ALL.iter().find(|operations| operations.name == name);
        let operations = *found.ok_or_else(|| KernelError::Unknown { name: name.into() })?;
        if (operations.is_supported)() {
            Ok(Self(operations))
        } else {
            let name = operations.name;
            Err(KernelError::Unsupported { name })
        }
    }

    /// The one of this process: what `EBB_SM4_KERNEL` names, else the best. Decided once.
    pub fn chosen() -> Result<Self, KernelError> {
        static CHOSEN: OnceLock<Result<Kernel, KernelError>> = OnceLock::new();
        let choose = || match std::env::var_os(KERNEL_VARIABLE) {
            Some(name) if !name.is_empty() => Self::by_name(&name.to_string_lossy()),
            _ => Ok(Self::all()[0]),
        };
        CHOSEN.get_or_init(choose).clone()
    }

    pub fn name(self) -> &'static str {
        self.0.name
    }

    pub(super) fn expand(self, key: &[u8; KEY_LEN]) -> RoundKeys {
        // SAFETY: a Kernel exists only where `is_supported` said so.
        unsafe { (self.0.expand)(key) }
    }

    /// `text` has whole blocks.
    pub(super) fn blocks(self, keys: &RoundKeys, text: &mut [u8]) {
        assert!(text.len().is_multiple_of(BLOCK_LEN), "whole blocks");
        // SAFETY: a Kernel exists only where `is_supported` said so.
        unsafe { (self.0.blocks)(keys, text) }
    }

    /// The bare cipher on one block.
    pub(super) fn block(self, keys: &RoundKeys, mut block: [u8; BLOCK_LEN]) -> [u8; BLOCK_LEN] {
        self.blocks(keys, &mut block);
        block
    }

    pub(super) fn ctr32(self, keys: &RoundKeys, counter: &[u8; BLOCK_LEN], text: &mut [u8]) {
        // SAFETY: a Kernel exists only where `is_supported` said so.
        unsafe { (self.0.ctr32)(keys, counter, text) }
    }

    pub(super) fn powers(self, hash_key: u128) -> Powers {
        // SAFETY: a Kernel exists only where `is_supported` said so.
        unsafe { (self.0.powers)(hash_key) }
    }

    pub(super) fn ghash(self, powers: &Powers, hash: u128, bytes: &[u8]) -> u128 {
        // SAFETY: a Kernel exists only where `is_supported` said so.
        unsafe { (self.0.ghash)(powers, hash, bytes) }
    }

    pub(super) fn gcm<const SEAL: bool>(
        self,
        keys: &RoundKeys,
        powers: &Powers,
        start: &GcmStart,
        text: &mut [u8],
    ) -> u128 {
        let function = if SEAL { self.0.seal } else { self.0.open };
        // SAFETY: a Kernel exists only where `is_supported` said so.
        unsafe { function(keys, powers, start, text) }
    }

    /// `text` has whole blocks.
    pub(super) fn xts(self, gb: bool, keys: &RoundKeys, tweak: u128, text: &mut [u8]) -> u128 {
        assert!(text.len().is_multiple_of(BLOCK_LEN), "whole blocks");
        let function = if gb { self.0.xts_gb } else { self.0.xts_ieee };
        // SAFETY: a Kernel exists only where `is_supported` said so.
        unsafe { function(keys, tweak, text) }
    }
}
