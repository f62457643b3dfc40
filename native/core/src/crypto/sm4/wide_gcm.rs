//! GHASH, and GCM with both halves woven together: products of one batch beside the rounds of
//! another, reduced once a batch.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m128i, _mm_clmulepi64_si128, _mm_set_epi64x, _mm_shuffle_epi32, _mm_slli_si128,
    _mm_srli_si128, _mm_storeu_si128, _mm_xor_si128,
};

use super::kernel::GcmStart;
use super::lanes::Lanes;
use super::wide::{
    Aligned, BATCH_LEN, Beside, Counter, Sets, ctr_rest, four_rounds, rounds, to_blocks, xor_sets,
};
use super::{BLOCK_LEN, POWERS, Powers, RoundKeys, xor_in_place};

/// A hash as vector of 128 bits.
#[inline(always)]
fn to_vector(hash: u128) -> __m128i {
    #[expect(clippy::cast_possible_truncation, reason = "cuts the halves out")]
    let (high, low) = ((hash >> 64) as u64, hash as u64);
    // SAFETY: x86-64 has SSE2.
    unsafe { _mm_set_epi64x(high.cast_signed(), low.cast_signed()) }
}

#[inline(always)]
fn to_number(vector: __m128i) -> u128 {
    let mut bytes = [0; BLOCK_LEN];
    // SAFETY: x86-64 has SSE2, and 16 bytes have room for 16 bytes.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), vector) };
    u128::from_le_bytes(bytes)
}

/// Sums of products before reduction: 256 bits, whose middle overlaps both ends.
#[derive(Clone, Copy)]
struct Sums<L> {
    low: L,
    middle: L,
    high: L,
}

impl<L: Lanes> Sums<L> {
    #[inline(always)]
    fn new(token: L::Token) -> Self {
        let zero = L::splat(token, 0);
        Self {
            low: zero,
            middle: zero,
            high: zero,
        }
    }

    #[inline(always)]
    fn add(&mut self, text: L, power: L) {
        self.low = self.low.xor(text.product::<0x00>(power));
        self.high = self.high.xor(text.product::<0x11>(power));
        let one = text.product::<0x01>(power);
        self.middle = self.middle.xor3(one, text.product::<0x10>(power));
    }

    #[inline(always)]
    fn reduce(self) -> __m128i {
        reduce(self.low.fold(), self.middle.fold(), self.high.fold())
    }
}

/// GHASH's polynomial without its ends: x^63 + x^62 + x^57.
const POLYNOMIAL: u64 = 0xc200_0000_0000_0000;

/// Modulo GHASH's polynomial, in two steps of 64 bits from below (Montgomery's way, which is why
/// powers carry a factor of x).
#[inline(always)]
fn reduce(low: __m128i, middle: __m128i, high: __m128i) -> __m128i {
    // SAFETY: all vector kernels have PCLMULQDQ.
    unsafe {
        let polynomial = _mm_set_epi64x(0, POLYNOMIAL.cast_signed());
        let low = _mm_xor_si128(low, _mm_slli_si128::<8>(middle));
        let high = _mm_xor_si128(high, _mm_srli_si128::<8>(middle));
        let fold = _mm_clmulepi64_si128::<0x00>(low, polynomial);
        let low = _mm_xor_si128(_mm_shuffle_epi32::<0x4e>(low), fold);
        let fold = _mm_clmulepi64_si128::<0x00>(low, polynomial);
        let low = _mm_xor_si128(_mm_shuffle_epi32::<0x4e>(low), fold);
        _mm_xor_si128(high, low)
    }
}

/// Products of GHASH, lane by lane.
#[inline(always)]
fn multiply<L: Lanes>(token: L::Token, a: L, b: L) -> L {
    let middle = a.product::<0x01>(b).xor(a.product::<0x10>(b));
    let low = a.product::<0x00>(b).xor(middle.up::<8>());
    let high = a.product::<0x11>(b).xor(middle.down::<8>());
    let polynomial = L::splat_low(token, POLYNOMIAL);
    let low = low.swap_halves().xor(low.product::<0x00>(polynomial));
    let low = low.swap_halves().xor(low.product::<0x00>(polynomial));
    high.xor(low)
}

