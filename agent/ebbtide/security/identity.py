"""An agent's identity: a self-signed ECDSA P-256 certificate and its key.

Trust is by pinning: the other side holds a copy of this very certificate (`peers.py`), so there is
no authority, no name check and nothing to revoke but the copy. Every certificate carries the same
DNS name, `TLS_NAME`, because a pinned certificate proves more than a host name.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ebbtide.errors import ConfigError, RefusedError

if TYPE_CHECKING:
    from pathlib import Path

#: DNS name in every certificate; clients verify this one instead of the address they dial.
TLS_NAME = "agent.ebbtide.invalid"
#: An agent lives as long as the server it runs on; replacing it means new pins everywhere.
VALID_DAYS = 3650
#: A clock this far behind must not refuse a certificate made a moment ago.
BACKDATE = timedelta(hours=24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A certificate as pinned: its PEM bytes and what we read from it."""

    pem: bytes
    name: str
    fingerprint: str
    not_before: datetime
    not_after: datetime

    @property
    def site(self) -> int:
        """64-bit id of the site, the second half of a generation; never 0."""
        return int(self.fingerprint[:16], 16) or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Certificate and private key of this agent. `repr` never shows the key."""

    certificate: Certificate
    key_pem: bytes

    def __repr__(self) -> str:
        return f"Identity({self.certificate.name!r}, {self.certificate.fingerprint[:16]})"


def read_certificate(pem: bytes, *, where: str = "certificate") -> Certificate:
    """Parse one PEM certificate. Raises `ConfigError` unless it is ECDSA P-256 with our name."""
    try:
        parsed = x509.load_pem_x509_certificates(pem)
    except ValueError:
        parsed = []
    if len(parsed) != 1:
        raise ConfigError(
            f"{where} does not hold exactly one PEM certificate",
            hint="copy identity/agent.crt of the other host there, as it is",
        )
    certificate = parsed[0]
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(
            f"{where} is not an ECDSA P-256 certificate", hint="make identities with 'ebb init'"
        )
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return Certificate(
        pem=certificate.public_bytes(serialization.Encoding.PEM),
        name=str(names[0].value) if names else "",
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


def load_certificate(path: Path) -> Certificate:
    """Read a certificate file. Raises `ConfigError`."""
    return read_certificate(_read(path, "certificate"), where=str(path))


def create_identity(certificate_path: Path, key_path: Path, name: str) -> Identity:
    """Make a key and a certificate, durable, the key readable by its owner only.

    Raises `RefusedError` if either file exists: an identity is never replaced in passing.
    """
    for path in (certificate_path, key_path):
        if path.exists():
            raise RefusedError(
                f"{path} exists already",
                code="exists",
                hint="an identity is never overwritten; move it away to make another",
            )
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC).replace(microsecond=0)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(TLS_NAME)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    certificate_pem = certificate.public_bytes(serialization.Encoding.PEM)
    write_new(key_path, key_pem, mode=0o600)
    write_new(certificate_path, certificate_pem, mode=0o644)
    return Identity(certificate=read_certificate(certificate_pem), key_pem=key_pem)


def load_identity(certificate_path: Path, key_path: Path) -> Identity:
    """Read both files and check that they belong together. Raises `ConfigError`."""
    certificate = load_certificate(certificate_path)
    key_pem = read_private(key_path, "private key")
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError):
        raise ConfigError(f"{key_path} is not a PEM private key without a password") from None
    public = x509.load_pem_x509_certificate(certificate.pem).public_key()
    der = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*der) != public.public_bytes(*der):
        raise ConfigError(
            f"{key_path} does not belong to {certificate_path}",
            hint="restore both from the same backup, or make a new identity with 'ebb init'",
        )
    return Identity(certificate=certificate, key_pem=key_pem)


def write_new(path: Path, content: bytes, *, mode: int) -> None:
    """Create a file with exactly `mode` and make it durable; never replace one."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise RefusedError(f"{path} exists already", code="exists") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be created: {error.strerror}") from None
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_private(path: Path, what: str) -> bytes:
    """Read a secret file; refuse one that others may read. Raises `ConfigError`."""
    content = _read(path, what)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"{path} ({what}) can be read by others: mode {mode:04o}", hint=f"chmod 600 {path}"
        )
    return content


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path} ({what}) does not exist", hint="run 'ebb init'") from None
    except OSError as error:
        raise ConfigError(
            f"{path} ({what}) cannot be read: {error.strerror}",
            hint="run as the agent's user or as root",
        ) from None
