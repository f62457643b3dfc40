//! Vectors of 256 bits, with AVX2 and either GFNI or AES-NI.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m128i, __m256i, _mm_aesenclast_si128, _mm_clmulepi64_si128, _mm_loadu_si128, _mm_set_epi8,
    _mm_set_epi64x, _mm_setzero_si128, _mm_xor_si128, _mm256_add_epi32, _mm256_and_si256,
    _mm256_broadcastsi128_si256, _mm256_bslli_epi128, _mm256_bsrli_epi128, _mm256_castsi256_si128,
    _mm256_clmulepi64_epi128, _mm256_cvtsi256_si32, _mm256_extracti128_si256,
    _mm256_gf2p8affine_epi64_epi8, _mm256_gf2p8affineinv_epi64_epi8, _mm256_loadu_si256,
    _mm256_or_si256, _mm256_set_epi32, _mm256_set_m128i, _mm256_set1_epi8, _mm256_set1_epi32,
    _mm256_set1_epi64x, _mm256_shuffle_epi8, _mm256_shuffle_epi32, _mm256_slli_epi32,
    _mm256_srli_epi32, _mm256_storeu_si256, _mm256_unpackhi_epi32, _mm256_unpackhi_epi64,
    _mm256_unpacklo_epi32, _mm256_unpacklo_epi64, _mm256_xor_si256,
};

use super::gfni::{
    AFTER_AES, BEFORE_AES, Halves, IN_CONSTANT, IN_MATRIX, OUT_CONSTANT, OUT_MATRIX,
    OUT_ROTATED_CONSTANT, OUT_ROTATED_MATRIX, OUT_SHIFTED_CONSTANT, OUT_SHIFTED_MATRIX,
    REVERSE_BITS, REVERSED,
};
use super::lanes::{Lanes, entry_points};

/// Calls intrinsics.
macro_rules! simd {
    ($($body:tt)*) => {{
        // SAFETY: a vector or token of this module exists only in functions that are compiled
        // with the kernel's features (`entry_points`), where this is inlined.
        unsafe { $($body)* }
    }};
}

/// Says that the processor has AVX2, PCLMULQDQ and what the kernel's vector needs besides.
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

/// With GFNI, else AES-NI; with VPCLMULQDQ, else PCLMULQDQ.
#[derive(Clone, Copy)]
pub struct Lanes256<const GFNI: bool, const WIDE_PRODUCT: bool>(__m256i);

/// Where the bytes of a word go when it is rotated left by `bytes`, for PSHUFB.
#[expect(clippy::cast_possible_truncation, reason = "0 to 15")]
const fn rotation(bytes: usize, undo_shift_rows: bool) -> [u8; 16] {
    let mut mask = [0; 16];
    let mut i = 0;
    while i < 16 {
        let from = i / 4 * 4 + (i % 4 + 4 - bytes) % 4;
        // AES moves byte 4 c + r to column c - r.
        let row = from % 4;
        let column = if undo_shift_rows {
            (from / 4 + 4 - row) % 4
        } else {
            from / 4
        };
        mask[i] = (4 * column + row) as u8;
        i += 1;
    }
    mask
}

static ROTATIONS: [[u8; 16]; 3] = [rotation(1, false), rotation(2, false), rotation(3, false)];
static ROTATIONS_AFTER_AES: [[u8; 16]; 4] = [
    rotation(0, true),
    rotation(1, true),
    rotation(2, true),
    rotation(3, true),
];

impl<const GFNI: bool, const WIDE_PRODUCT: bool> Lanes256<GFNI, WIDE_PRODUCT> {
    #[inline(always)]
    fn shuffle(self, mask: __m128i) -> Self {
        Self(simd! { _mm256_shuffle_epi8(self.0, _mm256_broadcastsi128_si256(mask)) })
    }

    #[inline(always)]
    fn shuffle_by(self, mask: &[u8; 16]) -> Self {
        // SAFETY: the mask has 16 bytes.
        self.shuffle(unsafe { _mm_loadu_si128(mask.as_ptr().cast()) })
    }

    /// `LEFT` bits, which is `RIGHT` = 32 - `LEFT` the other way.
    #[inline(always)]
    fn rotate<const LEFT: i32, const RIGHT: i32>(self) -> Self {
        Self(simd! {
            let up = _mm256_slli_epi32::<LEFT>(self.0);
            _mm256_or_si256(up, _mm256_srli_epi32::<RIGHT>(self.0))
        })
    }

    /// A map of bytes, looked up in registers.
    #[inline(always)]
    fn map(self, halves: &Halves) -> Self {
        let nibbles = simd! { _mm256_set1_epi8(0x0f) };
        // SAFETY: the tables have 16 bytes each.
        let (low, high) = unsafe {
            (
                _mm_loadu_si128(halves.low.as_ptr().cast()),
                _mm_loadu_si128(halves.high.as_ptr().cast()),
            )
        };
        Self(simd! {
            let low = _mm256_broadcastsi128_si256(low);
            let high = _mm256_broadcastsi128_si256(high);
            let below = _mm256_and_si256(self.0, nibbles);
            let above = _mm256_and_si256(_mm256_srli_epi32::<4>(self.0), nibbles);
            _mm256_xor_si256(_mm256_shuffle_epi8(low, below), _mm256_shuffle_epi8(high, above))
        })
    }