/// All powers. Each step multiplies all there are by the highest one, so the chain is short.
#[inline(always)]
pub fn powers<L: Lanes>(token: L::Token, hash_key: u128) -> Powers {
    let lanes = L::BYTES / BLOCK_LEN;
    let mut powers = Powers([0; POWERS]);
    powers.0[POWERS - 1] = Powers::first(hash_key);
    let mut have = 1;
    while have < POWERS {
        let highest = L::splat_lane(token, to_vector(powers.0[POWERS - have]));
        // Where there is less than a vector, what it has in front is zeros and makes zeros.
        let vectors = have.div_ceil(lanes);
        for i in 1..=vectors {
            let at = POWERS - i * lanes;
            let product = multiply(token, highest, L::load_powers(token, &powers.0[at..]));
            product.store_powers(&mut powers.0[at - have..]);
        }
        have *= 2;
    }
    powers
}

/// Hashes a part of a batch of ciphertext with each step.
struct Hashing<'a, L: Lanes> {
    token: L::Token,
    text: &'a [u8],
    powers: &'a [u128],
    hash: __m128i,
    sums: Sums<L>,
}

impl<'a, L: Lanes> Hashing<'a, L> {
    /// `text` has as many blocks as `powers`, and whole vectors.
    #[inline(always)]
    fn new(token: L::Token, powers: &'a [u128], hash: __m128i, text: &'a [u8]) -> Self {
        Self {
            token,
            text,
            powers,
            hash,
            sums: Sums::new(token),
        }
    }

    #[inline(always)]
    fn vector(&mut self, i: usize) {
        let mut text = L::load(self.token, &self.text[i * L::BYTES..]).swap_lanes();
        if i == 0 {
            text = text.xor(L::first_lane(self.token, self.hash));
        }
        let power = L::load_powers(self.token, &self.powers[i * L::BYTES / BLOCK_LEN..]);
        self.sums.add(text, power);
    }

    /// All of it, with nothing beside.
    #[inline(always)]
    fn run(mut self) -> __m128i {
        for i in 0..self.text.len() / L::BYTES {
            self.vector(i);
        }
        self.sums.reduce()
    }
}

impl<L: Lanes> Beside for Hashing<'_, L> {
    #[inline(always)]
    fn step(&mut self, eighth: usize) {
        let vectors = self.text.len() / L::BYTES;
        for i in eighth * vectors / 8..(eighth + 1) * vectors / 8 {
            self.vector(i);
        }
    }
}

/// GHASH of less than a batch, or exactly one, then of `end` if there is one. Zero blocks are put
/// in front, where they count for nothing, so that whole vectors end with the last block.
#[inline(always)]
fn hash_rest<L: Lanes>(
    token: L::Token,
    powers: &Powers,
    hash: __m128i,
    text: &[u8],
    end: Option<u128>,
) -> __m128i {
    let blocks = text.len().div_ceil(BLOCK_LEN) + usize::from(end.is_some());
    if blocks == 0 {
        return hash;
    }
    let lanes = L::BYTES / BLOCK_LEN;
    let padded = blocks.next_multiple_of(lanes);
    let first = (padded - blocks) * BLOCK_LEN;
    let mut buffer = Aligned([0; BATCH_LEN]);
    buffer.0[first..first + text.len()].copy_from_slice(text);
    if let Some(end) = end {
        let at = (padded - 1) * BLOCK_LEN;
        buffer.0[at..at + BLOCK_LEN].copy_from_slice(&end.to_be_bytes());
    }
    let bytes = to_number(hash).to_be_bytes();
    xor_in_place(&mut buffer.0[first..first + BLOCK_LEN], &bytes);
    let powers = &powers.0[POWERS - padded..];
    let zero = to_vector(0);
    Hashing::<L>::new(token, powers, zero, &buffer.0[..padded * BLOCK_LEN]).run()
}

/// GHASH of less than a batch, then of the block of lengths, which may be one block too many.
#[inline(always)]
fn hash_end<L: Lanes>(
    token: L::Token,
    powers: &Powers,
    hash: __m128i,
    text: &[u8],
    lengths: u128,
) -> __m128i {
    if text.len() <= BATCH_LEN - BLOCK_LEN {
        return hash_rest::<L>(token, powers, hash, text, Some(lengths));
    }
    let hash = hash_rest::<L>(token, powers, hash, text, None);
    hash_rest::<L>(token, powers, hash, &[], Some(lengths))
}

