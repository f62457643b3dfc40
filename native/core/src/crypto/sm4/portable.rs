//! SM4 as a circuit of logic gates, for any processor.
//!
//! Bits are sorted into planes: word `i` of a plane-ordered set has bit `i` of everything. One
//! gate then works on all of them, and nothing is looked up. 64 blocks fill the planes of 64 bits
//! and stay there for all rounds, where a rotation is only another name for a plane. A few blocks,
//! eight at a time, are put into planes for the S-box only.

use std::ops::{BitAnd, BitXor, Not};

use super::kernel::{GcmStart, Operations};
use super::portable_ghash::{ghash, powers};
use super::{BLOCK_LEN, CK, FK, KEY_LEN, Powers, RoundKeys, words, xor_in_place, xts};

/// Blocks of the large form, and its bytes.
const MANY: usize = 64;
const MANY_LEN: usize = MANY * BLOCK_LEN;
/// Blocks of the small form.
const FEW: usize = 8;
const FEW_LEN: usize = FEW * BLOCK_LEN;
/// From here on the large form is quicker, even with places left empty.
const MANY_WORTH_LEN: usize = 3 * FEW_LEN;

/// Bits on which gates work.
trait Bits: Copy + BitXor<Output = Self> + BitAnd<Output = Self> + Not<Output = Self> {}

impl<T: Copy + BitXor<Output = T> + BitAnd<Output = T> + Not<Output = T>> Bits for T {}

/// Product in GF(2^4), modulo x^4 + x + 1; Karatsuba's way on halves.
#[inline(always)]
fn multiply<T: Bits>(a: [T; 4], b: [T; 4]) -> [T; 4] {
    // Three products of two bits each: low, high, and of the sums.
    let pair = |a: [T; 2], b: [T; 2]| {
        let (low, high) = (a[0] & b[0], a[1] & b[1]);
        let middle = ((a[0] ^ a[1]) & (b[0] ^ b[1])) ^ low ^ high;
        [low, middle, high]
    };
    let low = pair([a[0], a[1]], [b[0], b[1]]);
    let high = pair([a[2], a[3]], [b[2], b[3]]);
    let sums = pair([a[0] ^ a[2], a[1] ^ a[3]], [b[0] ^ b[2], b[1] ^ b[3]]);
    let middle = [0, 1, 2].map(|i| sums[i] ^ low[i] ^ high[i]);
    // Coefficients 0 to 6, then x^4 = x + 1, x^5 = x^2 + x, x^6 = x^3 + x^2.
    let c4 = middle[2] ^ high[0];
    let (c5, c6) = (high[1], high[2]);
    [
        low[0] ^ c4,
        low[1] ^ c4 ^ c5,
        low[2] ^ middle[0] ^ c5 ^ c6,
        middle[1] ^ c6,
    ]
}

/// 1 / a in GF(2^4), 0 for 0: the polynomial of each output bit.
#[inline(always)]
fn invert<T: Bits>([a, b, c, d]: [T; 4]) -> [T; 4] {
    let (ab, ac, bc, ad, bd, cd) = (a & b, a & c, b & c, a & d, b & d, c & d);
    [
        a ^ b ^ c ^ d ^ ac ^ bc ^ (bc & (a ^ d)),
        d ^ ab ^ ac ^ bc ^ bd ^ (ab & d),
        c ^ d ^ ab ^ ac ^ ad ^ (ac & d),
        b ^ c ^ d ^ ad ^ bd ^ cd ^ (bc & d),
    ]
}

/// SM4's S-box on the eight planes of a set of bytes, plane 0 with the lowest bits.
///
/// The inverse is taken in GF((2^4)^2): pairs (h, l) = h y + l with y^2 = y + x^3 + 1. Both affine
/// maps of the S-box have the change of coordinates worked in; how they share sums was found by a
/// greedy search.
#[inline(always)]
fn substitute<T: Bits>(x: [T; 8]) -> [T; 8] {
    let t0 = x[1] ^ x[5];
    let t1 = x[0] ^ x[6] ^ t0;
    let t2 = x[1] ^ x[4];
    let t3 = x[2] ^ t1;
    let low = [!t1, x[4] ^ t0, !t2, t3];
    let high = [
        x[0] ^ x[7] ^ t2,
        !x[6],
        x[2] ^ x[6] ^ x[7],
        !(x[3] ^ x[4] ^ t3),
    ];
    // norm = (x^3 + 1) h^2 + h l + l^2
    let product = multiply(high, low);
    let norm = [
        product[0] ^ high[0] ^ low[0] ^ low[2],
        product[1] ^ high[1] ^ high[3] ^ low[2],
        product[2] ^ high[3] ^ low[1] ^ low[3],
        product[3] ^ high[0] ^ high[2] ^ low[3],
    ];
    let inverse = invert(norm);
    let [z4, z5, z6, z7] = multiply(high, inverse);
    let sum = [0, 1, 2, 3].map(|i| high[i] ^ low[i]);
    let [z0, z1, z2, z3] = multiply(sum, inverse);
    let u0 = z0 ^ z5;
    let u1 = z4 ^ u0;
    let u2 = z2 ^ z6;
    let u3 = z3 ^ z7;
    let u4 = u1 ^ u3;
    let u5 = u1 ^ u2;
    let u6 = u0 ^ u2;
    [
        !(z0 ^ z1),
        !(z2 ^ u1),
        z4 ^ u2,
        z7 ^ u6,
        !(z1 ^ z3 ^ z5),
        z1 ^ u3,
        !(z1 ^ u5),
        !u4,
    ]
}

