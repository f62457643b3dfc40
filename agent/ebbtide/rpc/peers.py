"""Dials pinned peers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from ebbtide.errors import ConfigError
from ebbtide.security.tls import client_credentials, client_options

if TYPE_CHECKING:
    from ebbtide.security.identity import Identity
    from ebbtide.security.peers import PinnedPeers


class Dialer:
    """Makes channels to peers that `agent.toml` names, with our certificate and theirs pinned."""

    def __init__(self, identity: Identity, peers: PinnedPeers, version: str) -> None:
        self.version = version
        self._identity = identity
        self._peers = peers

    def address(self, name: str) -> str:
        """Where a peer listens. Raises `NotFoundError`, or `ConfigError` if that is not known."""
        peer = self._peers.by_name(name)
        if not peer.address:
            raise ConfigError(
                f"[peer.{name}] has no address", hint="add address = 'HOST:PORT' to dial it"
            )
        return peer.address

    def dial(self, name: str) -> grpc.aio.Channel:
        """A new channel; connects when first used."""
        address = self.address(name)
        peer = self._peers.by_name(name)
        return grpc.aio.secure_channel(
            address, client_credentials(self._identity, peer), options=client_options()
        )
