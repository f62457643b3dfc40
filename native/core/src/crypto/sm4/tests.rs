//! SM4: published vectors with every kernel, every kernel against every other and against
//! libraries that are not ours, at all lengths, alignments and splits.

use aes_gcm::aead::consts::U12;
use aes_gcm::aead::{AeadInOut, KeyInit};
use proptest::prelude::*;
use serde_json::Value;
use sm4::cipher::{BlockCipherDecrypt, BlockCipherEncrypt};

use super::*;
use crate::crypto::CryptoError;

fn cases(text: &str, count: usize) -> Vec<Value> {
    let file: Value = serde_json::from_str(text).unwrap();
    let cases = file["cases"].as_array().unwrap().clone();
    assert_eq!(cases.len(), count);
    cases
}

fn hex(case: &Value, field: &str) -> Vec<u8> {
    let pairs = case[field].as_str().unwrap().as_bytes().chunks(2);
    pairs
        .map(|p| u8::from_str_radix(std::str::from_utf8(p).unwrap(), 16).unwrap())
        .collect()
}

fn array<const N: usize>(case: &Value, field: &str) -> [u8; N] {
    hex(case, field).try_into().unwrap()
}

/// The S-box as SM4's standard prints it, through a cipher: with all words but one zero, what a
/// round adds is the S-box's value behind a linear map that has an inverse.
#[test]
fn one_block_of_every_byte_agrees_with_a_library() {
    for byte in 0..=255u8 {
        let key = [byte; 16];
        let mut expected = [byte ^ 0x5a; 16].into();
        ::sm4::Sm4::new(&key.into()).encrypt_block(&mut expected);
        for kernel in Kernel::all() {
            let keys = kernel.expand(&key);
            let block = kernel.block(&keys, [byte ^ 0x5a; 16]);
            assert_eq!(block, <[u8; 16]>::from(expected), "{kernel:?} {byte}");
            let back = kernel.block(&keys.reversed(), block);
            assert_eq!(back, [byte ^ 0x5a; 16], "{kernel:?} {byte}");
        }
    }
}

#[test]
fn blocks_as_published() {
    for case in cases(include_str!("../../../../../tests/vectors/sm4.json"), 2) {
        let rounds = case["iterations"].as_u64().unwrap();
        for kernel in Kernel::all() {
            let keys = kernel.expand(&array(&case, "key"));
            let mut block: [u8; 16] = array(&case, "plaintext");
            for _ in 0..rounds {
                block = kernel.block(&keys, block);
            }
            assert_eq!(block, array(&case, "ciphertext"), "{kernel:?} {case}");
        }
    }
}

#[test]
fn modes_as_published() {
    let all = include_str!("../../../../../tests/vectors/sm4-modes.json");
    for case in cases(all, 8) {
        let (plain, sealed) = (hex(&case, "plaintext"), hex(&case, "ciphertext"));
        for kernel in Kernel::all() {
            let mut text = plain.clone();
            match case["mode"].as_str().unwrap() {
                "ctr" => {
                    let ctr = || Ctr::new(kernel, &array(&case, "key"), &array(&case, "iv"));
                    ctr().apply(&mut text);
                    assert_eq!(text, sealed, "{kernel:?} {case}");
                    ctr().apply(&mut text);
                }
                "cbc" => {
                    let cbc = || Cbc::new(kernel, &array(&case, "key"), &array(&case, "iv"));
                    cbc().encrypt(&mut text).unwrap();
                    assert_eq!(text, sealed, "{kernel:?} {case}");
                    cbc().decrypt(&mut text).unwrap();
                }
                mode => {
                    let standard = match mode {
                        "xts-gb" => XtsStandard::Gb,
                        "xts-ieee" => XtsStandard::Ieee,
                        _ => panic!("{mode}"),
                    };
                    let key: [u8; 32] = array(&case, "key");
                    let (first, second) = key.split_at(16);
                    let (first, second) = (first.try_into().unwrap(), second.try_into().unwrap());
                    let xts = Xts::new(kernel, standard, first, second);
                    let tweak = array(&case, "iv");
                    xts.encrypt(&tweak, &mut text).unwrap();
                    assert_eq!(text, sealed, "{kernel:?} {case}");
                    xts.decrypt(&tweak, &mut text).unwrap();
                }
            }
            assert_eq!(text, plain, "{kernel:?} {case}");
        }
    }
}

