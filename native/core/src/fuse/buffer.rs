//! A reader's buffer: one request in, one answer out, in place.
//!
//! The payload of a WRITE begins at a page boundary, and so does what a READ returns. Every page is
//! touched when the buffer is made: while a process is being killed the kernel can no longer fault
//! pages in, and a request whose copy fails is lost with an error instead of being resent.

use super::abi::{IN_HEADER, OUT_HEADER, WRITE_IN};

const PAGE: usize = 4096;
const DATA: usize = PAGE;
const MESSAGE: usize = DATA - IN_HEADER - WRITE_IN;
const ANSWER: usize = DATA - OUT_HEADER;

const _: () = assert!(MESSAGE < ANSWER);

pub(super) struct Buffer {
    bytes: Vec<u8>,
    /// First page boundary in `bytes`.
    base: usize,
    end: usize,
}

impl Buffer {
    pub(super) fn new(data_bytes: usize) -> Self {
        let mut bytes = vec![0u8; PAGE + DATA + data_bytes];
        // A fresh zeroed allocation has no pages yet; writing gives it them.
        bytes.fill(0xa5);
        let base = bytes.as_ptr().align_offset(PAGE);
        Self {
            bytes,
            base,
            end: base + DATA + data_bytes,
        }
    }

    /// Where the kernel writes a request.
    pub(super) fn whole(&mut self) -> &mut [u8] {
        &mut self.bytes[self.base + MESSAGE..self.end]
    }

    /// The request that a read of `length` bytes brought.
    pub(super) fn message(&self, length: usize) -> &[u8] {
        &self.bytes[self.base + MESSAGE..][..length]
    }

    /// Payload of a WRITE, or room for an answer's body.
    pub(super) fn data(&mut self) -> &mut [u8] {
        &mut self.bytes[self.base + DATA..self.end]
    }

    /// The answer: `header` and the first `length` bytes of `data`.
    pub(super) fn answer(&mut self, header: [u8; OUT_HEADER], length: usize) -> &[u8] {
        let start = self.base + ANSWER;
        self.bytes[start..start + OUT_HEADER].copy_from_slice(&header);
        &self.bytes[start..start + OUT_HEADER + length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payload_is_page_aligned_and_the_answer_is_contiguous() {
        let mut buffer = Buffer::new(8192);
        assert_eq!(buffer.data().as_ptr().align_offset(PAGE), 0);
        assert_eq!(buffer.data().len(), 8192);
        assert_eq!(buffer.whole().len(), IN_HEADER + WRITE_IN + 8192);
        buffer.whole()[IN_HEADER + WRITE_IN] = 7;
        assert_eq!(buffer.data()[0], 7);
        let answer = buffer.answer([1; OUT_HEADER], 2);
        assert_eq!(
            (answer.len(), answer[OUT_HEADER - 1], answer[OUT_HEADER]),
            (18, 1, 7)
        );
    }
}