    /// AES's last round without key: its S-box, and bytes out of order.
    #[inline(always)]
    fn aes(self) -> Self {
        Self(simd! {
            let zero = _mm_setzero_si128();
            let low = _mm_aesenclast_si128(_mm256_castsi256_si128(self.0), zero);
            let high = _mm_aesenclast_si128(_mm256_extracti128_si256::<1>(self.0), zero);
            _mm256_set_m128i(high, low)
        })
    }

    /// The S-box on each byte.
    #[inline(always)]
    fn substitute(self) -> Self {
        const IN: i32 = IN_CONSTANT as i32;
        const OUT: i32 = OUT_CONSTANT as i32;
        if GFNI {
            Self(simd! {
                let matrix = _mm256_set1_epi64x(IN_MATRIX.cast_signed());
                let inner = _mm256_gf2p8affine_epi64_epi8::<IN>(self.0, matrix);
                let matrix = _mm256_set1_epi64x(OUT_MATRIX.cast_signed());
                _mm256_gf2p8affineinv_epi64_epi8::<OUT>(inner, matrix)
            })
        } else {
            self.substitute_shifted()
                .shuffle_by(&ROTATIONS_AFTER_AES[0])
        }
    }

    /// The S-box with the bytes where AES's last round puts them.
    #[inline(always)]
    fn substitute_shifted(self) -> Self {
        self.map(&BEFORE_AES).aes().map(&AFTER_AES)
    }
}

impl<const GFNI: bool, const WIDE_PRODUCT: bool> Lanes for Lanes256<GFNI, WIDE_PRODUCT> {
    type Token = Token;
    const BLOCKS: usize = 8;

    #[inline(always)]
    fn splat(_: Token, word: u32) -> Self {
        Self(simd! { _mm256_set1_epi32(word.cast_signed()) })
    }

