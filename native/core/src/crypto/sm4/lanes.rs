//! What a vector must offer to be a kernel, and the functions that a kernel then is.

use std::arch::x86_64::__m128i;

/// A vector of 32-bit words, 128 bits a lane. A value or token exists only in functions that are
/// compiled with its features.
pub trait Lanes: Copy {
    /// Says that the processor has the features.
    type Token: Copy;
    /// Blocks in four vectors.
    const BLOCKS: usize;
    /// Bytes of a vector.
    const BYTES: usize = Self::BLOCKS * 4;

    fn splat(token: Self::Token, word: u32) -> Self;
    /// The first `BYTES` of a slice that has as many.
    fn load(token: Self::Token, bytes: &[u8]) -> Self;
    fn load_powers(token: Self::Token, powers: &[u128]) -> Self;
    fn store(self, bytes: &mut [u8]);
    fn store_powers(self, powers: &mut [u128]);
    fn xor(self, other: Self) -> Self;
    fn xor3(self, b: Self, c: Self) -> Self;
    fn add(self, other: Self) -> Self;
    /// The low word.
    fn low_word(self) -> u32;
    /// `carry` ^ L(S(self)), L being SM4's linear map.
    fn round(self, carry: Self) -> Self;
    /// `carry` ^ L'(S(self)), the same in the key schedule.
    fn key_round(self, carry: Self) -> Self;
    /// Bytes of each word turned around.
    fn swap_words(self) -> Self;
    /// Bytes of each lane turned around.
    fn swap_lanes(self) -> Self;
    /// Bits of each byte turned around.
    fn reverse_bits(self) -> Self;
    /// Rows and columns of the 4 x 4 words of each lane change places.
    fn transpose(rows: [Self; 4]) -> [Self; 4];
    /// The number of the block, within a set, whose word lies there.
    fn numbers(token: Self::Token) -> Self;
    /// Carry-less product of the halves of each lane that `HALVES` names.
    fn product<const HALVES: i32>(self, other: Self) -> Self;
    /// Each lane moved up by `BYTES` bytes.
    fn up<const BYTES: i32>(self) -> Self;
    /// Each lane moved down by `BYTES` bytes.
    fn down<const BYTES: i32>(self) -> Self;
    /// The halves of each lane change places.
    fn swap_halves(self) -> Self;
    /// The sum of all lanes.
    fn fold(self) -> __m128i;
    /// `value` in the first lane, zeros in the others.
    fn first_lane(token: Self::Token, value: __m128i) -> Self;
    /// `value` in each lane.
    fn splat_lane(token: Self::Token, value: __m128i) -> Self;
    /// The same low half in each lane.
    fn splat_low(token: Self::Token, value: u64) -> Self;
}

/// The functions of a kernel, compiled with its features, and their table.
macro_rules! entry_points {
    (
        $(#[$doc:meta])*
        $module:ident, $name:literal, $lanes:ty, $sets:literal,
        $features:literal, [$($feature:tt),+]
    ) => {
        $(#[$doc])*
        pub mod $module {
            #![allow(unsafe_code)]
            use super::*;
            use crate::crypto::sm4::kernel::{GcmStart, Operations};
            use crate::crypto::sm4::{
                BLOCK_LEN, KEY_LEN, Powers, RoundKeys, wide, wide_gcm, wide_xts,
            };

            fn is_supported() -> bool {
                $(std::arch::is_x86_feature_detected!($feature))&&+
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn token() -> Token {
                // SAFETY: this function is compiled with the features.
                unsafe { Token::new() }
            }

            #[target_feature(enable = $features)]
            fn expand(key: &[u8; KEY_LEN]) -> RoundKeys {
                wide::expand::<$lanes>(token(), key)
            }

            #[target_feature(enable = $features)]
            fn blocks(keys: &RoundKeys, text: &mut [u8]) {
                wide::blocks::<$lanes, $sets>(token(), keys, text);
            }

            #[target_feature(enable = $features)]
            fn ctr32(keys: &RoundKeys, counter: &[u8; BLOCK_LEN], text: &mut [u8]) {
                wide::ctr32::<$lanes, $sets>(token(), keys, counter, text);
            }

            #[target_feature(enable = $features)]
            fn powers(hash_key: u128) -> Powers {
                wide_gcm::powers::<$lanes>(token(), hash_key)
            }

            #[target_feature(enable = $features)]
            fn ghash(powers: &Powers, hash: u128, bytes: &[u8]) -> u128 {
                wide_gcm::ghash::<$lanes>(token(), powers, hash, bytes)
            }

            #[target_feature(enable = $features)]
            fn seal(keys: &RoundKeys, powers: &Powers, start: &GcmStart, text: &mut [u8]) -> u128 {
                wide_gcm::gcm::<$lanes, $sets, true>(token(), keys, powers, start, text)
            }

            #[target_feature(enable = $features)]
            fn open(keys: &RoundKeys, powers: &Powers, start: &GcmStart, text: &mut [u8]) -> u128 {
                wide_gcm::gcm::<$lanes, $sets, false>(token(), keys, powers, start, text)
            }

            #[target_feature(enable = $features)]
            fn xts_ieee(keys: &RoundKeys, tweak: u128, text: &mut [u8]) -> u128 {
                wide_xts::xts::<$lanes, $sets, false>(token(), keys, tweak, text)
            }

            #[target_feature(enable = $features)]
            fn xts_gb(keys: &RoundKeys, tweak: u128, text: &mut [u8]) -> u128 {
                wide_xts::xts::<$lanes, $sets, true>(token(), keys, tweak, text)
            }

            pub static OPERATIONS: Operations = Operations {
                name: $name,
                is_supported,
                expand,
                blocks,
                ctr32,
                powers,
                ghash,
                seal,
                open,
                xts_ieee,
                xts_gb,
            };
        }
    };
}
pub(super) use entry_points;
