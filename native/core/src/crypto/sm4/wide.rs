//! What the vector kernels share: SM4 on sets of words, GHASH, and both woven together.
//!
//! A set is four vectors that hold word 0, 1, 2 and 3 of `BLOCKS` blocks. Several sets go through
//! the rounds side by side, so that the processor always has something to do that does not wait.
//! A batch is 64 blocks, `SETS` sets. GCM hashes one batch while the next one is encrypted, a little after
//! each four rounds; the products are summed over the batch and reduced once.
//!
//! Everything here is generic over the vector and always inlined into the functions that
//! `entry_points` makes, which are compiled with the kernel's processor features. No closure may
//! touch a vector: closures are compiled without the features, and every operation in them becomes
//! a call. Hence plain loops over indices.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m128i, _mm_clmulepi64_si128, _mm_set_epi64x, _mm_shuffle_epi32, _mm_slli_si128,
    _mm_srli_si128, _mm_storeu_si128, _mm_xor_si128,
};

use super::kernel::GcmStart;
use super::{BLOCK_LEN, CK, FK, KEY_LEN, POWERS, Powers, RoundKeys, words, xor_in_place};

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

/// Bytes of a batch: as many blocks as there are powers, whatever the vector.
const BATCH_LEN: usize = POWERS * BLOCK_LEN;

/// Bytes on the stack, where vectors find them aligned.
#[repr(align(64))]
struct Aligned([u8; BATCH_LEN]);

type Sets<L, const SETS: usize> = [[L; 4]; SETS];

/// What is done beside the rounds, an eighth of it before each four of them.
trait Beside {
    fn step(&mut self, eighth: usize);
}

impl Beside for () {
    #[inline(always)]
    fn step(&mut self, _: usize) {}
}

impl<A: Beside, B: Beside> Beside for (&mut A, &mut B) {
    #[inline(always)]
    fn step(&mut self, eighth: usize) {
        self.0.step(eighth);
        self.1.step(eighth);
    }
}

/// Four rounds on all sets.
#[inline(always)]
fn four_rounds<L: Lanes, const SETS: usize>(
    token: L::Token,
    keys: &[u32; 4],
    sets: &mut Sets<L, SETS>,
) {
    // The word that was made last comes last, so that nothing else waits for it.
    let key = L::splat(token, keys[0]);
    for [a, b, c, d] in sets.iter_mut() {
        *a = key.xor3(*b, *c).xor(*d).round(*a);
    }
    let key = L::splat(token, keys[1]);
    for [a, b, c, d] in sets.iter_mut() {
        *b = key.xor3(*c, *d).xor(*a).round(*b);
    }
    let key = L::splat(token, keys[2]);
    for [a, b, c, d] in sets.iter_mut() {
        *c = key.xor3(*d, *a).xor(*b).round(*c);
    }
    let key = L::splat(token, keys[3]);
    for [a, b, c, d] in sets.iter_mut() {
        *d = key.xor3(*a, *b).xor(*c).round(*d);
    }
}

/// The 32 rounds on all sets, then the order of words that SM4 ends with.
#[inline(always)]
fn rounds<L: Lanes, const SETS: usize>(
    token: L::Token,
    keys: &RoundKeys,
    sets: &mut Sets<L, SETS>,
    beside: &mut impl Beside,
) {
    for (eighth, four) in keys.0.as_chunks::<4>().0.iter().enumerate() {
        beside.step(eighth);
        four_rounds(token, four, sets);
    }
    for set in sets {
        set.reverse();
    }
}

/// Key schedule.
#[inline(always)]
pub fn expand<L: Lanes>(token: L::Token, key: &[u8; KEY_LEN]) -> RoundKeys {
    let [a, b, c, d] = words(key);
    let mut k = [
        L::splat(token, a ^ FK[0]),
        L::splat(token, b ^ FK[1]),
        L::splat(token, c ^ FK[2]),
        L::splat(token, d ^ FK[3]),
    ];
    let mut keys = RoundKeys([0; 32]);
    for i in 0..32 {
        let sum = L::splat(token, CK[i]).xor3(k[1], k[2]).xor(k[3]);
        let next = sum.key_round(k[0]);
        keys.0[i] = next.low_word();
        k = [k[1], k[2], k[3], next];
    }
    keys
}

