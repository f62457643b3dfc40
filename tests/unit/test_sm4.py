"""SM4 of every kernel against implementations that are not ours: gmssl, OpenSSL, libgcrypt.

The kernels agree with each other and with the published vectors in native tests; here the
boundary is tested too, and the switch that forces a kernel.
"""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from gmssl.sm4 import SM4_ENCRYPT, CryptSM4

from ebbtide import _native
from tests.conftest import SEED
from tests.support import libgcrypt

KERNELS = _native.sm4_kernels()
LENGTHS = [0, 1, 15, 16, 17, 255, 256, 1023, 1024, 1025, 4096, 5000, 65536, 70001]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def dice() -> random.Random:
    return random.Random(SEED)


@pytest.fixture(scope="module")
def gcrypt() -> ctypes.CDLL:
    try:
        return libgcrypt.load()
    except libgcrypt.AbsentError as error:
        pytest.skip(str(error))


def openssl_gcm(key: bytes, nonce: bytes, aad: bytes, data: bytes) -> tuple[bytes, bytes]:
    encryptor = Cipher(algorithms.SM4(key), modes.GCM(nonce)).encryptor()
    encryptor.authenticate_additional_data(aad)
    return encryptor.update(data) + encryptor.finalize(), encryptor.tag


def test_gcm_agrees_with_openssl(kernel: str, dice: random.Random) -> None:
    for length in LENGTHS:
        key, nonce = dice.randbytes(16), dice.randbytes(12)
        aad, data = dice.randbytes(dice.randrange(100)), dice.randbytes(length)
        gcm, text = _native.Gcm(1, key, kernel), _native.Text(data)
        tag = gcm.seal(nonce, aad, text)
        assert (bytes(text), tag) == openssl_gcm(key, nonce, aad, data), length
        gcm.open(nonce, aad, text, tag)
        assert bytes(text) == data


def test_a_wrong_tag_is_refused_and_the_text_gone(kernel: str, dice: random.Random) -> None:
    gcm, text = _native.Gcm(1, bytes(16), kernel), _native.Text(dice.randbytes(3000))
    tag = bytearray(gcm.seal(bytes(12), b"", text))
    tag[3] ^= 1
    with pytest.raises(_native.NativeError) as refused:
        gcm.open(bytes(12), b"", text, bytes(tag))
    assert refused.value.args[0] == "damaged"
    assert bytes(text) == bytes(3000)


def test_gcm_agrees_with_libgcrypt(kernel: str, dice: random.Random, gcrypt: ctypes.CDLL) -> None:
    for length in LENGTHS:
        key, nonce = dice.randbytes(16), dice.randbytes(12)
        aad, data = dice.randbytes(1 + dice.randrange(100)), dice.randbytes(length)
        theirs = libgcrypt.Sm4(gcrypt, "gcm", key)
        theirs.set_iv(nonce)
        theirs.authenticate(aad)
        buffer = ctypes.create_string_buffer(data, length)
        theirs.encrypt(buffer)
        text = _native.Text(data)
        tag = _native.Gcm(1, key, kernel).seal(nonce, aad, text)
        assert (bytes(text), tag) == (buffer.raw, theirs.tag()), length
        theirs.close()


def test_ctr_agrees_with_openssl_where_the_counter_carries(
    kernel: str, dice: random.Random
) -> None:
    for length in LENGTHS:
        key, data = dice.randbytes(16), dice.randbytes(length)
        # The last 32, 64 or all bits run over within the text.
        carry = dice.choice([4, 8, 16])
        number = (1 << 8 * carry) - 1 - dice.randrange(20)
        counter = (dice.randbytes(16)[: 16 - carry]) + number.to_bytes(carry, "big")
        encryptor = Cipher(algorithms.SM4(key), modes.CTR(counter)).encryptor()
        text = _native.Text(data)
        _native.Sm4Ctr(key, counter, kernel).apply(text)
        assert bytes(text) == encryptor.update(data) + encryptor.finalize(), length