#[test]
fn gcm_as_published() {
    let all = cases(include_str!("../../../../../tests/vectors/gcm.json"), 4);
    let ours = all.iter().filter(|case| case["suite"] == 1);
    assert_eq!(ours.clone().count(), 1, "RFC 8998's");
    for case in ours {
        for kernel in Kernel::all() {
            let gcm = Gcm::new(kernel, &array(case, "key"));
            let mut text = hex(case, "plaintext");
            let tag = gcm.seal(&array(case, "nonce"), &hex(case, "aad"), &mut text);
            assert_eq!(text, hex(case, "ciphertext"), "{kernel:?}");
            assert_eq!(tag, array(case, "tag"), "{kernel:?}");
        }
    }
}

#[test]
fn a_wrong_tag_leaves_zeros() {
    for kernel in Kernel::all() {
        let gcm = Gcm::new(kernel, &[1; 16]);
        for len in [1, 16, 100, 1009, 1024, 5000] {
            let mut text = vec![9; len];
            let mut tag = gcm.seal(&[2; 12], b"", &mut text);
            tag[15] ^= 0x80;
            let opened = gcm.open(&[2; 12], b"", &mut text, &tag);
            assert_eq!(opened, Err(CryptoError::InvalidTag));
            assert_eq!(text, vec![0; len], "{kernel:?} {len}");
        }
    }
}

#[test]
fn lengths_that_a_mode_cannot_have_are_refused() {
    let kernel = Kernel::all()[0];
    let refused = Err(CryptoError::TextLength);
    let mut cbc = Cbc::new(kernel, &[1; 16], &[2; 16]);
    assert_eq!(cbc.encrypt(&mut [0; 17]), refused);
    assert_eq!(cbc.decrypt(&mut [0; 15]), refused);
    let xts = Xts::new(kernel, XtsStandard::Gb, &[1; 16], &[2; 16]);
    assert_eq!(xts.encrypt(&[0; 16], &mut [0; 15]), refused);
    assert_eq!(xts.decrypt_units(0, 32, &mut [0; 63]), refused);
    assert_eq!(xts.encrypt_units(0, 8, &mut [0; 64]), refused);
}

#[test]
fn kernels_are_known_by_name() {
    for kernel in Kernel::all() {
        assert_eq!(Kernel::by_name(kernel.name()), Ok(kernel));
    }
    assert_eq!(Kernel::all().last().unwrap().name(), "portable");
    let unknown = Kernel::by_name("abacus").unwrap_err().to_string();
    assert!(
        unknown.contains("\"abacus\" is unknown") && unknown.contains("portable"),
        "{unknown}"
    );
}

/// The portable product against the definition, bit by bit.
#[test]
fn ghash_agrees_with_its_definition() {
    // X * H, bits from the left (SP 800-38D, algorithm 1).
    let multiply = |x: u128, h: u128| {
        let (mut z, mut v) = (0u128, h);
        for i in (0..128).rev() {
            if x >> i & 1 == 1 {
                z ^= v;
            }
            v = (v >> 1) ^ if v & 1 == 1 { 0xe1 << 120 } else { 0 };
        }
        z
    };
    let h = 0x66e9_4bd4_ef8a_2c3b_884c_fa59_ca34_2b2e_u128;
    for text in [
        1,
        1 << 127,
        u128::MAX,
        0x0123_4567_89ab_cdef_0f1e_2d3c_4b5a_6978,
    ] {
        for h in [h, u128::MAX, 1, 1 << 127] {
            for kernel in Kernel::all() {
                let powers = kernel.powers(h);
                let hash = kernel.ghash(&powers, 0, &text.to_be_bytes());
                assert_eq!(hash, multiply(text, h), "{kernel:?} {text:x} {h:x}");
            }
        }
    }
}

/// Text at any alignment: `skip` bytes into an allocation.
fn text(seed: u64, skip: usize, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = vec![0; skip + len];
    for byte in &mut bytes {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        *byte = state.to_be_bytes()[0];
    }
    bytes
}

