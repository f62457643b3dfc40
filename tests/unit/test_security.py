"""Identities, pins, keys at rest, and a real TLS 1.3 handshake between two pinned agents."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
from concurrent import futures
from typing import TYPE_CHECKING

import grpc
import pytest

from ebbtide.config import parse_config
from ebbtide.errors import (
    ConfigError,
    DamagedError,
    NotFoundError,
    RefusedError,
    UnreachableError,
)
from ebbtide.security.identity import Identity, create_identity, load_identity
from ebbtide.security.keys import WRAPPED_LEN, MasterKey, new_group_key
from ebbtide.security.peers import Peer, PinnedPeers, load_peers
from ebbtide.security.tls import client_credentials, client_options, server_credentials

if TYPE_CHECKING:
    from pathlib import Path

GROUP = bytes(range(16))


def make(directory: Path, name: str) -> Identity:
    return create_identity(directory / f"{name}.crt", directory / f"{name}.key", name)


def test_identity_round_trip_and_modes(tmp_path: Path) -> None:
    made = make(tmp_path, "a")
    read = load_identity(tmp_path / "a.crt", tmp_path / "a.key")
    assert read == made
    assert (tmp_path / "a.key").stat().st_mode & 0o777 == 0o600
    assert "PRIVATE" not in repr(read)
    assert made.certificate.site == int(made.certificate.fingerprint[:16], 16)


def test_identity_is_never_replaced(tmp_path: Path) -> None:
    make(tmp_path, "a")
    with pytest.raises(RefusedError, match="exists already"):
        make(tmp_path, "a")


def test_damaged_identity_files(tmp_path: Path) -> None:
    make(tmp_path, "a")
    make(tmp_path, "b")
    with pytest.raises(ConfigError, match="does not belong"):
        load_identity(tmp_path / "a.crt", tmp_path / "b.key")
    (tmp_path / "a.key").chmod(0o640)
    with pytest.raises(ConfigError, match="read by others"):
        load_identity(tmp_path / "a.crt", tmp_path / "a.key")
    (tmp_path / "b.key").write_text("no key")
    with pytest.raises(ConfigError, match="not a PEM private key"):
        load_identity(tmp_path / "b.crt", tmp_path / "b.key")
    (tmp_path / "a.crt").write_text("no certificate")
    with pytest.raises(ConfigError, match="exactly one PEM certificate"):
        load_identity(tmp_path / "a.crt", tmp_path / "a.key")


def test_group_key_round_trip(tmp_path: Path) -> None:
    master = MasterKey.create(tmp_path / "master.key")
    key = new_group_key()
    wrapped = master.wrap(key, GROUP)
    assert len(wrapped) == WRAPPED_LEN
    assert key not in wrapped
    assert wrapped != master.wrap(key, GROUP)
    again = MasterKey.load(tmp_path / "master.key")
    assert again.unwrap(wrapped, GROUP) == key
    assert (tmp_path / "master.key").read_text().strip() not in repr(again)


def test_every_changed_bit_of_a_wrapped_key_is_noticed(tmp_path: Path) -> None:
    master = MasterKey.create(tmp_path / "master.key")
    wrapped = master.wrap(new_group_key(), GROUP)
    for place in range(len(wrapped) * 8):
        damaged = bytearray(wrapped)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises((DamagedError, ConfigError)):
            master.unwrap(bytes(damaged), GROUP)
    with pytest.raises(DamagedError):
        master.unwrap(wrapped[:-1], GROUP)
    with pytest.raises(DamagedError, match="fails its check"):
        master.unwrap(wrapped, bytes(16))
    other = MasterKey.create(tmp_path / "other.key")
    with pytest.raises(ConfigError, match="wrapped under master key"):
        other.unwrap(wrapped, GROUP)


def test_bad_master_key_files(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    with pytest.raises(ConfigError, match="does not exist"):
        MasterKey.load(path)
    MasterKey.create(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="read by others"):
        MasterKey.load(path)
    path.chmod(0o600)
    path.write_text("zz")
    with pytest.raises(ConfigError, match="hex digits"):
        MasterKey.load(path)


def peers_of(own: Identity, *others: Identity) -> PinnedPeers:
    def peer(identity: Identity) -> Peer:
        name = identity.certificate.name
        return Peer(name=name, address=f"{name}:1", certificate=identity.certificate)

    return PinnedPeers(peer(own), [peer(other) for other in others])


def test_peers_by_name_address_and_certificate(tmp_path: Path) -> None:
    own, other, stranger = (make(tmp_path, name) for name in ("own", "other", "stranger"))
    peers = peers_of(own, other)
    assert peers.by_name("other").certificate == other.certificate
    assert peers.by_address("other:1").name == "other"
    assert peers.by_address("own:1").name == "own"
    assert peers.identify(other.certificate.pem).name == "other"
    with pytest.raises(NotFoundError, match="no peer is called"):
        peers.by_name("nobody")
    with pytest.raises(NotFoundError, match="no pinned peer has the address"):
        peers.by_address("nowhere:1")
    with pytest.raises(UnreachableError, match="not pinned"):
        peers.identify(stranger.certificate.pem)
    with pytest.raises(ConfigError, match="pins the certificate of"):
        peers_of(own, own)


def test_peers_from_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "identity").mkdir()
    create_identity(tmp_path / "identity/agent.crt", tmp_path / "identity/agent.key", "a")
    make(tmp_path, "b")
    config = parse_config(
        {"agent": {"name": "a"}, "peer": {"b": {"address": "h:1", "certificate": "b.crt"}}},
        base=tmp_path,
    )
    identity, peers = load_peers(config)
    assert identity.certificate.name == "a"
    assert [peer.name for peer in peers] == ["b"]
    assert len(peers) == 1


class Link:
    """A gRPC server with one echoing method, and the pins of both sides."""

    def __init__(self, server: Identity, pinned: PinnedPeers) -> None:
        self.seen: list[bytes] = []
        self.server = grpc.server(futures.ThreadPoolExecutor(2))
        method = grpc.unary_unary_rpc_method_handler(self.echo)
        self.server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("t", {"Echo": method}),)
        )
        self.port = self.server.add_secure_port("127.0.0.1:0", server_credentials(server, pinned))
        self.server.start()

    def echo(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.seen.append(context.auth_context()["x509_pem_cert"][0])
        return request

    def call(self, identity: Identity, peer: Peer) -> bytes:
        credentials = client_credentials(identity, peer)
        address = f"127.0.0.1:{self.port}"
        with grpc.secure_channel(address, credentials, client_options()) as channel:
            answer: bytes = channel.unary_unary("/t/Echo")(b"hello", timeout=5)
            return answer


def test_mutual_tls_between_pinned_agents_only(tmp_path: Path) -> None:
    server, client, stranger = (make(tmp_path, name) for name in ("s", "c", "x"))
    pinned = peers_of(server, client)
    link = Link(server, pinned)
    try:
        assert link.call(client, peers_of(client, server).by_name("s")) == b"hello"
        assert pinned.identify(link.seen[0]).name == "c"
        with pytest.raises(grpc.RpcError):
            link.call(stranger, peers_of(stranger, server).by_name("s"))
        with pytest.raises(grpc.RpcError):
            link.call(client, peers_of(client, stranger).by_name("x"))
        assert len(link.seen) == 1
    finally:
        link.server.stop(None).wait()


SERVER = """
import sys
from concurrent import futures
from ebbtide.security.identity import load_identity
from ebbtide.security.peers import Peer, PinnedPeers
from ebbtide.security.tls import server_credentials
import grpc
own = load_identity(*map(__import__("pathlib").Path, sys.argv[1:3]))
peers = PinnedPeers(Peer(name="s", address="", certificate=own.certificate), [])
server = grpc.server(futures.ThreadPoolExecutor(1))
print(server.add_secure_port("127.0.0.1:0", server_credentials(own, peers)), flush=True)
server.start()
sys.stdin.read()
"""


def test_tls_1_2_is_refused(tmp_path: Path) -> None:
    identity = make(tmp_path, "s")
    files = (tmp_path / "s.crt", tmp_path / "s.key")

    def handshake(port: int, version: ssl.TLSVersion) -> str | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(cadata=identity.certificate.pem.decode())
        context.load_cert_chain(*files)
        context.set_alpn_protocols(["h2"])
        context.minimum_version = context.maximum_version = version
        with (
            socket.create_connection(("127.0.0.1", port), timeout=5) as raw,
            context.wrap_socket(raw) as wrapped,
        ):
            return wrapped.version()

    # Its own process: the floor is read when gRPC is imported, and pytest may have done that first.
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, *files],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        port = int(server.stdout.readline())
        assert handshake(port, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        with pytest.raises((ssl.SSLError, ConnectionError)):
            handshake(port, ssl.TLSVersion.TLSv1_2)
        server.stdin.close()
        assert server.wait(10) == 0


def test_agent_leaves_no_core_file_with_keys() -> None:
    """The kernel is told before a key is read, whatever becomes of the start."""
    program = (
        "import contextlib, ctypes, pathlib\n"
        "from ebbtide import agent, errors\n"
        "with contextlib.suppress(errors.EbbError):\n"
        "    agent.run(pathlib.Path('/nowhere/agent.toml'))\n"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))\n"  # PR_GET_DUMPABLE
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout == "0\n"
