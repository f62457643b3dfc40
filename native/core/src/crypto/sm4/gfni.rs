//! Affine maps of SM4's S-box in the notation of GF2P8AFFINEQB: the row of output bit 0 is the
//! highest byte.
//!
//! With A and c of the standard and a map M from SM4's field (x^8+x^7+x^6+x^5+x^4+x^2+1) to AES's
//! (x^8+x^4+x^3+x+1): S(x) = OUT(1 / IN(x)), IN = M (A x + c), OUT = A M^-1 x + c, the inverse
//! being AES's. The tests encrypt with all 256 values of a byte.

// Nibbles and bits: `try_from` is not for constants.
#![allow(clippy::cast_possible_truncation)]

/// IN: linear part and constant.
pub const IN_MATRIX: u64 = 0x34ac_259e_022d_bc52;
pub const IN_CONSTANT: u8 = 0x65;
/// OUT: linear part and constant.
pub const OUT_MATRIX: u64 = 0xd72d_8e51_1e6c_8b19;
pub const OUT_CONSTANT: u8 = 0xd3;
/// OUT, then a rotation of the byte by two bits, left: see `Lanes256::round`.
pub const OUT_ROTATED_MATRIX: u64 = OUT_MATRIX.rotate_right(16);
pub const OUT_ROTATED_CONSTANT: u8 = OUT_CONSTANT.rotate_left(2);
/// OUT, then the sum of the byte and itself shifted by two bits, left.
pub const OUT_SHIFTED_MATRIX: u64 = OUT_MATRIX ^ (OUT_MATRIX >> 16);
pub const OUT_SHIFTED_CONSTANT: u8 = OUT_CONSTANT ^ (OUT_CONSTANT << 2);
/// AES's S-box is inversion, then a map; this undoes the map.
const UNDO_AES_MATRIX: u64 = {
    // Output bit i is the sum of input bits i+2, i+5 and i+7.
    let mut matrix = 0;
    let mut i = 0;
    while i < 8 {
        let row = (1u64 << ((i + 2) % 8)) | (1 << ((i + 5) % 8)) | (1 << ((i + 7) % 8));
        matrix |= row << (8 * (7 - i));
        i += 1;
    }
    matrix
};
const UNDO_AES_CONSTANT: u8 = 0x05;
/// Turns the bits of a byte around.
pub const REVERSE_BITS: u64 = 0x8040_2010_0804_0201;

/// The map of `matrix` and `constant`.
pub const fn affine(matrix: u64, constant: u8, x: u8) -> u8 {
    let mut result = constant;
    let mut i = 0;
    while i < 8 {
        let row = matrix.to_be_bytes()[i];
        result ^= (((row & x).count_ones() & 1) as u8) << i;
        i += 1;
    }
    result
}

/// A map as two tables of 16, by the low and the high half of the byte, which PSHUFB reads in a
/// register: no address depends on what is looked up.
pub struct Halves {
    pub low: [u8; 16],
    pub high: [u8; 16],
}

impl Halves {
    const fn of(matrix: u64, constant: u8) -> Self {
        let mut halves = Self {
            low: [0; 16],
            high: [0; 16],
        };
        let mut i = 0;
        while i < 16 {
            halves.low[i] = affine(matrix, constant, i as u8);
            halves.high[i] = affine(matrix, 0, (i as u8) << 4);
            i += 1;
        }
        halves
    }

    /// Two maps, one after the other.
    const fn chain(first: (u64, u8), second: (u64, u8)) -> Self {
        let mut halves = Self {
            low: [0; 16],
            high: [0; 16],
        };
        let mut i = 0;
        while i < 16 {
            halves.low[i] = affine(second.0, second.1, affine(first.0, first.1, i as u8));
            halves.high[i] = affine(second.0, 0, affine(first.0, 0, (i as u8) << 4));
            i += 1;
        }
        halves
    }
}

/// IN, before AES's S-box.
pub static BEFORE_AES: Halves = Halves::of(IN_MATRIX, IN_CONSTANT);
/// From AES's S-box to SM4's.
pub static AFTER_AES: Halves = Halves::chain(
    (UNDO_AES_MATRIX, UNDO_AES_CONSTANT),
    (OUT_MATRIX, OUT_CONSTANT),
);
/// Turns the bits of a byte around.
pub static REVERSED: Halves = Halves::of(REVERSE_BITS, 0);