/// GHASH goes on over `bytes`, the last block completed with zeros.
#[inline(always)]
pub fn ghash<L: Lanes>(token: L::Token, powers: &Powers, hash: u128, bytes: &[u8]) -> u128 {
    let mut hash = to_vector(hash);
    for batch in bytes.chunks(BATCH_LEN) {
        hash = hash_rest::<L>(token, powers, hash, batch, None);
    }
    to_number(hash)
}

/// The block that hides the hash, encrypted beside others: alone it would take as long as a batch.
struct Mask<'a, L: Lanes> {
    token: L::Token,
    keys: &'a RoundKeys,
    set: Sets<L, 1>,
}

impl<'a, L: Lanes> Mask<'a, L> {
    /// Takes the counter's next block, and skips the rest of that set.
    #[inline(always)]
    fn new(token: L::Token, keys: &'a RoundKeys, counter: &mut Counter<L>) -> Self {
        let next = counter.next;
        let set = counter.take::<1>(token);
        counter.next = next.wrapping_add(1);
        Self { token, keys, set }
    }

    #[inline(always)]
    fn done(mut self) -> u128 {
        self.set[0].reverse();
        let mut bytes = Aligned([0; BATCH_LEN]);
        to_blocks(self.set[0])[0].store(&mut bytes.0);
        words_of(&bytes.0)
    }
}

impl<L: Lanes> Beside for Mask<'_, L> {
    #[inline(always)]
    fn step(&mut self, eighth: usize) {
        four_rounds(
            self.token,
            &self.keys.0.as_chunks::<4>().0[eighth],
            &mut self.set,
        );
    }
}

/// The first block as number.
#[inline(always)]
fn words_of(bytes: &[u8]) -> u128 {
    u128::from_be_bytes(*bytes.first_chunk().expect("invariant: a batch has blocks"))
}

/// CTR and GHASH in one pass: in `SEAL` the batch before is hashed beside the rounds of this one,
/// else this one, which is ciphertext still. Returns the tag.
#[inline(always)]
pub fn gcm<L: Lanes, const SETS: usize, const SEAL: bool>(
    token: L::Token,
    keys: &RoundKeys,
    powers: &Powers,
    start: &GcmStart,
    text: &mut [u8],
) -> u128 {
    let mut hash = to_vector(start.hash);
    let mut counter = Counter::<L>::new(token, &start.counter);
    let mut mask = Mask::new(token, keys, &mut counter);
    let whole = text.len() - text.len() % BATCH_LEN;
    let mut at = 0;
    while at < whole {
        let mut sets = counter.take::<SETS>(token);
        if SEAL && at == 0 {
            rounds(token, keys, &mut sets, &mut mask);
        } else {
            let hashed = if SEAL { at - BATCH_LEN } else { at };
            let hashed = &text[hashed..hashed + BATCH_LEN];
            let mut hashing = Hashing::<L>::new(token, &powers.0, hash, hashed);
            if at == 0 {
                rounds(token, keys, &mut sets, &mut (&mut hashing, &mut mask));
            } else {
                rounds(token, keys, &mut sets, &mut hashing);
            }
            hash = hashing.sums.reduce();
        }
        xor_sets(token, sets, &mut text[at..at + BATCH_LEN]);
        at += BATCH_LEN;
    }
    if SEAL && whole > 0 {
        let last = &text[whole - BATCH_LEN..whole];
        hash = Hashing::<L>::new(token, &powers.0, hash, last).run();
    }
    let rest = &mut text[whole..];
    if !SEAL {
        hash = hash_end::<L>(token, powers, hash, rest, start.lengths);
    }
    if whole == 0 {
        ctr_rest::<L, SETS>(token, keys, counter, rest, &mut mask);
    } else if !rest.is_empty() {
        ctr_rest::<L, SETS>(token, keys, counter, rest, &mut ());
    }
    if SEAL {
        hash = hash_end::<L>(token, powers, hash, rest, start.lengths);
    }
    to_number(hash) ^ mask.done()
}
