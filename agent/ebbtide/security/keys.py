"""Keys at rest: group keys lie wrapped under the master key, a file that only its owner reads.

A wrapped key is 76 bytes: magic `EBBW`, version 1, three zero bytes, 8 bytes that name the master
key, a 12-byte random nonce, then AES-256-GCM of the 32-byte key with its 16-byte tag. The header
and the group's id are the additional data, so a wrapped key cannot be moved to another group.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ebbtide.errors import ConfigError, DamagedError
from ebbtide.security.identity import read_private, write_new

if TYPE_CHECKING:
    from pathlib import Path

KEY_LEN = 32
NONCE_LEN = 12
TAG_LEN = 16
GROUP_ID_LEN = 16
MAGIC = b"EBBW\x01\x00\x00\x00"
WRAPPED_LEN = len(MAGIC) + 8 + NONCE_LEN + KEY_LEN + TAG_LEN


def new_group_key() -> bytes:
    """32 bytes from the operating system."""
    return secrets.token_bytes(KEY_LEN)


class MasterKey:
    """Wraps and unwraps group keys. Its bytes leave this object in no other way."""

    __slots__ = ("_cipher", "_id")

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_LEN:
            raise ConfigError(f"a master key has {KEY_LEN} bytes, not {len(key)}")
        self._cipher = AESGCM(key)
        self._id = hashlib.sha256(b"ebbtide master key id" + key).digest()[:8]

    @classmethod
    def create(cls, path: Path) -> MasterKey:
        """Make a new key file (hex, mode 0600). Raises `RefusedError` if it exists."""
        key = secrets.token_bytes(KEY_LEN)
        write_new(path, key.hex().encode() + b"\n", mode=0o600)
        return cls(key)

    @classmethod
    def load(cls, path: Path) -> MasterKey:
        """Read a key file. Raises `ConfigError`, also if others may read it."""
        try:
            return cls(bytes.fromhex(read_private(path, "master key").decode("ascii").strip()))
        except ValueError:
            raise ConfigError(
                f"{path} is not a master key: {KEY_LEN * 2} hex digits are expected",
                hint="restore it from its backup; without it group keys cannot be unwrapped",
            ) from None

    @property
    def id(self) -> str:
        """Names the key without showing it: 16 hex digits."""
        return self._id.hex()

    def __repr__(self) -> str:
        return f"MasterKey({self.id})"

    def wrap(self, group_key: bytes, group_id: bytes) -> bytes:
        """Seal a group key for rest on disk."""
        if len(group_key) != KEY_LEN or len(group_id) != GROUP_ID_LEN:
            raise ValueError("a group key has 32 bytes, a group id 16")
        header = MAGIC + self._id
        nonce = os.urandom(NONCE_LEN)
        return header + nonce + self._cipher.encrypt(nonce, group_key, header + group_id)

    def unwrap(self, wrapped: bytes, group_id: bytes) -> bytes:
        """Open a wrapped key. Raises `DamagedError`, or `ConfigError` for another master key."""
        header, rest = wrapped[: len(MAGIC) + 8], wrapped[len(MAGIC) + 8 :]
        if len(wrapped) != WRAPPED_LEN or not header.startswith(MAGIC):
            raise DamagedError(
                "a wrapped group key is malformed", hint="restore the group's state from backup"
            )
        if header[len(MAGIC) :] != self._id:
            raise ConfigError(
                f"the group key is wrapped under master key {header[len(MAGIC) :].hex()}, "
                f"the configured one is {self.id}",
                hint="point identity.master_key at the key file that belongs to this state",
            )
        try:
            return self._cipher.decrypt(rest[:NONCE_LEN], rest[NONCE_LEN:], header + group_id)
        except InvalidTag:
            raise DamagedError(
                "a wrapped group key fails its check",
                hint="it was damaged or belongs to another group; restore it from backup",
            ) from None