/// One set of blocks from memory.
#[inline(always)]
fn load_set<L: Lanes>(token: L::Token, text: &[u8]) -> [L; 4] {
    let mut rows = [L::splat(token, 0); 4];
    for i in 0..4 {
        rows[i] = L::load(token, &text[i * L::BYTES..]).swap_words();
    }
    L::transpose(rows)
}

/// Back to the order of memory.
#[inline(always)]
fn to_blocks<L: Lanes>(set: [L; 4]) -> [L; 4] {
    let [a, b, c, d] = L::transpose(set);
    [
        a.swap_words(),
        b.swap_words(),
        c.swap_words(),
        d.swap_words(),
    ]
}

#[inline(always)]
fn blocks_batch<L: Lanes, const SETS: usize>(token: L::Token, keys: &RoundKeys, text: &mut [u8]) {
    let set_len = L::BLOCKS * BLOCK_LEN;
    let mut sets: Sets<L, SETS> = [[L::splat(token, 0); 4]; SETS];
    for s in 0..SETS {
        sets[s] = load_set(token, &text[s * set_len..(s + 1) * set_len]);
    }
    rounds(token, keys, &mut sets, &mut ());
    for s in 0..SETS {
        let vectors = to_blocks(sets[s]);
        for i in 0..4 {
            vectors[i].store(&mut text[s * set_len + i * L::BYTES..]);
        }
    }
}

/// The bare cipher on whole blocks.
#[inline(always)]
pub fn blocks<L: Lanes, const SETS: usize>(token: L::Token, keys: &RoundKeys, text: &mut [u8]) {
    let set_len = L::BLOCKS * BLOCK_LEN;
    let mut batches = text.chunks_exact_mut(BATCH_LEN);
    for batch in &mut batches {
        blocks_batch::<L, SETS>(token, keys, batch);
    }
    let rest = batches.into_remainder();
    if rest.is_empty() {
        return;
    }
    let mut padded = Aligned([0; BATCH_LEN]);
    padded.0[..rest.len()].copy_from_slice(rest);
    if rest.len() <= set_len {
        blocks_batch::<L, 1>(token, keys, &mut padded.0[..set_len]);
    } else {
        blocks_batch::<L, SETS>(token, keys, &mut padded.0[..BATCH_LEN]);
    }
    rest.copy_from_slice(&padded.0[..rest.len()]);
}

/// Counter blocks of consecutive sets.
#[derive(Clone, Copy)]
struct Counter<L> {
    fixed: [L; 3],
    numbers: L,
    next: u32,
}

impl<L: Lanes> Counter<L> {
    #[inline(always)]
    fn new(token: L::Token, block: &[u8; BLOCK_LEN]) -> Self {
        let [a, b, c, next] = words(block);
        Self {
            fixed: [L::splat(token, a), L::splat(token, b), L::splat(token, c)],
            numbers: L::numbers(token),
            next,
        }
    }

    #[inline(always)]
    fn take<const SETS: usize>(&mut self, token: L::Token) -> Sets<L, SETS> {
        let [a, b, c] = self.fixed;
        let mut sets = [[a, b, c, a]; SETS];
        for set in &mut sets {
            set[3] = L::splat(token, self.next).add(self.numbers);
            #[expect(clippy::cast_possible_truncation, reason = "8 or 16")]
            let blocks = L::BLOCKS as u32;
            self.next = self.next.wrapping_add(blocks);
        }
        sets
    }
}

/// `text` ^= key stream; it has exactly the sets' length.
#[inline(always)]
fn xor_sets<L: Lanes, const SETS: usize>(token: L::Token, sets: Sets<L, SETS>, text: &mut [u8]) {
    for s in 0..SETS {
        let vectors = to_blocks(sets[s]);
        for i in 0..4 {
            let text = &mut text[(4 * s + i) * L::BYTES..];
            vectors[i].xor(L::load(token, text)).store(text);
        }
    }
}

