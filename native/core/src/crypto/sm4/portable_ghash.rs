//! GHASH with integer products, for any processor.
//!
//! A carry-less product of two numbers is their integer product without the carries. So bits are
//! spread out: with every fourth bit kept, up to 15 ones meet in a place before they spill into
//! the next one that counts. Multiplication takes the same time for all numbers on processors of
//! this century.

use super::{BLOCK_LEN, POWERS, Powers};

/// Every fourth bit.
const FOURTHS: [u64; 4] = [
    0x1111_1111_1111_1111,
    0x2222_2222_2222_2222,
    0x4444_4444_4444_4444,
    0x8888_8888_8888_8888,
];

/// Carry-less product.
#[inline(always)]
fn product(a: u64, b: u64) -> u128 {
    // 16 ones could meet where all of `b`'s do; its top four bits are taken one by one.
    let top = b >> 60;
    let a_parts = FOURTHS.map(|mask| u128::from(a & mask));
    let b_parts = FOURTHS.map(|mask| u128::from(b & mask & (u64::MAX >> 4)));
    let mut result = 0;
    for class in 0..4 {
        let mut sum = 0;
        for i in 0..4 {
            sum ^= a_parts[i] * b_parts[(class + 4 - i) % 4];
        }
        let mask = u128::from(FOURTHS[class]);
        result ^= sum & (mask | mask << 64);
    }
    for i in 0..4 {
        let bit = u128::from(top >> i & 1).wrapping_neg();
        result ^= (u128::from(a) << (60 + i)) & bit;
    }
    result
}

/// One product of GHASH; one factor is a power, with its factor of x.
fn multiply(a: u128, b: u128) -> u128 {
    #[expect(clippy::cast_possible_truncation, reason = "cuts the halves out")]
    let halves = |x: u128| ((x >> 64) as u64, x as u64);
    let ((a1, a0), (b1, b0)) = (halves(a), halves(b));
    let low = product(a0, b0);
    let high = product(a1, b1);
    let middle = product(a0 ^ a1, b0 ^ b1) ^ low ^ high;
    let (low, high) = (low ^ (middle << 64), high ^ (middle >> 64));
    // Montgomery's way: the polynomial's lowest terms, 1 + x^57 + x^62 + x^63 after its leading
    // one, clear 64 bits from below, twice.
    let (mut v1, v0) = halves(low);
    v1 ^= (v0 << 63) ^ (v0 << 62) ^ (v0 << 57);
    let fold = |v: u64| v ^ (v >> 1) ^ (v >> 2) ^ (v >> 7);
    let (v3, v2) = halves(high);
    let v2 = v2 ^ fold(v0) ^ (v1 << 63) ^ (v1 << 62) ^ (v1 << 57);
    let v3 = v3 ^ fold(v1);
    (u128::from(v3) << 64) | u128::from(v2)
}

/// The first power alone is used.
pub fn powers(hash_key: u128) -> Powers {
    let mut powers = Powers([0; POWERS]);
    powers.0[POWERS - 1] = Powers::first(hash_key);
    powers
}

pub fn ghash(powers: &Powers, mut hash: u128, bytes: &[u8]) -> u128 {
    for part in bytes.chunks(BLOCK_LEN) {
        let mut block = [0; BLOCK_LEN];
        block[..part.len()].copy_from_slice(part);
        hash = multiply(hash ^ u128::from_be_bytes(block), powers.0[POWERS - 1]);
    }
    hash
}
