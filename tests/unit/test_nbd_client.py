"""The demo's NBD client: round trips, and clear errors for whatever else comes back."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest

from ebbtide.cli.nbd_client import CHUNK, NbdClient, parse_uri
from ebbtide.errors import DamagedError, EbbError, UnreachableError, UsageError
from tests.unit.fake_nbd import FakeNbd, serve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeNbd]:
    yield from serve(tmp_path / "nbd.sock", 3 * CHUNK)


def test_round_trip_in_pieces(server: FakeNbd) -> None:
    data = bytes(range(256)) * (CHUNK // 128)
    with NbdClient(server.uri) as client:
        assert client.size == 3 * CHUNK
        client.write(4096, data)
        client.flush()
        assert client.read(4096, len(data)) == data
        assert client.read(0, 4096) == bytes(4096)
    assert [len(piece) for _, piece in server.writes] == [CHUNK, CHUNK]
    assert server.flushes == 1


def test_server_errors_have_names(server: FakeNbd) -> None:
    with NbdClient(server.uri) as client:
        server.error = 28
        with pytest.raises(DamagedError, match="No space left"):
            client.write(0, b"x")


def test_unknown_export(server: FakeNbd) -> None:
    server.refuse_export = True
    with pytest.raises(UnreachableError, match="refuses the export"):
        NbdClient(server.uri)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="does not answer"):
        NbdClient(f"nbd+unix:///data?socket={tmp_path}/none.sock")


@pytest.mark.parametrize(
    "greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"NBDMAGIC" + bytes(10)]
)
def test_something_else_there(tmp_path: Path, greeting: bytes) -> None:
    path = str(tmp_path / "other.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            connection.sendall(greeting)
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(EbbError):
            NbdClient(f"nbd+unix:///data?socket={path}")
        thread.join(10)


@pytest.mark.parametrize("uri", ["nbd://host/data", "nbd+unix:///data", "/data"])
def test_other_addresses(uri: str) -> None:
    with pytest.raises(UsageError):
        parse_uri(uri)


def test_names_are_unquoted() -> None:
    assert parse_uri("nbd+unix:///a%20b?socket=/x%2By") == ("/x+y", "a b")
