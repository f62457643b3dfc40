//! LZ4 blocks, through the C library.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int};

unsafe extern "C" {
    /// Of the same library as `lz4_sys`, which does not declare it.
    fn LZ4_decompress_safe_usingDict(
        src: *const c_char,
        dst: *mut c_char,
        src_len: c_int,
        dst_capacity: c_int,
        dict: *const c_char,
        dict_len: c_int,
    ) -> c_int;
}

/// A length as C knows it. Cells and dictionaries are far below the limit.
fn c_len(len: usize) -> c_int {
    c_int::try_from(len).expect("invariant: LZ4 sees cells and dictionaries only")
}

/// Appends `src`, compressed, to `out`, unless that takes more than `len_max` bytes; then `out` is
/// unchanged.
pub(super) fn compress_append(src: &[u8], len_max: usize, out: &mut Vec<u8>) -> bool {
    let (src_len, capacity) = (c_len(src.len()), c_len(len_max));
    out.reserve(len_max);
    let spare = out.spare_capacity_mut();
    // SAFETY: `src` is readable for its length, the spare capacity is writable for `len_max` bytes
    // (reserved above), both lengths are those passed, and LZ4 writes no further than the capacity.
    let written = unsafe {
        lz4_sys::LZ4_compress_default(
            src.as_ptr().cast(),
            spare.as_mut_ptr().cast(),
            src_len,
            capacity,
        )
    };
    // Zero or less: it did not fit.
    let Ok(written @ 1..) = usize::try_from(written) else {
        return false;
    };
    assert!(written <= len_max, "invariant: LZ4 keeps to the capacity");
    // SAFETY: LZ4 has initialized `written` bytes behind the old length, within the capacity.
    unsafe { out.set_len(out.len() + written) };
    true
}

/// Fills `out` from an LZ4 block and the dictionary that it was made with. False unless the block
/// is well formed and holds exactly so many bytes; `out` is unspecified then.
pub(super) fn decompress(block: &[u8], dict: &[u8], out: &mut [u8]) -> bool {
    let lens = (c_len(block.len()), c_len(out.len()), c_len(dict.len()));
    // SAFETY: `block` and `dict` are readable and `out` is writable for the lengths that are
    // passed; `out` overlaps neither (it is borrowed mutably). The `safe` variant bounds its reads
    // and writes whatever the block holds.
    let read = unsafe {
        LZ4_decompress_safe_usingDict(
            block.as_ptr().cast(),
            out.as_mut_ptr().cast(),
            lens.0,
            lens.1,
            dict.as_ptr().cast(),
            lens.2,
        )
    };
    usize::try_from(read) == Ok(out.len())
}

#[cfg(test)]
pub(super) mod reference {
    //! Compression with a dictionary, as the encoder that finds references will do it.

    use std::ffi::{c_char, c_int};

    use super::c_len;

    unsafe extern "C" {
        fn LZ4_loadDict(
            stream: *mut lz4_sys::LZ4StreamEncode,
            dict: *const c_char,
            dict_len: c_int,
        ) -> c_int;
        fn LZ4_compress_fast_continue(
            stream: *mut lz4_sys::LZ4StreamEncode,
            src: *const c_char,
            dst: *mut c_char,
            src_len: c_int,
            dst_capacity: c_int,
            acceleration: c_int,
        ) -> c_int;
    }

    pub fn compress_with_dict(src: &[u8], dict: &[u8]) -> Vec<u8> {
        let mut out = vec![0u8; src.len() * 2 + 64];
        // SAFETY: the stream is made, used and freed here; all buffers outlive the calls and have
        // the lengths that are passed.
        let written = unsafe {
            let stream = lz4_sys::LZ4_createStream();
            assert!(!stream.is_null());
            LZ4_loadDict(stream, dict.as_ptr().cast(), c_len(dict.len()));
            let written = LZ4_compress_fast_continue(
                stream,
                src.as_ptr().cast(),
                out.as_mut_ptr().cast(),
                c_len(src.len()),
                c_len(out.len()),
                1,
            );
            lz4_sys::LZ4_freeStream(stream);
            written
        };
        out.truncate(usize::try_from(written).unwrap());
        out
    }
}
