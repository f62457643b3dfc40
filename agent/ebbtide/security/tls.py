"""TLS 1.3 in both directions, with pinned certificates on both sides.

The floor is set in `ebbtide/__init__.py`, before gRPC is imported, and proven by a test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import grpc

from ebbtide.security.identity import TLS_NAME, Identity

if TYPE_CHECKING:
    from ebbtide.security.peers import Peer, PinnedPeers

#: Largest gRPC message: a batch of frames, with room for its tag and one frame beyond.
MESSAGE_BYTES_MAX: Final = 8 << 20

#: A link that shows no sign of life for 5 + 5 s is down; both sides may ping while idle.
CHANNEL_OPTIONS: Final[tuple[tuple[str, int | str], ...]] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 4_000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)

SERVER_OPTIONS: Final[tuple[tuple[str, int | str], ...]] = (
    *CHANNEL_OPTIONS,
    ("grpc.so_reuseport", 0),
)


def client_options() -> list[tuple[str, int | str]]:
    """Channel options towards a pinned peer: verify `TLS_NAME`, not the address."""
    return [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", TLS_NAME)]


def client_credentials(identity: Identity, peer: Peer) -> grpc.ChannelCredentials:
    """Show our certificate, accept only this peer's."""
    return grpc.ssl_channel_credentials(
        root_certificates=peer.certificate.pem,
        private_key=identity.key_pem,
        certificate_chain=identity.certificate.pem,
    )


def server_credentials(identity: Identity, peers: PinnedPeers) -> grpc.ServerCredentials:
    """Show our certificate, demand one that is pinned."""
    return grpc.ssl_server_credentials(
        [(identity.key_pem, identity.certificate.pem)],
        root_certificates=peers.roots(),
        require_client_auth=True,
    )