/// Lengths around the borders of blocks, sets and batches, and any others.
fn length() -> impl Strategy<Value = usize> {
    prop_oneof![
        3 => (0usize..10, prop::sample::select(vec![16usize, 128, 256, 1024]), 0usize..35)
            .prop_map(|(n, unit, d)| (n * unit + d).saturating_sub(17)),
        1 => 0usize..20_000,
    ]
}

proptest! {
    #[test]
    fn gcm_is_the_same_with_every_kernel_and_a_library(
        key: [u8; 16], nonce: [u8; 12], seed: u64, skip in 0usize..65, len in length(),
        aad_len in prop_oneof![0usize..70, 900usize..2100],
    ) {
        let aad = text(!seed, 0, aad_len);
        let plain = text(seed, skip, len);
        let library = aes_gcm::AesGcm::<::sm4::Sm4, U12>::new(&key.into());
        let mut expected = plain[skip..].to_vec();
        let expected_tag: [u8; 16] = library
            .encrypt_inout_detached(&nonce.into(), &aad, expected.as_mut_slice().into())
            .unwrap()
            .into();
        for kernel in Kernel::all() {
            let gcm = Gcm::new(kernel, &key);
            let mut sealed = plain.clone();
            let tag = gcm.seal(&nonce, &aad, &mut sealed[skip..]);
            prop_assert_eq!(&sealed[skip..], &expected[..], "{:?}", kernel);
            prop_assert_eq!(&sealed[..skip], &plain[..skip], "{:?} wrote before", kernel);
            prop_assert_eq!(tag, expected_tag, "{:?}", kernel);
            gcm.open(&nonce, &aad, &mut sealed[skip..], &tag).unwrap();
            prop_assert!(sealed == plain, "{:?}", kernel);
        }
    }

    #[test]
    fn ctr_is_the_same_with_every_kernel_split_and_carry(
        key: [u8; 16], high: u64, low in prop_oneof![any::<u64>(), Just(u64::MAX)],
        before_carry in 0u64..130, seed: u64, skip in 0usize..65, len in length(),
        splits in prop::collection::vec(0usize..20_000, 0..5),
    ) {
        // The last 32 bits, or all 64, run over soon.
        let low = low & !0xffff_ffff | (0xffff_ffff - before_carry);
        let counter = u128::from(high) << 64 | u128::from(low);
        let plain = text(seed, skip, len);
        let cipher = ::sm4::Sm4::new(&key.into());
        let mut expected = plain[skip..].to_vec();
        for (i, part) in expected.chunks_mut(16).enumerate() {
            let mut block = counter.wrapping_add(i as u128).to_be_bytes().into();
            cipher.encrypt_block(&mut block);
            xor_in_place(part, &<[u8; 16]>::from(block));
        }
        let mut splits: Vec<usize> = splits.iter().map(|split| split % (len + 1)).collect();
        splits.sort_unstable();
        splits.push(len);
        for kernel in Kernel::all() {
            let mut sealed = plain.clone();
            let mut ctr = Ctr::new(kernel, &key, &counter.to_be_bytes());
            let mut at = 0;
            for &split in &splits {
                ctr.apply(&mut sealed[skip + at..skip + split]);
                at = split;
            }
            prop_assert!(sealed[skip..] == expected[..], "{:?}", kernel);
        }
    }

    #[test]
    fn cbc_is_the_same_with_every_kernel_and_split(
        key: [u8; 16], iv: [u8; 16], seed: u64, skip in 0usize..65, blocks in 0usize..200,
        split in 0usize..200,
    ) {
        let plain = text(seed, skip, blocks * 16);
        let cipher = ::sm4::Sm4::new(&key.into());
        let mut expected = plain[skip..].to_vec();
        let mut last = iv;
        for part in expected.as_chunks_mut::<16>().0 {
            xor_in_place(part, &last);
            let mut block = (*part).into();
            cipher.encrypt_block(&mut block);
            last = block.into();
            *part = last;
            cipher.decrypt_block(&mut block);
        }
        let split = skip + 16 * (split % (blocks + 1));
        for kernel in Kernel::all() {
            let mut sealed = plain.clone();
            let mut cbc = Cbc::new(kernel, &key, &iv);
            cbc.encrypt(&mut sealed[skip..split]).unwrap();
            cbc.encrypt(&mut sealed[split..]).unwrap();
            prop_assert!(sealed[skip..] == expected[..], "{:?}", kernel);
            let mut cbc = Cbc::new(kernel, &key, &iv);
            cbc.decrypt(&mut sealed[skip..split]).unwrap();
            cbc.decrypt(&mut sealed[split..]).unwrap();
            prop_assert!(sealed == plain, "{:?}", kernel);
        }
    }

    #[test]
    fn xts_is_the_same_with_every_kernel_and_the_definition(
        key: [u8; 16], tweak_key: [u8; 16], number: u64, seed: u64, skip in 0usize..65,
        len in length().prop_map(|len| len + 16), gb: bool,
    ) {
        let plain = text(seed, skip, len);
        let standard = if gb { XtsStandard::Gb } else { XtsStandard::Ieee };
        let expected = xts_by_definition(gb, &key, &tweak_key, number, &plain[skip..]);
        for kernel in Kernel::all() {
            let xts = Xts::new(kernel, standard, &key, &tweak_key);
            let tweak = u128::from(number).to_le_bytes();
            let mut sealed = plain.clone();
            xts.encrypt(&tweak, &mut sealed[skip..]).unwrap();
            prop_assert!(sealed[skip..] == expected[..], "{:?}", kernel);
            xts.decrypt(&tweak, &mut sealed[skip..]).unwrap();
            prop_assert!(sealed == plain, "{:?}", kernel);
        }
    }

    #[test]
    fn xts_units_are_single_units(
        key: [u8; 16], number in 0..u64::MAX - 300, seed: u64, units in 0usize..150,
        unit_len in 16usize..600,
    ) {
        let plain = text(seed, 0, units * unit_len);
        for kernel in Kernel::all() {
            let xts = Xts::new(kernel, XtsStandard::Gb, &key, &[7; 16]);
            let mut one_by_one = plain.clone();
            for (i, unit) in (number..).zip(one_by_one.chunks_mut(unit_len)) {
                xts.encrypt(&u128::from(i).to_le_bytes(), unit).unwrap();
            }
            let mut together = plain.clone();
            xts.encrypt_units(number, unit_len, &mut together).unwrap();
            prop_assert!(together == one_by_one, "{:?}", kernel);
            xts.decrypt_units(number, unit_len, &mut together).unwrap();
            prop_assert!(together == plain, "{:?}", kernel);
        }
    }
}

