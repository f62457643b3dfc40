//! Vectors of 512 bits with GFNI and VPCLMULQDQ.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m128i, __m512i, _mm_set_epi8, _mm_set_epi64x, _mm_xor_si128, _mm512_add_epi32,
    _mm512_broadcast_i32x4, _mm512_bslli_epi128, _mm512_bsrli_epi128, _mm512_clmulepi64_epi128,
    _mm512_cvtsi512_si32, _mm512_extracti32x4_epi32, _mm512_gf2p8affine_epi64_epi8,
    _mm512_gf2p8affineinv_epi64_epi8, _mm512_inserti32x4, _mm512_loadu_si512, _mm512_rol_epi32,
    _mm512_set_epi32, _mm512_set1_epi32, _mm512_set1_epi64, _mm512_setzero_si512,
    _mm512_shuffle_epi8, _mm512_shuffle_epi32, _mm512_storeu_si512, _mm512_ternarylogic_epi32,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    _mm512_xor_si512,
};

use super::gfni::{IN_CONSTANT, IN_MATRIX, OUT_CONSTANT, OUT_MATRIX, REVERSE_BITS};
use super::lanes::{Lanes, entry_points};

/// Calls intrinsics.
macro_rules! simd {
    ($($body:tt)*) => {{
        // SAFETY: a vector or token of this module exists only in functions that are compiled
        // with the kernel's features (`entry_points`), where this is inlined.
        unsafe { $($body)* }
    }};
}

/// Truth table of the sum of three.
const XOR3: i32 = 0x96;

/// Says that the processor has AVX-512 F and BW, GFNI and VPCLMULQDQ.
#[derive(Clone, Copy)]
pub struct Token(());

impl Token {
    /// # Safety
    /// The processor has the features, and the caller is compiled with them.
    #[inline(always)]
    pub unsafe fn new() -> Self {
        Self(())
    }
}

#[derive(Clone, Copy)]
pub struct Lanes512(__m512i);

impl Lanes512 {
    /// The S-box on each byte.
    #[inline(always)]
    fn substitute(self) -> Self {
        const IN: i32 = IN_CONSTANT as i32;
        const OUT: i32 = OUT_CONSTANT as i32;
        Self(simd! {
            let matrix = _mm512_set1_epi64(IN_MATRIX.cast_signed());
            let inner = _mm512_gf2p8affine_epi64_epi8::<IN>(self.0, matrix);
            let matrix = _mm512_set1_epi64(OUT_MATRIX.cast_signed());
            _mm512_gf2p8affineinv_epi64_epi8::<OUT>(inner, matrix)
        })
    }

    #[inline(always)]
    fn rotate<const BITS: i32>(self) -> Self {
        Self(simd! { _mm512_rol_epi32::<BITS>(self.0) })
    }

    #[inline(always)]
    fn shuffle(self, mask: __m128i) -> Self {
        Self(simd! { _mm512_shuffle_epi8(self.0, _mm512_broadcast_i32x4(mask)) })
    }
}

impl Lanes for Lanes512 {
    type Token = Token;
    const BLOCKS: usize = 16;

    #[inline(always)]
    fn splat(_: Token, word: u32) -> Self {
        Self(simd! { _mm512_set1_epi32(word.cast_signed()) })
    }

