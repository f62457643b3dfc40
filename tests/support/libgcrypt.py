"""libgcrypt's SM4 through ctypes: an implementation that is neither ours nor OpenSSL's."""

from __future__ import annotations

import ctypes
import ctypes.util

_SM4 = 318
_DISABLE_SECURE_MEMORY = 37
_INITIALIZATION_FINISHED = 38
_TEST_ALGORITHM = 8
MODES = {"ecb": 1, "cbc": 3, "ctr": 6, "gcm": 9, "xts": 13}


class AbsentError(Exception):
    """The library or its SM4 is not there; the text says which."""


def load() -> ctypes.CDLL:
    """The library, ready. Raises AbsentError."""
    name = ctypes.util.find_library("gcrypt")
    if name is None:
        raise AbsentError("libgcrypt is not installed (Debian package libgcrypt20)")
    library = ctypes.CDLL(name)
    library.gcry_check_version.restype = ctypes.c_char_p
    library.gcry_check_version(None)
    library.gcry_control(_DISABLE_SECURE_MEMORY, 0)
    library.gcry_control(_INITIALIZATION_FINISHED, 0)
    if library.gcry_cipher_algo_info(_SM4, _TEST_ALGORITHM, None, None):
        raise AbsentError(f"libgcrypt {version(library)} has no SM4")
    return library


def version(library: ctypes.CDLL) -> str:
    """The library's version."""
    found: bytes = library.gcry_check_version(None)
    return found.decode()


class Sm4:
    """One key in one mode."""

    def __init__(self, library: ctypes.CDLL, mode: str, key: bytes) -> None:
        self._library = library
        self._handle = ctypes.c_void_p()
        self._check(library.gcry_cipher_open(ctypes.byref(self._handle), _SM4, MODES[mode], 0))
        self._check(library.gcry_cipher_setkey(self._handle, key, ctypes.c_size_t(len(key))))

    def _check(self, error: int) -> None:
        if error:
            raise AbsentError(f"libgcrypt says error {error & 0xFFFF}")

    def set_iv(self, iv: bytes) -> None:
        """Begin with this nonce, initialization vector or tweak."""
        self._check(self._library.gcry_cipher_setiv(self._handle, iv, ctypes.c_size_t(len(iv))))

    def set_counter(self, counter: bytes) -> None:
        """Begin with this counter block."""
        size = ctypes.c_size_t(len(counter))
        self._check(self._library.gcry_cipher_setctr(self._handle, counter, size))

    def authenticate(self, aad: bytes) -> None:
        """Additional data."""
        size = ctypes.c_size_t(len(aad))
        self._check(self._library.gcry_cipher_authenticate(self._handle, aad, size))

    def encrypt(self, buffer: ctypes.Array[ctypes.c_char]) -> None:
        """In place."""
        size = ctypes.c_size_t(len(buffer))
        no_size = ctypes.c_size_t(0)
        self._check(self._library.gcry_cipher_encrypt(self._handle, buffer, size, None, no_size))

    def tag(self) -> bytes:
        """GCM's tag."""
        tag = ctypes.create_string_buffer(16)
        self._check(self._library.gcry_cipher_gettag(self._handle, tag, ctypes.c_size_t(16)))
        return tag.raw

    def close(self) -> None:
        """Give the handle back."""
        self._library.gcry_cipher_close.restype = None
        self._library.gcry_cipher_close(self._handle)