/// The S-box on the bytes of a word.
fn substitute_word(word: u32) -> u32 {
    let planes = substitute::<u32>([0, 1, 2, 3, 4, 5, 6, 7].map(|i| word >> i & 0x0101_0101));
    let planes = planes.iter().enumerate();
    planes.fold(0, |word, (i, plane)| word | (plane & 0x0101_0101) << i)
}

/// Bit `i` of each byte of word `j` and bit `j` of the byte of word `i` change places.
#[inline(always)]
fn turn_bytes(w: &mut [u32; 8]) {
    // As blocks of 4 x 4 bits, then 2 x 2, then single ones.
    for (span, mask) in [(4, 0x0f0f_0f0f), (2, 0x3333_3333), (1, 0x5555_5555)] {
        for i in (0..8).filter(|i| i & span == 0) {
            let (left, right) = w.split_at_mut(i + span);
            // Low half of the later word against the high half of the earlier one.
            let shift = u32::try_from(span).expect("invariant: at most 4");
            let difference = ((left[i] >> shift) ^ right[0]) & mask;
            right[0] ^= difference;
            left[i] ^= difference << shift;
        }
    }
}

/// Eight blocks.
fn few(keys: &RoundKeys, text: &mut [u8; FEW_LEN]) {
    // state[w][b] is word w of block b.
    let mut state = [[0u32; FEW]; 4];
    for (b, block) in text.as_chunks::<BLOCK_LEN>().0.iter().enumerate() {
        for (row, word) in state.iter_mut().zip(words(block)) {
            row[b] = word;
        }
    }
    for key in keys.0 {
        let [x0, x1, x2, x3] = state;
        let mut planes: [u32; FEW] = std::array::from_fn(|b| x1[b] ^ x2[b] ^ x3[b] ^ key);
        turn_bytes(&mut planes);
        planes = substitute(planes);
        turn_bytes(&mut planes);
        let next = std::array::from_fn(|b| {
            let s: u32 = planes[b];
            let inner = s ^ s.rotate_left(8) ^ s.rotate_left(16);
            x0[b] ^ s ^ s.rotate_left(24) ^ inner.rotate_left(2)
        });
        state = [x1, x2, x3, next];
    }
    for (b, block) in text.as_chunks_mut::<BLOCK_LEN>().0.iter_mut().enumerate() {
        for (bytes, row) in block
            .as_chunks_mut::<4>()
            .0
            .iter_mut()
            .zip(state.iter().rev())
        {
            *bytes = row[b].to_be_bytes();
        }
    }
}

/// Rows and columns of 32 x 32 bits change places.
fn turn_words(w: &mut [u32; 32]) {
    for (span, mask) in [
        (16usize, 0x0000_ffffu32),
        (8, 0x00ff_00ff),
        (4, 0x0f0f_0f0f),
        (2, 0x3333_3333),
        (1, 0x5555_5555),
    ] {
        for i in (0..32).filter(|i| i & span == 0) {
            let difference = ((w[i] >> span) ^ w[i + span]) & mask;
            w[i + span] ^= difference;
            w[i] ^= difference << span;
        }
    }
}

/// The planes of one word of 64 blocks.
type Planes = [u64; 32];

/// `x0` ^= L(S(x1 ^ x2 ^ x3 ^ key)), on planes.
#[inline(always)]
fn round(x0: &mut Planes, x1: &Planes, x2: &Planes, x3: &Planes, key: u32) {
    let mut s = [0u64; 32];
    for byte in 0..4 {
        let bits = std::array::from_fn(|bit| {
            let i = 8 * byte + bit;
            // The key's bit, on all blocks.
            let key = u64::from(key >> i & 1).wrapping_neg();
            x1[i] ^ x2[i] ^ x3[i] ^ key
        });
        s[8 * byte..8 * byte + 8].copy_from_slice(&substitute::<u64>(bits));
    }
    // Rotated left by r, bit i comes from bit i - r.
    let s = |i: usize, left: usize| s[(i + 32 - left) % 32];
    for (i, x0) in x0.iter_mut().enumerate() {
        *x0 ^= s(i, 0) ^ s(i, 2) ^ s(i, 10) ^ s(i, 18) ^ s(i, 24);
    }
}