    #[inline(always)]
    fn load(_: Token, bytes: &[u8]) -> Self {
        let bytes = &bytes[..Self::BYTES];
        // SAFETY: the slice has 64 bytes; the token says the rest.
        Self(unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) })
    }

    #[inline(always)]
    fn load_powers(_: Token, powers: &[u128]) -> Self {
        let powers = &powers[..4];
        // SAFETY: the slice has 64 bytes; the token says the rest.
        Self(unsafe { _mm512_loadu_si512(powers.as_ptr().cast()) })
    }

    #[inline(always)]
    fn store(self, bytes: &mut [u8]) {
        let bytes = &mut bytes[..Self::BYTES];
        // SAFETY: the slice has 64 bytes; the vector says the rest.
        unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), self.0) };
    }

    #[inline(always)]
    fn store_powers(self, powers: &mut [u128]) {
        let powers = &mut powers[..4];
        // SAFETY: the slice has 64 bytes; the vector says the rest.
        unsafe { _mm512_storeu_si512(powers.as_mut_ptr().cast(), self.0) };
    }

    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        Self(simd! { _mm512_xor_si512(self.0, other.0) })
    }

    #[inline(always)]
    fn xor3(self, b: Self, c: Self) -> Self {
        Self(simd! { _mm512_ternarylogic_epi32::<XOR3>(self.0, b.0, c.0) })
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(simd! { _mm512_add_epi32(self.0, other.0) })
    }

    #[inline(always)]
    fn low_word(self) -> u32 {
        simd! { _mm512_cvtsi512_si32(self.0) }.cast_unsigned()
    }

    #[inline(always)]
    fn round(self, carry: Self) -> Self {
        let b = self.substitute();
        let near = b.xor3(b.rotate::<2>(), b.rotate::<10>());
        let far = carry.xor3(b.rotate::<18>(), b.rotate::<24>());
        near.xor(far)
    }

    #[inline(always)]
    fn key_round(self, carry: Self) -> Self {
        let b = self.substitute();
        carry.xor3(b, b.rotate::<13>()).xor(b.rotate::<23>())
    }

    #[inline(always)]
    fn swap_words(self) -> Self {
        let mask = simd! { _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3) };
        self.shuffle(mask)
    }

    #[inline(always)]
    fn swap_lanes(self) -> Self {
        let mask = simd! { _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15) };
        self.shuffle(mask)
    }

    #[inline(always)]
    fn reverse_bits(self) -> Self {
        Self(simd! {
            let matrix = _mm512_set1_epi64(REVERSE_BITS.cast_signed());
            _mm512_gf2p8affine_epi64_epi8::<0>(self.0, matrix)
        })
    }

    #[inline(always)]
    fn transpose([a, b, c, d]: [Self; 4]) -> [Self; 4] {
        simd! {
            let ab_low = _mm512_unpacklo_epi32(a.0, b.0);
            let ab_high = _mm512_unpackhi_epi32(a.0, b.0);
            let cd_low = _mm512_unpacklo_epi32(c.0, d.0);
            let cd_high = _mm512_unpackhi_epi32(c.0, d.0);
            [
                Self(_mm512_unpacklo_epi64(ab_low, cd_low)),
                Self(_mm512_unpackhi_epi64(ab_low, cd_low)),
                Self(_mm512_unpacklo_epi64(ab_high, cd_high)),
                Self(_mm512_unpackhi_epi64(ab_high, cd_high)),
            ]
        }
    }

    #[inline(always)]
    fn numbers(_: Token) -> Self {
        // Vector `e` of four has blocks 4 e to 4 e + 3, one a lane.
        Self(simd! {
            _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0)
        })
    }

    #[inline(always)]
    fn product<const HALVES: i32>(self, other: Self) -> Self {
        Self(simd! { _mm512_clmulepi64_epi128::<HALVES>(self.0, other.0) })
    }

    #[inline(always)]
    fn up<const BYTES: i32>(self) -> Self {
        Self(simd! { _mm512_bslli_epi128::<BYTES>(self.0) })
    }

    #[inline(always)]
    fn down<const BYTES: i32>(self) -> Self {
        Self(simd! { _mm512_bsrli_epi128::<BYTES>(self.0) })
    }

    #[inline(always)]
    fn swap_halves(self) -> Self {
        Self(simd! { _mm512_shuffle_epi32::<0x4e>(self.0) })
    }

    #[inline(always)]
    fn fold(self) -> __m128i {
        simd! {
            let ab = _mm_xor_si128(
                _mm512_extracti32x4_epi32::<0>(self.0),
                _mm512_extracti32x4_epi32::<1>(self.0),
            );
            let cd = _mm_xor_si128(
                _mm512_extracti32x4_epi32::<2>(self.0),
                _mm512_extracti32x4_epi32::<3>(self.0),
            );
            _mm_xor_si128(ab, cd)
        }
    }

    #[inline(always)]
    fn first_lane(_: Token, value: __m128i) -> Self {
        Self(simd! { _mm512_inserti32x4::<0>(_mm512_setzero_si512(), value) })
    }

    #[inline(always)]
    fn splat_lane(_: Token, value: __m128i) -> Self {
        Self(simd! { _mm512_broadcast_i32x4(value) })
    }

    #[inline(always)]
    fn splat_low(_: Token, value: u64) -> Self {
        Self(simd! { _mm512_broadcast_i32x4(_mm_set_epi64x(0, value.cast_signed())) })
    }
}

entry_points! {
    /// AVX-512, GFNI, VPCLMULQDQ.
    gfni512, "gfni512", Lanes512, 4,
    "avx512f,avx512bw,gfni,vpclmulqdq,pclmulqdq",
    ["avx512f", "avx512bw", "gfni", "vpclmulqdq", "pclmulqdq"]
}