    #[inline(always)]
    fn load(_: Token, bytes: &[u8]) -> Self {
        let bytes = &bytes[..Self::BYTES];
        // SAFETY: the slice has 32 bytes; the token says the rest.
        Self(unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) })
    }

    #[inline(always)]
    fn load_powers(_: Token, powers: &[u128]) -> Self {
        let powers = &powers[..2];
        // SAFETY: the slice has 32 bytes; the token says the rest.
        Self(unsafe { _mm256_loadu_si256(powers.as_ptr().cast()) })
    }

    #[inline(always)]
    fn store(self, bytes: &mut [u8]) {
        let bytes = &mut bytes[..Self::BYTES];
        // SAFETY: the slice has 32 bytes; the vector says the rest.
        unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), self.0) };
    }

    #[inline(always)]
    fn store_powers(self, powers: &mut [u128]) {
        let powers = &mut powers[..2];
        // SAFETY: the slice has 32 bytes; the vector says the rest.
        unsafe { _mm256_storeu_si256(powers.as_mut_ptr().cast(), self.0) };
    }

    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        Self(simd! { _mm256_xor_si256(self.0, other.0) })
    }

    #[inline(always)]
    fn xor3(self, b: Self, c: Self) -> Self {
        self.xor(b).xor(c)
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(simd! { _mm256_add_epi32(self.0, other.0) })
    }

    #[inline(always)]
    fn low_word(self) -> u32 {
        simd! { _mm256_cvtsi256_si32(self.0) }.cast_unsigned()
    }

    #[inline(always)]
    fn round(self, carry: Self) -> Self {
        if GFNI {
            // Byte i of L(b), as bytes of b: (1 + shift by 2) of i, rotated by 2 of i-1 and i-2,
            // and the sum of both of i-3. GFNI gives both maps with the S-box.
            const IN: i32 = IN_CONSTANT as i32;
            const ROTATED: i32 = OUT_ROTATED_CONSTANT as i32;
            const SHIFTED: i32 = OUT_SHIFTED_CONSTANT as i32;
            let (rotated, shifted) = simd! {
                let matrix = _mm256_set1_epi64x(IN_MATRIX.cast_signed());
                let inner = _mm256_gf2p8affine_epi64_epi8::<IN>(self.0, matrix);
                let matrix = _mm256_set1_epi64x(OUT_ROTATED_MATRIX.cast_signed());
                let rotated = _mm256_gf2p8affineinv_epi64_epi8::<ROTATED>(inner, matrix);
                let matrix = _mm256_set1_epi64x(OUT_SHIFTED_MATRIX.cast_signed());
                let shifted = _mm256_gf2p8affineinv_epi64_epi8::<SHIFTED>(inner, matrix);
                (Self(rotated), Self(shifted))
            };
            let near = rotated
                .shuffle_by(&ROTATIONS[0])
                .xor(rotated.shuffle_by(&ROTATIONS[1]));
            let far = rotated.xor(shifted).shuffle_by(&ROTATIONS[2]);
            return carry.xor(shifted).xor(near).xor(far);
        }
        // L(b) = b + (b <<< 24) + ((b + (b <<< 8) + (b <<< 16)) <<< 2)
        let s = self.substitute_shifted();
        let [none, one, two, three] = &ROTATIONS_AFTER_AES;
        let b = s.shuffle_by(none);
        let inner = b.xor3(s.shuffle_by(one), s.shuffle_by(two));
        let outer = carry.xor3(b, s.shuffle_by(three));
        outer.xor(inner.rotate::<2, 30>())
    }

    #[inline(always)]
    fn key_round(self, carry: Self) -> Self {
        let b = self.substitute();
        carry.xor3(b, b.rotate::<13, 19>()).xor(b.rotate::<23, 9>())
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
        if GFNI {
            Self(simd! {
                let matrix = _mm256_set1_epi64x(REVERSE_BITS.cast_signed());
                _mm256_gf2p8affine_epi64_epi8::<0>(self.0, matrix)
            })
        } else {
            self.map(&REVERSED)
        }
    }

    #[inline(always)]
    fn transpose([a, b, c, d]: [Self; 4]) -> [Self; 4] {
        simd! {
            let ab_low = _mm256_unpacklo_epi32(a.0, b.0);
            let ab_high = _mm256_unpackhi_epi32(a.0, b.0);
            let cd_low = _mm256_unpacklo_epi32(c.0, d.0);
            let cd_high = _mm256_unpackhi_epi32(c.0, d.0);
            [
                Self(_mm256_unpacklo_epi64(ab_low, cd_low)),
                Self(_mm256_unpackhi_epi64(ab_low, cd_low)),
                Self(_mm256_unpacklo_epi64(ab_high, cd_high)),
                Self(_mm256_unpackhi_epi64(ab_high, cd_high)),
            ]
        }
    }

    #[inline(always)]
    fn numbers(_: Token) -> Self {
        // Vector `e` of four has blocks 2 e and 2 e + 1, one a lane.
        Self(simd! { _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0) })
    }

    #[inline(always)]
    fn product<const HALVES: i32>(self, other: Self) -> Self {
        if WIDE_PRODUCT {
            return Self(simd! { _mm256_clmulepi64_epi128::<HALVES>(self.0, other.0) });
        }
        Self(simd! {
            let low = _mm_clmulepi64_si128::<HALVES>(
                _mm256_castsi256_si128(self.0),
                _mm256_castsi256_si128(other.0),
            );
            let high = _mm_clmulepi64_si128::<HALVES>(
                _mm256_extracti128_si256::<1>(self.0),
                _mm256_extracti128_si256::<1>(other.0),
            );
            _mm256_set_m128i(high, low)
        })
    }

    #[inline(always)]
    fn up<const BYTES: i32>(self) -> Self {
        Self(simd! { _mm256_bslli_epi128::<BYTES>(self.0) })
    }

    #[inline(always)]
    fn down<const BYTES: i32>(self) -> Self {
        Self(simd! { _mm256_bsrli_epi128::<BYTES>(self.0) })
    }

    #[inline(always)]
    fn swap_halves(self) -> Self {
        Self(simd! { _mm256_shuffle_epi32::<0x4e>(self.0) })
    }

    #[inline(always)]
    fn fold(self) -> __m128i {
        simd! {
            _mm_xor_si128(
                _mm256_castsi256_si128(self.0),
                _mm256_extracti128_si256::<1>(self.0),
            )
        }
    }

    #[inline(always)]
    fn first_lane(_: Token, value: __m128i) -> Self {
        Self(simd! { _mm256_set_m128i(_mm_setzero_si128(), value) })
    }

    #[inline(always)]
    fn splat_lane(_: Token, value: __m128i) -> Self {
        Self(simd! { _mm256_broadcastsi128_si256(value) })
    }

    #[inline(always)]
    fn splat_low(_: Token, value: u64) -> Self {
        Self(simd! { _mm256_broadcastsi128_si256(_mm_set_epi64x(0, value.cast_signed())) })
    }
}

entry_points! {
    /// AVX2, GFNI, VPCLMULQDQ.
    gfni256, "gfni256", Lanes256<true, true>, 8,
    "avx2,gfni,vpclmulqdq,pclmulqdq", ["avx2", "gfni", "vpclmulqdq", "pclmulqdq"]
}

entry_points! {
    /// AVX2, GFNI, PCLMULQDQ: processors with GFNI and without VPCLMULQDQ.
    gfni256_pclmul, "gfni256-pclmul", Lanes256<true, false>, 8,
    "avx2,gfni,pclmulqdq", ["avx2", "gfni", "pclmulqdq"]
}

entry_points! {
    /// AVX2, AES-NI, PCLMULQDQ.
    aesni, "aesni", Lanes256<false, false>, 8,
    "avx2,aes,pclmulqdq", ["avx2", "aes", "pclmulqdq"]
}