def test_cbc_agrees_with_openssl_and_gmssl(kernel: str, dice: random.Random) -> None:
    for blocks in [0, 1, 2, 15, 16, 63, 64, 65, 200]:
        key, iv, data = dice.randbytes(16), dice.randbytes(16), dice.randbytes(16 * blocks)
        encryptor = Cipher(algorithms.SM4(key), modes.CBC(iv)).encryptor()
        expected = encryptor.update(data) + encryptor.finalize()
        if 0 < blocks < 20:
            oracle = CryptSM4()
            oracle.set_key(key, SM4_ENCRYPT)
            # It pads; the padding is the last block.
            assert oracle.crypt_cbc(iv, data)[:-16] == expected
        text = _native.Text(data)
        _native.Sm4Cbc(key, iv, kernel).encrypt(text)
        assert bytes(text) == expected, blocks
        _native.Sm4Cbc(key, iv, kernel).decrypt(text)
        assert bytes(text) == data, blocks


def test_xts_of_ieee_agrees_with_libgcrypt(
    kernel: str, dice: random.Random, gcrypt: ctypes.CDLL
) -> None:
    for length in [length + 16 for length in LENGTHS]:
        key, tweak, data = dice.randbytes(32), dice.randbytes(16), dice.randbytes(length)
        theirs = libgcrypt.Sm4(gcrypt, "xts", key)
        theirs.set_iv(tweak)
        buffer = ctypes.create_string_buffer(data, length)
        theirs.encrypt(buffer)
        theirs.close()
        xts, text = _native.Sm4Xts("ieee", key, kernel), _native.Text(data)
        xts.encrypt(tweak, text)
        assert bytes(text) == buffer.raw, length
        xts.decrypt(tweak, text)
        assert bytes(text) == data, length


def test_xts_of_gb_differs_after_the_first_block(kernel: str) -> None:
    """No other program here has it; its published vector is in the native tests."""
    texts = [_native.Text(bytes(64)) for _ in range(2)]
    for standard, text in zip(["gb", "ieee"], texts, strict=True):
        _native.Sm4Xts(standard, bytes(range(32)), kernel).encrypt(bytes(16), text)
    gb, ieee = map(bytes, texts)
    assert gb[:16] == ieee[:16]
    assert gb[16:32] != ieee[16:32]


def in_process_with(kernel: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from ebbtide import _native; print(_native.sm4_kernel())"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "EBB_SM4_KERNEL": kernel},
    )


def test_the_environment_forces_a_kernel(kernel: str) -> None:
    assert in_process_with(kernel).stdout.strip() == kernel
    assert in_process_with("").stdout.strip() == KERNELS[0]


def test_an_unknown_kernel_is_a_clear_error() -> None:
    refused = in_process_with("abacus")
    assert refused.returncode != 0
    assert "EBB_SM4_KERNEL" in refused.stderr
    assert '"abacus" is unknown' in refused.stderr
    with pytest.raises(_native.NativeError, match="unknown"):
        _native.Gcm(1, bytes(16), "abacus")


@pytest.mark.parametrize(
    "call",
    [
        lambda: _native.Gcm(1, bytes(15)),
        lambda: _native.Gcm(9, bytes(16)),
        lambda: _native.Gcm(2, bytes(32), "portable"),
        lambda: _native.Gcm(1, bytes(16)).seal(bytes(11), b"", _native.Text(b"")),
        lambda: _native.Sm4Cbc(bytes(16), bytes(16)).encrypt(_native.Text(bytes(17))),
        lambda: _native.Sm4Xts("gb", bytes(32)).encrypt(bytes(16), _native.Text(bytes(15))),
        lambda: _native.Sm4Xts("iso", bytes(32)),
    ],
)
def test_what_a_mode_cannot_take_is_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(_native.NativeError):
        call()
