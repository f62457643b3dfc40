"""Starts server processes that outlive the agent, and notices when one ends.

A server gets its launch message on standard input to the end of file, says one `Response` on
standard output when it serves or has failed, and goes on in a session of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ebbtide.control.client import MESSAGE_BYTES_MAX, failure_of
from ebbtide.errors import InternalError, UnreachableError
from ebbtide.rpc import control_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path

#: Recovery of a large spool may take its time; longer than this is a hang.
READY_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A server process that says it serves."""

    pid: int
    response: pb.Response


def _read_exactly(descriptor: int, length: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < length:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            raise TimeoutError
        piece = os.read(descriptor, length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _tail(path: Path, length: int = 400) -> str:
    with contextlib.suppress(OSError):
        lines = path.read_bytes()[-length:].decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""
    return ""


def start(
    module: str, message: bytes, *, socket: Path, log: Path, ready_s: float = READY_S
) -> Started:
    """Start `python -m module` detached and wait until it serves. Blocks.

    The socket's path is on the command line for people who look for the process.

    Raises the error that the process names; `InternalError` if it ends without a word;
    `UnreachableError` if it says nothing in time (it is killed then).
    """
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd="/",
            start_new_session=True,
        )
    assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 (PIPE)
    served = False
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(message)
            process.stdin.close()
        deadline = time.monotonic() + ready_s
        descriptor = process.stdout.fileno()
        (length,) = struct.unpack("<I", _read_exactly(descriptor, 4, deadline))
        if length > MESSAGE_BYTES_MAX:
            raise InternalError(f"{module} answered with {length} bytes")
        response = pb.Response.FromString(_read_exactly(descriptor, length, deadline))
        if error := failure_of(response):
            raise error
        served = True
        # It is not Popen's any more: it outlives us, and `Watch` reaps it if it does not.
        process.returncode = 0
        return Started(pid=process.pid, response=response)
    except EOFError:
        process.wait(5)
        raise InternalError(
            f"{module} ended with status {process.returncode} before it served: {_tail(log)}",
            hint=f"its messages are in {log}",
        ) from None
    except TimeoutError:
        raise UnreachableError(
            f"{module} did not serve within {ready_s:.0f} s", code="timeout"
        ) from None
    finally:
        process.stdout.close()
        if not served:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            if process.returncode is None:
                process.kill()
                process.wait()


class Watch:
    """Notices the end of a process, child or not. `ended` is set once it is gone."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._descriptor = -1
        try:
            self._descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._over()
            return
        self._loop.add_reader(self._descriptor, self._over)

    def _over(self) -> None:
        self.close()
        # A child would stay a zombie; an adopted process is not our child.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        self.ended.set()

    def close(self) -> None:
        """Stop watching."""
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
