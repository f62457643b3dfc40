"""gRPC's own rate between two Python processes: raw 1 MiB messages over TLS, no product in it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from bench.errors import UnavailableError
from ebbtide.security.identity import TLS_NAME, create_identity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_METHOD = "/ebbtide.bench/Push"
_MESSAGE = 1 << 20
_OPTIONS = [("grpc.max_receive_message_length", 8 << 20)]


async def _serve(certificate: bytes, key: bytes) -> None:
    async def push(requests: AsyncIterator[bytes], _: Any) -> bytes:
        total = 0
        async for message in requests:
            total += len(message)
        return total.to_bytes(8, "little")

    server = grpc.aio.server(options=_OPTIONS)
    handler = grpc.stream_unary_rpc_method_handler(push)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("ebbtide.bench", {"Push": handler})]
    )
    credentials = grpc.ssl_server_credentials([(key, certificate)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


async def _push(port: int, certificate: bytes, count: int) -> float:
    payload = bytes(_MESSAGE)

    async def messages() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield payload

    options = [*_OPTIONS, ("grpc.ssl_target_name_override", TLS_NAME)]
    credentials = grpc.ssl_channel_credentials(certificate)
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        call = channel.stream_unary(_METHOD, request_serializer=bytes, response_deserializer=bytes)
        await call(_one_message())
        begun = time.monotonic()
        answer = await call(messages())
        took = time.monotonic() - begun
    assert int.from_bytes(answer, "little") == count * _MESSAGE
    return count * _MESSAGE / 1e6 / took


async def _one_message() -> AsyncIterator[bytes]:
    """One message, to have the connection up before the clock starts."""
    yield bytes(_MESSAGE)


def rate_mb_s(size: int) -> float:
    """Megabytes (10^6) a second that one stream moves on this machine."""
    with tempfile.TemporaryDirectory() as directory:
        certificate, key = Path(directory) / "bench.crt", Path(directory) / "bench.key"
        create_identity(certificate, key, "bench")
        server = subprocess.Popen(
            [sys.executable, "-m", "bench.grpc_rate", str(certificate), str(key)],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            line = server.stdout.readline().strip()
            if not line:
                raise UnavailableError("the gRPC probe does not start")
            count = max(1, size // _MESSAGE)
            return asyncio.run(_push(int(line), certificate.read_bytes(), count))
        finally:
            server.kill()
            server.wait(10)
            if server.stdout is not None:
                server.stdout.close()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]).read_bytes()))
