//! XTS on batches, with its tweaks as vectors.

// Loops over indices: see `wide.rs`.
#![allow(clippy::needless_range_loop)]

use super::lanes::Lanes;
use super::wide::{Aligned, BATCH_LEN, Sets, rounds, to_blocks};
use super::{BLOCK_LEN, RoundKeys, xts::double};

/// The tweaks of a batch, as vectors in memory.
#[inline(always)]
fn first_tweaks<L: Lanes>(token: L::Token, mut tweak: u128, out: &mut Aligned) {
    // x^0 to x^7 one by one; eight further is one byte further.
    let base = 8 * BLOCK_LEN;
    for place in out.0[..base].chunks_exact_mut(BLOCK_LEN) {
        place.copy_from_slice(&tweak.to_le_bytes());
        tweak = double(tweak);
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
