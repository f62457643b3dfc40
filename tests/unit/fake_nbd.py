"""An NBD server in memory that keeps its history: the oracle for the demo's search."""

from __future__ import annotations

import socket
import struct
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class FakeNbd:
    """One export. `image(n)` is the volume after the first n writes."""

    def __init__(self, path: Path, size: int) -> None:
        self.size = size
        self.writes: list[tuple[int, bytes]] = []
        self.flushes = 0
        self.point: int | None = None
        self.error = 0
        self.refuse_export = False
        self.uri = f"nbd+unix:///data?socket={path}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def image(self, point: int | None) -> bytearray:
        image = bytearray(self.size)
        for offset, data in self.writes[:point]:
            image[offset : offset + len(data)] = data
        return image

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            connection.sendall(struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 3))
            stream.read(4)
            _, option, length = struct.unpack(">QII", stream.read(16))
            stream.read(length)
            reply = 0x3E889045565A9
            if self.refuse_export:
                connection.sendall(struct.pack(">QIII", reply, option, 0x80000006, 0))
                return
            info = struct.pack(">HQH", 0, self.size, 5)
            connection.sendall(struct.pack(">QIII", reply, option, 3, len(info)) + info)
            connection.sendall(struct.pack(">QIII", reply, option, 1, 0))
            image = self.image(self.point)
            while header := stream.read(28):
                _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", header)
                answer = struct.pack(">IIQ", 0x67446698, self.error, cookie)
                if command == 2:
                    return
                if command == 1:
                    data = stream.read(length)
                    self.writes.append((offset, data))
                    image[offset : offset + length] = data
                elif command == 3:
                    self.flushes += 1
                elif not self.error:
                    answer += image[offset : offset + length]
                connection.sendall(answer)


def serve(path: Path, size: int) -> Iterator[FakeNbd]:
    """For fixtures."""
    server = FakeNbd(path, size)
    yield server
    server.close()