/// XOR with the key stream, for less than a batch.
#[inline(always)]
fn ctr_rest<L: Lanes, const SETS: usize>(
    token: L::Token,
    keys: &RoundKeys,
    mut counter: Counter<L>,
    text: &mut [u8],
    beside: &mut impl Beside,
) {
    let mut stream = Aligned([0; BATCH_LEN]);
    let set_len = L::BLOCKS * BLOCK_LEN;
    if text.len() <= set_len {
        let mut sets = counter.take::<1>(token);
        rounds(token, keys, &mut sets, beside);
        xor_sets(token, sets, &mut stream.0[..set_len]);
    } else {
        let mut sets = counter.take::<SETS>(token);
        rounds(token, keys, &mut sets, beside);
        xor_sets(token, sets, &mut stream.0[..BATCH_LEN]);
    }
    xor_in_place(text, &stream.0);
}

/// CTR; the last four bytes of the counter block count, modulo 2^32.
#[inline(always)]
pub fn ctr32<L: Lanes, const SETS: usize>(
    token: L::Token,
    keys: &RoundKeys,
    counter: &[u8; BLOCK_LEN],
    text: &mut [u8],
) {
    let mut counter = Counter::<L>::new(token, counter);
    let mut batches = text.chunks_exact_mut(BATCH_LEN);
    for batch in &mut batches {
        let mut sets = counter.take::<SETS>(token);
        rounds(token, keys, &mut sets, &mut ());
        xor_sets(token, sets, batch);
    }
    let rest = batches.into_remainder();
    if !rest.is_empty() {
        ctr_rest::<L, SETS>(token, keys, counter, rest, &mut ());
    }
}

/// A hash as vector of 128 bits.
#[inline(always)]
fn to_vector(hash: u128) -> __m128i {
    #[expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap)]
    let (high, low) = ((hash >> 64) as i64, hash as i64);
    // SAFETY: x86-64 has SSE2.
    unsafe { _mm_set_epi64x(high, low) }
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
        hash = hash_rest::<L>(token, powers, hash, rest, Some(start.lengths));
    }
    if whole == 0 {
        ctr_rest::<L, SETS>(token, keys, counter, rest, &mut mask);
    } else if !rest.is_empty() {
        ctr_rest::<L, SETS>(token, keys, counter, rest, &mut ());
    }
    if SEAL {
        hash = hash_rest::<L>(token, powers, hash, rest, Some(start.lengths));
    }
    to_number(hash) ^ mask.done()
}

/// The tweaks of a batch, as vectors in memory.
#[inline(always)]
fn first_tweaks<L: Lanes>(token: L::Token, mut tweak: u128, out: &mut Aligned) {
    // x^0 to x^7 one by one; eight further is one byte further.
    let base = 8 * BLOCK_LEN;
    for place in out.0[..base].chunks_exact_mut(BLOCK_LEN) {
        place.copy_from_slice(&tweak.to_le_bytes());
        tweak = super::xts::double(tweak);
    }
    for i in base / L::BYTES..BATCH_LEN / L::BYTES {
        let before = L::load(token, &out.0[i * L::BYTES - base..]);
        further::<L, 1, 15>(token, before).store(&mut out.0[i * L::BYTES..]);
    }
}

/// Tweaks times x^(8 UP); `DOWN` is 16 - UP.
#[inline(always)]
fn further<L: Lanes, const UP: i32, const DOWN: i32>(token: L::Token, tweaks: L) -> L {
    let over = tweaks.down::<DOWN>();
    tweaks
        .up::<UP>()
        .xor(over.product::<0x00>(L::splat_low(token, 0x87)))
}

