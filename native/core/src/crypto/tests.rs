//! Seals: every change of text, additional data, tag, nonce or key is found.

use super::*;

const SUITES: [Suite; 2] = [Suite::Sm4Gcm, Suite::Aes256Gcm];

fn key(suite: Suite) -> IncarnationKey {
    let group_key = GroupKey([1; 32]);
    IncarnationKey::derive(
        suite,
        &group_key,
        GroupId([2; 16]),
        IncarnationId([3; 16]),
        &[4; 32],
    )
}

#[test]
fn what_is_sealed_opens_with_the_same_key_and_place_only() {
    for suite in SUITES {
        let cipher = key(suite).frame(FrameNo(7), 99);
        let mut sealed = *b"twenty-seven bytes of text.";
        let tag = cipher.seal(3, b"aad", &mut sealed);
        assert_ne!(&sealed, b"twenty-seven bytes of text.");
        let open = |cipher: &FrameCipher, cell: u32, aad: &[u8], text: &[u8], tag: &[u8; 16]| {
            let mut buffer = text.to_vec();
            cipher.open(cell, aad, &mut buffer, tag).map(|()| buffer)
        };
        let opened = open(&cipher, 3, b"aad", &sealed, &tag);
        assert_eq!(opened.as_deref(), Ok(&b"twenty-seven bytes of text."[..]));
        let invalid = Err(CryptoError::InvalidTag);
        assert_eq!(open(&cipher, 4, b"aad", &sealed, &tag), invalid);
        assert_eq!(open(&cipher, 3, b"aae", &sealed, &tag), invalid);
        assert_eq!(open(&cipher, 3, b"aad", &sealed[1..], &tag), invalid);
        assert_eq!(
            open(&key(suite).frame(FrameNo(8), 99), 3, b"aad", &sealed, &tag),
            invalid
        );
        assert_eq!(
            open(&key(suite).frame(FrameNo(7), 98), 3, b"aad", &sealed, &tag),
            invalid
        );
        for bit in 0..128 {
            let mut wrong = tag;
            wrong[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(&cipher, 3, b"aad", &sealed, &wrong), invalid);
        }
        for bit in 0..sealed.len() * 8 {
            let mut wrong = sealed;
            wrong[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(&cipher, 3, b"aad", &wrong, &tag), invalid);
        }
    }
}

/// The key depends on each of its inputs.
#[test]
fn keys_differ_by_group_incarnation_salt_suite_and_frame() {
    let seal = |suite, group_key: u8, group: u8, incarnation: u8, salt: u8, frame: u32| {
        let key = IncarnationKey::derive(
            suite,
            &GroupKey([group_key; 32]),
            GroupId([group; 16]),
            IncarnationId([incarnation; 16]),
            &[salt; 32],
        );
        let mut buffer = [0u8; 16];
        key.frame(FrameNo(frame), 0).seal(0, b"", &mut buffer);
        buffer
    };
    for suite in SUITES {
        let mut seen = vec![seal(suite, 0, 0, 0, 0, 0)];
        for other in [
            seal(suite, 1, 0, 0, 0, 0),
            seal(suite, 0, 1, 0, 0, 0),
            seal(suite, 0, 0, 1, 0, 0),
            seal(suite, 0, 0, 0, 1, 0),
            seal(suite, 0, 0, 0, 0, 1),
        ] {
            assert!(!seen.contains(&other));
            seen.push(other);
        }
    }
    assert_ne!(
        seal(Suite::Sm4Gcm, 0, 0, 0, 0, 0),
        seal(Suite::Aes256Gcm, 0, 0, 0, 0, 0)
    );
}

#[test]
fn suites_are_known_by_their_numbers() {
    for suite in SUITES {
        assert_eq!(Suite::try_from(suite as u16), Ok(suite));
    }
    assert_eq!(Suite::try_from(0), Err(CryptoError::UnknownSuite(0)));
    assert_eq!(Suite::try_from(3), Err(CryptoError::UnknownSuite(3)));
}

