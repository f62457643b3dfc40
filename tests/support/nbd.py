"""A real NBD client for the tests: libnbd's own Python module, from Debian's python3-libnbd.

Debian 12's Python is 3.11 as ours is, so its module loads here; it lies outside the virtual
environment's path.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

_DEBIAN = Path("/usr/lib/python3/dist-packages")
#: Largest request of libnbd's synchronous calls that we make: servers advertise 32 MiB.
CHUNK = 8 << 20


@cache
def libnbd() -> Any:
    """The module `nbd`; skips the test if Debian's package is absent."""
    shared = next(iter(_DEBIAN.glob("libnbdmod.cpython-311-*.so")), None)
    if sys.version_info[:2] != (3, 11) or shared is None:
        pytest.skip("needs python3-libnbd and Python 3.11")
    for name, path in (("libnbdmod", shared), ("nbd", _DEBIAN / "nbd.py")):
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
    return sys.modules["nbd"]


def nbd_error() -> type[Exception]:
    """The class of libnbd's errors."""
    found: type[Exception] = libnbd().Error
    return found


class Client:
    """One connection to one export."""

    def __init__(self, uri: str) -> None:
        self._module = libnbd()
        self.handle = self._module.NBD()
        self.handle.connect_uri(uri)
        self.size: int = self.handle.get_size()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; harmless if the server is gone."""
        with contextlib.suppress(self._module.Error):
            self.handle.shutdown()
        # The module closes a handle when its last reference goes.
        del self.handle

    def pread(self, length: int, offset: int) -> bytes:
        return bytes(self.handle.pread(length, offset))

    def read_all(self) -> bytes:
        parts = [
            self.pread(min(CHUNK, self.size - offset), offset)
            for offset in range(0, self.size, CHUNK)
        ]
        return b"".join(parts)

    def pwrite(self, data: bytes, offset: int, *, fua: bool = False) -> None:
        self.handle.pwrite(data, offset, self._module.CMD_FLAG_FUA if fua else 0)

    def zero(self, length: int, offset: int) -> None:
        self.handle.zero(length, offset)

    def trim(self, length: int, offset: int) -> None:
        self.handle.trim(length, offset)

    def flush(self) -> None:
        self.handle.flush()

    def submit(
        self, kind: str, data: bytes, length: int, offset: int, done: Callable[[int], int]
    ) -> None:
        """Queue one asynchronous request; `done` gets 0 or an errno."""

        def completed(error: Any) -> int:
            return done(error.value)

        match kind:
            case "write":
                buffer = self._module.Buffer.from_bytearray(bytearray(data))
                self.handle.aio_pwrite(buffer, offset, completed)
            case "zero":
                self.handle.aio_zero(length, offset, completed)
            case "trim":
                self.handle.aio_trim(length, offset, completed)
            case "flush":
                self.handle.aio_flush(completed)
            case _:
                raise ValueError(kind)

    def in_flight(self) -> int:
        count: int = self.handle.aio_in_flight()
        return count

    def poll(self, timeout_ms: int = 1000) -> None:
        self.handle.poll(timeout_ms)
