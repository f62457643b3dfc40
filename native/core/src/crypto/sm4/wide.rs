//! What the vector kernels share: SM4 on sets of words, and CTR. `wide_gcm.rs` weaves GHASH in,
//! `wide_xts.rs` has the tweaks.
//!
//! A set is four vectors that hold word 0, 1, 2 and 3 of `BLOCKS` blocks. Several sets go through
//! the rounds side by side, so that the processor always has something to do that does not wait.
//! A batch is 64 blocks, `SETS` sets. GCM hashes one batch while the next one is encrypted, a
//! little before each four rounds; the products are summed over the batch and reduced once.
//!
//! Everything here is generic over the vector and always inlined into the functions that
//! `entry_points` makes, which are compiled with the kernel's processor features. No closure may
//! touch a vector: closures are compiled without the features, and every operation in them becomes
//! a call. Hence plain loops over indices.

// Loops over indices, for the reason above.
#![allow(clippy::needless_range_loop)]

use super::lanes::Lanes;
use super::{BLOCK_LEN, CK, FK, KEY_LEN, POWERS, RoundKeys, words, xor_in_place};

/// Bytes of a batch: as many blocks as there are powers, whatever the vector.
pub const BATCH_LEN: usize = POWERS * BLOCK_LEN;

/// Bytes on the stack, where vectors find them aligned.
#[repr(align(64))]
pub struct Aligned(pub [u8; BATCH_LEN]);

pub type Sets<L, const SETS: usize> = [[L; 4]; SETS];

/// What is done beside the rounds, an eighth of it before each four of them.
pub trait Beside {
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
pub fn four_rounds<L: Lanes, const SETS: usize>(
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
pub fn rounds<L: Lanes, const SETS: usize>(
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
    let key = words(key);
    let mut k = [L::splat(token, 0); 4];
    for i in 0..4 {
        k[i] = L::splat(token, key[i] ^ FK[i]);
    }
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
pub fn load_set<L: Lanes>(token: L::Token, text: &[u8]) -> [L; 4] {
    let mut rows = [L::splat(token, 0); 4];
    for i in 0..4 {
        rows[i] = L::load(token, &text[i * L::BYTES..]).swap_words();
    }
    L::transpose(rows)
}

/// Back to the order of memory.
#[inline(always)]
pub fn to_blocks<L: Lanes>(set: [L; 4]) -> [L; 4] {
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
pub struct Counter<L> {
    fixed: [L; 3],
    numbers: L,
    pub next: u32,
}

impl<L: Lanes> Counter<L> {
    #[inline(always)]
    pub fn new(token: L::Token, block: &[u8; BLOCK_LEN]) -> Self {
        let [a, b, c, next] = words(block);
        Self {
            fixed: [L::splat(token, a), L::splat(token, b), L::splat(token, c)],
            numbers: L::numbers(token),
            next,
        }
    }

    #[inline(always)]
    pub fn take<const SETS: usize>(&mut self, token: L::Token) -> Sets<L, SETS> {
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
pub fn xor_sets<L: Lanes, const SETS: usize>(
    token: L::Token,
    sets: Sets<L, SETS>,
    text: &mut [u8],
) {
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
pub fn ctr_rest<L: Lanes, const SETS: usize>(
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