#[test]
fn no_key_is_printed() {
    let key = key(Suite::Aes256Gcm);
    let printed = format!(
        "{:?} {key:?} {:?}",
        GroupKey([0xa5; 32]),
        key.frame(FrameNo(1), 0xdead)
    );
    assert!(
        !printed.contains("a5") && !printed.contains("165"),
        "{printed}"
    );
}

#[test]
fn random_bytes_differ() {
    assert_ne!(random_bytes::<32>(), random_bytes::<32>());
}

/// Published vectors, through the seam that frames use.
mod vectors {
    use serde_json::Value;

    use super::super::cipher::raw;
    use super::*;

    fn cases(text: &str) -> Vec<Value> {
        let file: Value = serde_json::from_str(text).unwrap();
        file["cases"].as_array().unwrap().clone()
    }

    fn hex(case: &Value, field: &str) -> Vec<u8> {
        let text = case[field].as_str().unwrap();
        let pairs = text.as_bytes().chunks(2);
        pairs
            .map(|p| u8::from_str_radix(std::str::from_utf8(p).unwrap(), 16).unwrap())
            .collect()
    }

    fn suite(case: &Value) -> Suite {
        Suite::try_from(u16::try_from(case["suite"].as_u64().unwrap()).unwrap()).unwrap()
    }

    #[test]
    fn gcm() {
        let cases = cases(include_str!("../../../../tests/vectors/gcm.json"));
        assert_eq!(cases.len(), 4);
        for case in &cases {
            let (key, aad) = (hex(case, "key"), hex(case, "aad"));
            let nonce: [u8; 12] = hex(case, "nonce").try_into().unwrap();
            let tag: [u8; 16] = hex(case, "tag").try_into().unwrap();
            let mut buffer = hex(case, "plaintext");
            assert_eq!(
                raw::seal(suite(case), &key, nonce, &aad, &mut buffer),
                tag,
                "{case}"
            );
            assert_eq!(buffer, hex(case, "ciphertext"), "{case}");
            raw::open(suite(case), &key, nonce, &aad, &mut buffer, &tag).unwrap();
            assert_eq!(buffer, hex(case, "plaintext"), "{case}");
        }
    }

    #[test]
    fn hkdf() {
        let cases = cases(include_str!("../../../../tests/vectors/hkdf.json"));
        assert_eq!(cases.len(), 5);
        for case in &cases {
            let expected = hex(case, "okm");
            let mut okm = vec![0; expected.len()];
            let keyed = Hkdf::extract(suite(case), &hex(case, "salt"), &hex(case, "ikm"));
            let info = hex(case, "info");
            // In two pieces: the fields of an `info` are not joined first.
            let (a, b) = info.split_at(info.len() / 2);
            keyed.expand(&[a, b], &mut okm);
            assert_eq!(okm, expected, "{case}");
        }
    }

    #[test]
    fn sm3() {
        use ::sm3::Digest;
        for case in &cases(include_str!("../../../../tests/vectors/sm3.json")) {
            let digest = ::sm3::Sm3::digest(hex(case, "message"));
            assert_eq!(digest.to_vec(), hex(case, "digest"), "{case}");
        }
    }

    #[test]
    fn sha256() {
        for case in &cases(include_str!("../../../../tests/vectors/sha256.json")) {
            let digest = crate::format::digest::sha256(&hex(case, "message"));
            assert_eq!(digest.to_vec(), hex(case, "digest"), "{case}");
        }
    }

    #[test]
    fn xxh3() {
        let mut generator = 2_654_435_761u64;
        let buffer: Vec<u8> = (0..65536)
            .map(|_| {
                let byte = generator.to_be_bytes()[0];
                generator = generator.wrapping_mul(11_400_714_785_074_694_797);
                byte
            })
            .collect();
        for case in &cases(include_str!("../../../../tests/vectors/xxh3.json")) {
            let len = usize::try_from(case["length"].as_u64().unwrap()).unwrap();
            let digest = xxhash_rust::xxh3::xxh3_64(&buffer[..len]);
            assert_eq!(digest.to_be_bytes().to_vec(), hex(case, "digest"), "{case}");
        }
    }
}