/// IEEE 1619 in its own words, on bytes, with a library's SM4; `gb` moves bits the other way.
fn xts_by_definition(
    gb: bool,
    key: &[u8; 16],
    tweak_key: &[u8; 16],
    number: u64,
    plain: &[u8],
) -> Vec<u8> {
    let mut tweak = u128::from(number).to_le_bytes().into();
    ::sm4::Sm4::new(&(*tweak_key).into()).encrypt_block(&mut tweak);
    let mut tweak: [u8; 16] = tweak.into();
    let cipher = ::sm4::Sm4::new(&(*key).into());
    let encrypt = |tweak: &[u8; 16], part: &[u8]| {
        let mut block: [u8; 16] = part.try_into().unwrap();
        xor_in_place(&mut block, tweak);
        let mut block = block.into();
        cipher.encrypt_block(&mut block);
        let mut block: [u8; 16] = block.into();
        xor_in_place(&mut block, tweak);
        block
    };
    let mut sealed = Vec::new();
    let (blocks, rest) = plain.as_chunks::<16>();
    for block in blocks {
        sealed.extend(encrypt(&tweak, block));
        let mut carry = 0;
        if gb {
            for byte in &mut tweak {
                (*byte, carry) = ((*byte >> 1) | (carry << 7), *byte & 1);
            }
            tweak[0] ^= carry * 0xe1;
        } else {
            for byte in &mut tweak {
                (*byte, carry) = ((*byte << 1) | carry, *byte >> 7);
            }
            tweak[0] ^= carry * 0x87;
        }
    }
    if !rest.is_empty() {
        let last = sealed.split_off(sealed.len() - 16);
        let joined = [rest, &last[rest.len()..]].concat();
        sealed.extend(encrypt(&tweak, &joined));
        sealed.extend(&last[..rest.len()]);
    }
    sealed
}