/// 64 blocks.
fn many(keys: &RoundKeys, text: &mut [u8; MANY_LEN]) {
    let mut state = [[0u64; 32]; 4];
    for half in [0, 1] {
        let shift = 32 * half;
        let blocks = &text.as_chunks::<BLOCK_LEN>().0[32 * half..32 * half + 32];
        for (w, planes) in state.iter_mut().enumerate() {
            let mut rows = std::array::from_fn(|b| words(&blocks[b])[w]);
            turn_words(&mut rows);
            for (plane, row) in planes.iter_mut().zip(rows) {
                *plane |= u64::from(row) << shift;
            }
        }
    }
    let [a, b, c, d] = &mut state;
    for four in keys.0.as_chunks::<4>().0 {
        round(a, b, c, d, four[0]);
        round(b, c, d, a, four[1]);
        round(c, d, a, b, four[2]);
        round(d, a, b, c, four[3]);
    }
    for half in [0, 1] {
        let shift = 32 * half;
        let blocks = &mut text.as_chunks_mut::<BLOCK_LEN>().0[32 * half..32 * half + 32];
        for (w, planes) in state.iter().rev().enumerate() {
            #[expect(clippy::cast_possible_truncation, reason = "cuts the half out")]
            let mut rows = planes.map(|plane| (plane >> shift) as u32);
            turn_words(&mut rows);
            for (block, row) in blocks.iter_mut().zip(rows) {
                block[4 * w..4 * w + 4].copy_from_slice(&row.to_be_bytes());
            }
        }
    }
}

fn expand(key: &[u8; KEY_LEN]) -> RoundKeys {
    let mut k = words(key);
    for (word, fk) in k.iter_mut().zip(FK) {
        *word ^= fk;
    }
    let mut keys = RoundKeys([0; 32]);
    for (key, ck) in keys.0.iter_mut().zip(CK) {
        let b = substitute_word(k[1] ^ k[2] ^ k[3] ^ ck);
        let next = k[0] ^ b ^ b.rotate_left(13) ^ b.rotate_left(23);
        *key = next;
        k = [k[1], k[2], k[3], next];
    }
    keys
}

fn blocks(keys: &RoundKeys, text: &mut [u8]) {
    let (whole, rest) = text.as_chunks_mut::<MANY_LEN>();
    for batch in whole {
        many(keys, batch);
    }
    if rest.len() >= MANY_WORTH_LEN {
        let mut padded = [0; MANY_LEN];
        padded[..rest.len()].copy_from_slice(rest);
        many(keys, &mut padded);
        rest.copy_from_slice(&padded[..rest.len()]);
        return;
    }
    for part in rest.chunks_mut(FEW_LEN) {
        let mut padded = [0; FEW_LEN];
        padded[..part.len()].copy_from_slice(part);
        few(keys, &mut padded);
        part.copy_from_slice(&padded[..part.len()]);
    }
}

fn ctr32(keys: &RoundKeys, counter: &[u8; BLOCK_LEN], text: &mut [u8]) {
    let mut number = words(counter)[3];
    for part in text.chunks_mut(MANY_LEN) {
        let mut stream = [0; MANY_LEN];
        let stream = &mut stream[..part.len().next_multiple_of(BLOCK_LEN)];
        for block in stream.as_chunks_mut::<BLOCK_LEN>().0 {
            *block = *counter;
            block[12..].copy_from_slice(&number.to_be_bytes());
            number = number.wrapping_add(1);
        }
        blocks(keys, stream);
        xor_in_place(part, stream);
    }
}

/// Part by part, so that the text is hashed while it is in the cache.
fn gcm<const SEAL: bool>(
    keys: &RoundKeys,
    powers: &Powers,
    start: &GcmStart,
    text: &mut [u8],
) -> u128 {
    let mut hash = start.hash;
    let mut mask = [0; BLOCK_LEN];
    ctr32(keys, &start.counter, &mut mask);
    let mut counter = start.counter;
    let mut number = words(&counter)[3].wrapping_add(1);
    for part in text.chunks_mut(MANY_LEN) {
        if !SEAL {
            hash = ghash(powers, hash, part);
        }
        counter[12..].copy_from_slice(&number.to_be_bytes());
        ctr32(keys, &counter, part);
        if SEAL {
            hash = ghash(powers, hash, part);
        }
        number = number.wrapping_add(64);
    }
    ghash(powers, hash, &start.lengths.to_be_bytes()) ^ u128::from_be_bytes(mask)
}

fn xts<const GB: bool>(keys: &RoundKeys, mut tweak: u128, text: &mut [u8]) -> u128 {
    for part in text.chunks_mut(MANY_LEN) {
        let mut tweaks = [0; MANY_LEN];
        let tweaks = &mut tweaks[..part.len()];
        for place in tweaks.as_chunks_mut::<BLOCK_LEN>().0 {
            *place = xts::to_bytes(tweak, GB);
            tweak = xts::double(tweak);
        }
        xor_in_place(part, tweaks);
        blocks(keys, part);
        xor_in_place(part, tweaks);
    }
    tweak
}

pub static OPERATIONS: Operations = Operations {
    name: "portable",
    is_supported: || true,
    expand,
    blocks,
    ctr32,
    powers,
    ghash,
    seal: gcm::<true>,
    open: gcm::<false>,
    xts_ieee: xts::<false>,
    xts_gb: xts::<true>,
};
