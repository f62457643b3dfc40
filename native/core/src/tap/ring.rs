//! The bytes that wait for the encoder: one preallocated ring, written by many, each in a part of
//! its own, read by the encoder once the part is published, reused once its frame is committed.
//!
//! Who may touch which part is decided by the queue, under its lock; see `queue`.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;

use crate::constants::BLOCK_SIZE;

#[derive(Debug)]
pub struct Ring {
    bytes: Box<[UnsafeCell<u8>]>,
}

// SAFETY: the queue hands out disjoint parts. A part is written only by the holder of its
// reservation, before it publishes (release), and read only by the encoder after it has seen the
// part published (acquire) and before the queue gives the part out again (under its lock).
unsafe impl Sync for Ring {}

impl Ring {
    /// A ring of `bytes`, touched page by page so that no page fault waits for memory later.
    pub fn new(bytes: usize) -> Self {
        let mut zeroes = vec![0u8; bytes];
        // A read-modify-write that the compiler cannot see through makes each page resident.
        for page in zeroes.chunks_mut(BLOCK_SIZE) {
            page[0] = std::hint::black_box(0);
        }
        let raw = Box::into_raw(zeroes.into_boxed_slice());
        // SAFETY: UnsafeCell<u8> has the layout of u8, so the slice pointer keeps size, alignment
        // and allocation.
        let bytes = unsafe { Box::from_raw(raw as *mut [UnsafeCell<u8>]) };
        Self { bytes }
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Copies `data` to `offset`. Only the holder of the reservation of that part may call it.
    pub(super) fn write(&self, offset: usize, data: &[u8]) {
        let part = &self.bytes[offset..offset + data.len()];
        // SAFETY: the part is in bounds, and the queue has given it to this caller alone.
        unsafe {
            std::ptr::copy_nonoverlapping(
                data.as_ptr(),
                UnsafeCell::raw_get(part.as_ptr()),
                data.len(),
            );
        }
    }

    /// A published part. Only the encoder may call it, until the part's frame is committed.
    pub(super) fn read(&self, offset: usize, length: usize) -> &[u8] {
        let part = &self.bytes[offset..offset + length];
        // SAFETY: the part is in bounds, published, and not given out again before its commit, so
        // nobody writes to it while the slice lives.
        unsafe { std::slice::from_raw_parts(UnsafeCell::raw_get(part.as_ptr()), length) }
    }
}
