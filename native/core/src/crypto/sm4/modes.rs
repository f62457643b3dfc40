//! CTR and CBC (GB/T 17964, NIST SP 800-38A), for data that leaves for other programs. Neither
//! authenticates anything.

use std::fmt;

use zeroize::{Zeroize, ZeroizeOnDrop};

use super::{BLOCK_LEN, KEY_LEN, Kernel, RoundKeys, words, xor_in_place};
use crate::crypto::CryptoError;

/// CTR, whose counter block is one big-endian number of 128 bits. A stream: calls go on where the
/// last one ended, at any byte. Encrypts and decrypts.
pub struct Ctr {
    kernel: Kernel,
    keys: RoundKeys,
    counter: u128,
    /// Rest of the last block's key stream, at the end of the array.
    stream: [u8; BLOCK_LEN],
    left: usize,
}

impl fmt::Debug for Ctr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ctr")
            .field("kernel", &self.kernel)
            .finish_non_exhaustive()
    }
}

impl Drop for Ctr {
    fn drop(&mut self) {
        self.stream.zeroize();
    }
}

impl Ctr {
    pub fn new(kernel: Kernel, key: &[u8; KEY_LEN], counter: &[u8; BLOCK_LEN]) -> Self {
        Self {
            kernel,
            keys: kernel.expand(key),
            counter: u128::from_be_bytes(*counter),
            stream: [0; BLOCK_LEN],
            left: 0,
        }
    }

    pub fn apply(&mut self, text: &mut [u8]) {
        let (begun, text) = text.split_at_mut(self.left.min(text.len()));
        xor_in_place(begun, &self.stream[BLOCK_LEN - self.left..]);
        self.left -= begun.len();
        let whole = text.len() - text.len() % BLOCK_LEN;
        let (mut text, rest) = text.split_at_mut(whole);
        while !text.is_empty() {
            // A kernel counts in 32 bits: up to where those are used up.
            let counter = self.counter.to_be_bytes();
            let until_carry = (1u64 << 32) - u64::from(words(&counter)[3]);
            let blocks = until_carry.min((text.len() / BLOCK_LEN) as u64);
            let len = usize::try_from(blocks).expect("invariant: it fits") * BLOCK_LEN;
            let (part, later) = text.split_at_mut(len);
            self.kernel.ctr32(&self.keys, &counter, part);
            self.counter = self.counter.wrapping_add(u128::from(blocks));
            text = later;
        }
        if !rest.is_empty() {
            let counter = self.counter.to_be_bytes();
            self.stream = self.kernel.block(&self.keys, counter);
            self.counter = self.counter.wrapping_add(1);
            xor_in_place(rest, &self.stream);
            self.left = BLOCK_LEN - rest.len();
        }
    }
}

/// CBC on whole blocks; padding is the caller's. A stream: calls go on where the last one ended.
#[derive(ZeroizeOnDrop)]
pub struct Cbc {
    #[zeroize(skip)]
    kernel: Kernel,
    encryption: RoundKeys,
    decryption: RoundKeys,
    last: [u8; BLOCK_LEN],
}

impl fmt::Debug for Cbc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cbc")
            .field("kernel", &self.kernel)
            .finish_non_exhaustive()
    }
}

impl Cbc {
    /// Blocks that are decrypted in one go; what they were is needed for that long.
    const GO: usize = 64;

    pub fn new(kernel: Kernel, key: &[u8; KEY_LEN], iv: &[u8; BLOCK_LEN]) -> Self {
        let encryption = kernel.expand(key);
        Self {
            kernel,
            decryption: encryption.reversed(),
            encryption,
            last: *iv,
        }
    }

    /// One block after the other, by CBC's nature.
    pub fn encrypt(&mut self, text: &mut [u8]) -> Result<(), CryptoError> {
        for block in whole_blocks(text)? {
            xor_in_place(block, &self.last);
            *block = self.kernel.block(&self.encryption, *block);
            self.last = *block;
        }
        Ok(())
    }

    pub fn decrypt(&mut self, text: &mut [u8]) -> Result<(), CryptoError> {
        whole_blocks(text)?;
        let mut before = [0; Self::GO * BLOCK_LEN];
        for part in text.chunks_mut(before.len()) {
            let last = part.len() - BLOCK_LEN;
            before[..BLOCK_LEN].copy_from_slice(&self.last);
            before[BLOCK_LEN..part.len()].copy_from_slice(&part[..last]);
            self.last.copy_from_slice(&part[last..]);
            self.kernel.blocks(&self.decryption, part);
            xor_in_place(part, &before);
        }
        Ok(())
    }
}

fn whole_blocks(text: &mut [u8]) -> Result<&mut [[u8; BLOCK_LEN]], CryptoError> {
    match text.as_chunks_mut::<BLOCK_LEN>() {
        (blocks, []) => Ok(blocks),
        _ => Err(CryptoError::TextLength),
    }
}