/// One batch of XTS. `tweaks` has the batch's.
#[inline(always)]
fn xts_batch<L: Lanes, const SETS: usize, const GB: bool>(
    token: L::Token,
    keys: &RoundKeys,
    tweaks: &Aligned,
    text: &mut [u8],
) {
    let mut sets: Sets<L, SETS> = [[L::splat(token, 0); 4]; SETS];
    for s in 0..SETS {
        for i in 0..4 {
            let at = (4 * s + i) * L::BYTES;
            let tweak = tweak::<L, GB>(token, &tweaks.0[at..]);
            sets[s][i] = L::load(token, &text[at..]).xor(tweak).swap_words();
        }
        sets[s] = L::transpose(sets[s]);
    }
    rounds(token, keys, &mut sets, &mut ());
    for s in 0..SETS {
        let vectors = to_blocks(sets[s]);
        for i in 0..4 {
            let at = (4 * s + i) * L::BYTES;
            let tweak = tweak::<L, GB>(token, &tweaks.0[at..]);
            vectors[i].xor(tweak).store(&mut text[at..]);
        }
    }
}

/// Tweaks as they are used.
#[inline(always)]
fn tweak<L: Lanes, const GB: bool>(token: L::Token, tweaks: &[u8]) -> L {
    let tweaks = L::load(token, tweaks);
    if GB { tweaks.reverse_bits() } else { tweaks }
}

/// XTS on whole blocks. Tweaks are kept as IEEE 1619 orders bits; GB/T 17964 has the bits of each
/// byte the other way, which is one map more where a tweak is used. Returns the next tweak.
#[inline(always)]
pub fn xts<L: Lanes, const SETS: usize, const GB: bool>(
    token: L::Token,
    keys: &RoundKeys,
    tweak: u128,
    text: &mut [u8],
) -> u128 {
    let mut tweaks = Aligned([0; BATCH_LEN]);
    first_tweaks::<L>(token, tweak, &mut tweaks);
    let mut batches = text.chunks_exact_mut(BATCH_LEN);
    for batch in &mut batches {
        xts_batch::<L, SETS, GB>(token, keys, &tweaks, batch);
        for place in tweaks.0.chunks_exact_mut(L::BYTES) {
            further::<L, 8, 8>(token, L::load(token, place)).store(place);
        }
    }
    let rest = batches.into_remainder();
    if !rest.is_empty() {
        let mut padded = Aligned([0; BATCH_LEN]);
        padded.0[..rest.len()].copy_from_slice(rest);
        if rest.len() <= L::BLOCKS * BLOCK_LEN {
            let set = &mut padded.0[..L::BLOCKS * BLOCK_LEN];
            xts_batch::<L, 1, GB>(token, keys, &tweaks, set);
        } else {
            xts_batch::<L, SETS, GB>(token, keys, &tweaks, &mut padded.0[..BATCH_LEN]);
        }
        rest.copy_from_slice(&padded.0[..rest.len()]);
    }
    let next = rest.len();
    let next = &tweaks.0[next..next + BLOCK_LEN];
    u128::from_le_bytes(next.try_into().expect("invariant: a tweak has 16 bytes"))
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
            use crate::crypto::sm4::{BLOCK_LEN, KEY_LEN, Powers, RoundKeys, wide};

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
                wide::powers::<$lanes>(token(), hash_key)
            }

            #[target_feature(enable = $features)]
            fn ghash(powers: &Powers, hash: u128, bytes: &[u8]) -> u128 {
                wide::ghash::<$lanes>(token(), powers, hash, bytes)
            }

            #[target_feature(enable = $features)]
            fn seal(keys: &RoundKeys, powers: &Powers, start: &GcmStart, text: &mut [u8]) -> u128 {
                wide::gcm::<$lanes, $sets, true>(token(), keys, powers, start, text)
            }

            #[target_feature(enable = $features)]
            fn open(keys: &RoundKeys, powers: &Powers, start: &GcmStart, text: &mut [u8]) -> u128 {
                wide::gcm::<$lanes, $sets, false>(token(), keys, powers, start, text)
            }

            #[target_feature(enable = $features)]
            fn xts_ieee(keys: &RoundKeys, tweak: u128, text: &mut [u8]) -> u128 {
                wide::xts::<$lanes, $sets, false>(token(), keys, tweak, text)
            }

            #[target_feature(enable = $features)]
            fn xts_gb(keys: &RoundKeys, tweak: u128, text: &mut [u8]) -> u128 {
                wide::xts::<$lanes, $sets, true>(token(), keys, tweak, text)
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
