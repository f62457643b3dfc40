"""Suite `hotpath`: what one thread of the data path does to bytes, beside other programs' best.

So far the ciphers. All rows count the processor time of the calling thread, so that what else runs
does not count; sides take turns.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import time
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from bench.rows import Row, measured, missing, ratio
from bench.turns import take_turns
from ebbtide import _native
from tests.support import libgcrypt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Side = Callable[[], None]
    Rates = dict[str, list[float]]

MIB = 1 << 20
#: Bytes for one value: enough that the clock's grain and a call's start are lost in it.
BYTES = 32 * MIB
BYTES_QUICK = 4 * MIB
TURNS = 11
TURNS_QUICK = 5
NONCE = bytes(12)
#: As long as the additional data of a cell.
AAD = bytes(48)
SM4, AES_256 = 1, 2


def _rate(side: Side, length: int, total: int) -> float:
    """Gigabytes a second of thread time; `side` handles `length` bytes a call."""
    calls = max(1, total // length)
    begun = time.thread_time()
    for _ in range(calls):
        side()
    return calls * length / (time.thread_time() - begun) / 1e9


def _turns(sides: dict[str, tuple[Side, int, float]], turns: int, total: int) -> Rates:
    """Rates of all sides in turn; a slow side gets its share of the bytes."""
    rates = {
        name: functools.partial(_rate, side, length, int(total * share))
        for name, (side, length, share) in sides.items()
    }
    # The first turn warms caches and clocks.
    return {name: found[1:] for name, found in take_turns(rates, turns + 1).items()}


def _seal(gcm: _native.Gcm, length: int) -> Side:
    text = _native.Text(bytes(length))
    return lambda: _discard(gcm.seal(NONCE, AAD, text))


def _discard(_: object) -> None:
    pass


def _open(gcm: _native.Gcm, length: int) -> Side:
    """Opens what the last call left: GCM turns plaintext into ciphertext and back.

    Each of the two has its tag; with a wrong one the text would be cleared.
    """
    text = _native.Text(bytes(length))
    first = gcm.seal(NONCE, AAD, text)
    tags = itertools.cycle([gcm.seal(NONCE, AAD, text), first])
    return lambda: gcm.open(NONCE, AAD, text, next(tags))


def _fresh(length: int) -> Side:
    text = _native.Text(bytes(length))
    return lambda: _discard(_native.Gcm(SM4, bytes(16)).seal(NONCE, AAD, text))


def _openssl(length: int) -> Side:
    data, buffer = bytes(length), bytearray(length + 15)
    cipher = Cipher(algorithms.SM4(bytes(16)), modes.GCM(NONCE))

    def side() -> None:
        encryptor = cipher.encryptor()
        encryptor.authenticate_additional_data(AAD)
        encryptor.update_into(data, buffer)
        encryptor.finalize()

    return side


def _gcrypt(length: int) -> Side:
    """Raises AbsentError."""
    theirs = libgcrypt.Sm4(libgcrypt.load(), "gcm", bytes(16))
    buffer = ctypes.create_string_buffer(length)

    def side() -> None:
        theirs.set_iv(NONCE)
        theirs.authenticate(AAD)
        theirs.encrypt(buffer)
        theirs.tag()

    return side


def _xts(standard: str) -> Side:
    xts, text = _native.Sm4Xts(standard, bytes(range(32))), _native.Text(bytes(MIB))
    return lambda: xts.encrypt_units(0, 4096, text)


def run(_cache: Path, keep: Callable[[list[Row]], None], *, quick: bool) -> None:
    """Measure the ciphers."""
    turns, total = (TURNS_QUICK, BYTES_QUICK) if quick else (TURNS, BYTES)
    sm4 = _native.Gcm(SM4, bytes(16))
    sides: dict[str, tuple[Side, int, float]] = {
        "sm4_gcm_1m": (_seal(sm4, MIB), MIB, 1),
        "sm4_gcm_open_1m": (_open(sm4, MIB), MIB, 1),
        "sm4_gcm_64k": (_seal(sm4, 65536), 65536, 1),
        "sm4_gcm_4k": (_seal(sm4, 4096), 4096, 1),
        "sm4_gcm_64k_fresh_key": (_fresh(65536), 65536, 1),
        "sm4_xts_1m": (_xts("gb"), MIB, 1),
        "sm4_xts_ieee_1m": (_xts("ieee"), MIB, 1),
        "aes256_gcm_1m": (_seal(_native.Gcm(AES_256, bytes(32)), MIB), MIB, 1),
        "openssl": (_openssl(MIB), MIB, 1 / 8),
    }
    for kernel in _native.sm4_kernels():
        share = 1 / 8 if kernel == "portable" else 1
        gcm = _native.Gcm(SM4, bytes(16), kernel)
        sides[f"sm4_gcm_1m_{kernel}"] = (_seal(gcm, MIB), MIB, share)
    absent = ""
    peer = "libgcrypt"
    try:
        peer = f"libgcrypt {libgcrypt.version(libgcrypt.load())}"
        sides["gcrypt"] = (_gcrypt(MIB), MIB, 1 / 4)
    except libgcrypt.AbsentError as error:
        absent = str(error)
    found = _turns(sides, turns, total)
    openssl, gcrypt = found.pop("openssl"), found.pop("gcrypt", None)
    rows = [measured(f"hotpath.{name}.gb_s", of, "GB/s", "higher") for name, of in found.items()]
    one = found["sm4_gcm_1m"]
    shorter = ("sm4_gcm_64k", "sm4_gcm_4k", "sm4_gcm_64k_fresh_key")
    rows += [ratio(f"hotpath.{name}.ratio_1m", found[name], one, "1 MiB") for name in shorter]
    for name in [name for name in found if name.startswith("sm4_gcm_1m")]:
        row = f"hotpath.{name}.ratio"
        rows.append(ratio(f"{row}_openssl", found[name], openssl, "OpenSSL (cryptography)"))
        if gcrypt is None:
            rows.append(missing(f"{row}_libgcrypt", "ratio", "higher", absent, peer))
        else:
            rows.append(ratio(f"{row}_libgcrypt", found[name], gcrypt, peer))
    for kernel in ("gfni512", "gfni256", "gfni256-pclmul", "aesni"):
        if kernel not in _native.sm4_kernels():
            reason = "this processor lacks what it needs"
            for metric in ("gb_s", "ratio_openssl", "ratio_libgcrypt"):
                unit = "GB/s" if metric == "gb_s" else "ratio"
                rows.append(
                    missing(f"hotpath.sm4_gcm_1m_{kernel}.{metric}", unit, "higher", reason)
                )
    keep(rows)
