"""A TCP relay between two agents that can be cut: the link of the tests, where netem is missing.

Not a model of a network: bytes are never changed, lost or reordered, only delayed by a cut.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE = 16 << 10


class Relay:
    """Listens on `port` and carries each connection to `to`; `cut` ends all and refuses more."""

    def __init__(self, to: int) -> None:
        self._to = ("127.0.0.1", to)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._is_cut = False
        self._ended = False
        #: Bytes carried, both directions together.
        self.carried = 0
        #: Cut by itself once this many bytes were carried: that is in the middle of a message.
        self._cut_at: int | None = None
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    @property
    def is_cut(self) -> bool:
        return self._is_cut

    def cut(self) -> None:
        """End every connection without a word, and accept no other."""
        with self._lock:
            self._is_cut = True
            gone, self._open = self._open, set()
        for one in gone:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def cut_after(self, length: int) -> None:
        """Cut once so many more bytes were carried."""
        self._cut_at = self.carried + length

    def mend(self) -> None:
        self._cut_at = None
        self._is_cut = False

    def end(self) -> None:
        self._ended = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while not self._ended:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut:
                near.close()
                continue
            try:
                far = socket.create_connection(self._to, timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._open |= {near, far}
            self._start(self._carry, near, far)
            self._start(self._carry, far, near)

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(PIECE):
                left = None if self._cut_at is None else self._cut_at - self.carried
                sink.sendall(piece if left is None else piece[: max(0, left)])
                self.carried += len(piece)
                if left is not None and left <= len(piece):
                    self.cut()
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            with self._lock:
                self._open.discard(one)
            one.close()


@contextlib.contextmanager
def relay(to: int) -> Iterator[Relay]:
    """A relay to a port of this host, ended at the end."""
    made = Relay(to)
    try:
        yield made
    finally:
        made.end()
