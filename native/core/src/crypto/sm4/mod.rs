//! SM4 (GB/T 32907) in GCM, CTR, CBC and XTS, with kernels that are chosen at run time.
//!
//! | kernel | S-box | blocks in flight | GHASH |
//! |---|---|---|---|
//! | `gfni512` | GFNI on 512 bits | 64 | VPCLMULQDQ on 512 bits |
//! | `gfni256` | GFNI on 256 bits | 16 | VPCLMULQDQ on 256 bits |
//! | `gfni256-pclmul` | GFNI on 256 bits | 16 | PCLMULQDQ |
//! | `aesni` | AESENCLAST between affine maps, AVX2 | 16 | PCLMULQDQ |
//! | `portable` | a circuit of logic gates, bit-sliced | 64 | integer products |
//!
//! None has an index or a branch that depends on a key or a text, in the key schedule neither: the
//! S-box is computed. SM4's S-box is inversion in GF(2^8) between two affine maps. All fields of
//! 2^8 elements are one field in different coordinates, so AES's inversion serves after a change
//! of coordinates, which the affine maps absorb.
//!
//! The best kernel that the processor has is taken, or the one that `EBB_SM4_KERNEL` names.
//! `kernel.rs` knows which there are; `wide*.rs` are what the vector kernels share,
//! `lanes*.rs` are their vectors; `gcm.rs`, `modes.rs` and `xts.rs` are the modes, which know no
//! kernel by name.

// Not a bad idea here: see `wide.rs`.
#![allow(clippy::inline_always)]

mod gcm;
#[cfg(target_arch = "x86_64")]
mod gfni;
mod kernel;
#[cfg(target_arch = "x86_64")]
mod lanes;
#[cfg(target_arch = "x86_64")]
mod lanes256;
#[cfg(target_arch = "x86_64")]
mod lanes512;
mod modes;
mod portable;
mod portable_ghash;
#[cfg(target_arch = "x86_64")]
mod wide;
#[cfg(target_arch = "x86_64")]
mod wide_gcm;
#[cfg(target_arch = "x86_64")]
mod wide_xts;
mod xts;

use zeroize::{Zeroize, ZeroizeOnDrop};

pub use gcm::Gcm;
pub use kernel::{KERNEL_VARIABLE, Kernel, KernelError};
pub use modes::{Cbc, Ctr};
pub use xts::{Xts, XtsStandard};

/// Bytes of a block.
pub const BLOCK_LEN: usize = 16;
/// Bytes of a key.
pub const KEY_LEN: usize = 16;

/// Powers of the GHASH key that are kept: one for each block between two reductions.
const POWERS: usize = 64;

/// The system parameter FK of the key schedule.
const FK: [u32; 4] = [0xa3b1_bac6, 0x56aa_3350, 0x677d_9197, 0xb270_22dc];

/// The fixed parameters CK: byte `j` of word `i` is 7 (4 i + j) modulo 256.
const CK: [u32; 32] = {
    let mut ck = [0u32; 32];
    let mut byte = 0u32;
    while byte < 128 {
        let i = (byte / 4) as usize;
        ck[i] = (ck[i] << 8) | ((byte * 7) & 0xff);
        byte += 1;
    }
    ck
};

/// The 32 round keys, in the order of encryption.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
struct RoundKeys([u32; 32]);

impl RoundKeys {
    /// For decryption: the same rounds, the keys backwards.
    fn reversed(&self) -> Self {
        let mut keys = self.clone();
        keys.0.reverse();
        keys
    }
}

/// Powers of the GHASH key, the highest first, so that the last `n` belong to `n` blocks: entry
/// `POWERS - n` is H^n x. A power is a block read as big-endian number; the factor x makes the
/// product of two such numbers come out right (the form of POLYVAL, RFC 8452, appendix A).
/// A kernel fills in as many as it reads, from the end. Not aligned to vectors: who embeds a key,
/// such as an object of Python's, need not know of it.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
struct Powers([u128; POWERS]);

impl Powers {
    /// H x: shifted by one in GHASH's order of bits, reduced without a branch.
    fn first(hash_key: u128) -> u128 {
        let carry = (hash_key >> 127).wrapping_neg();
        (hash_key << 1) ^ (carry & 0xc200_0000_0000_0000_0000_0000_0000_0001)
    }
}

/// The four big-endian words of a block.
#[inline(always)]
fn words(block: &[u8; BLOCK_LEN]) -> [u32; 4] {
    let number = u128::from_be_bytes(*block);
    #[expect(clippy::cast_possible_truncation, reason = "cuts the word out")]
    [96, 64, 32, 0].map(|shift| (number >> shift) as u32)
}

/// `text` ^= `pad`, as far as both go.
#[inline(always)]
fn xor_in_place(text: &mut [u8], pad: &[u8]) {
    for (byte, pad) in text.iter_mut().zip(pad) {
        *byte ^= pad;
    }
}

#[cfg(test)]
mod tests;
