"""Pinned peers: the agents named in `agent.toml`, recognised by their very certificate."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ebbtide.errors import ConfigError, NotFoundError, UnreachableError
from ebbtide.security.identity import (
    Certificate,
    Identity,
    load_certificate,
    load_identity,
    read_certificate,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ebbtide.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One pinned agent. `address` is empty for a peer that only calls us."""

    name: str
    address: str
    certificate: Certificate


class PinnedPeers:
    """All peers of an agent, and the agent itself (its own command line dials it too)."""

    def __init__(self, own: Peer, peers: list[Peer]) -> None:
        self.own = own
        self._by_name = {peer.name: peer for peer in peers}
        self._by_fingerprint: dict[str, Peer] = {own.certificate.fingerprint: own}
        for peer in peers:
            other = self._by_fingerprint.setdefault(peer.certificate.fingerprint, peer)
            if other is not peer:
                raise ConfigError(
                    f"[peer.{peer.name}] pins the certificate of '{other.name}'",
                    hint="each peer has its own certificate: its identity/agent.crt",
                )

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def by_name(self, name: str) -> Peer:
        """The peer called `name`. Raises `NotFoundError`."""
        peer = self._by_name.get(name)
        if peer is None:
            known = ", ".join(sorted(self._by_name)) or "none"
            raise NotFoundError(
                f"no peer is called '{name}'",
                code="unknown-peer",
                hint=f"agent.toml names: {known}; add [peer.{name}] with address and certificate",
            )
        return peer

    def by_address(self, address: str) -> Peer:
        """The peer, or we ourselves, at `address`. Raises `NotFoundError`."""
        for peer in (*self._by_name.values(), self.own):
            if peer.address == address:
                return peer
        raise NotFoundError(
            f"no pinned peer has the address {address}",
            code="unknown-peer",
            hint="add [peer.NAME] with this address and the agent's certificate to agent.toml",
        )

    def identify(self, pem: bytes) -> Peer:
        """Whose certificate a connection showed. Raises `UnreachableError` (code untrusted)."""
        try:
            fingerprint = read_certificate(pem).fingerprint
        except ConfigError:
            fingerprint = "unreadable"
        peer = self._by_fingerprint.get(fingerprint)
        if peer is None:
            raise UnreachableError(
                f"the caller's certificate ({fingerprint[:16]}) is not pinned here",
                code="untrusted",
                hint="add [peer.NAME] with its certificate to agent.toml and restart the agent",
            )
        return peer

    def roots(self) -> bytes:
        """All pinned certificates, PEM, back to back."""
        return b"".join(peer.certificate.pem for peer in self._by_fingerprint.values())


def load_peers(config: Config) -> tuple[Identity, PinnedPeers]:
    """Identity and peers that `agent.toml` names. Raises `ConfigError`."""
    identity = load_identity(config.identity.certificate, config.identity.key)
    now = datetime.now(UTC)
    if not identity.certificate.not_before <= now <= identity.certificate.not_after:
        raise ConfigError(
            f"our certificate is valid from {identity.certificate.not_before} to "
            f"{identity.certificate.not_after}, and now is {now:%Y-%m-%d %H:%M:%S%z}",
            hint="check the clock; else make a new identity and pin it at the peers",
        )
    own = Peer(
        name=config.agent.name, address=config.agent.listen, certificate=identity.certificate
    )
    peers = [
        Peer(name=name, address=section.address, certificate=load_certificate(section.certificate))
        for name, section in config.peer.items()
    ]
    return identity, PinnedPeers(own, peers)
