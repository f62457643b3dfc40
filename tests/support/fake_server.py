"""A server process that holds nothing: reads a launch message, answers status and stop.

The launch message is a TapLaunch; `group_name` says how to behave: "serve", "refuse" or "die".
"""

from __future__ import annotations

import os
import socket
import struct
import sys

from ebbtide.rpc import control_pb2 as pb


def framed(response: pb.Response) -> bytes:
    message = response.SerializeToString()
    return struct.pack("<I", len(message)) + message


def exactly(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def serve(connection: socket.socket) -> bool:
    """Answer one client; true if it asked us to stop."""
    while True:
        try:
            (length,) = struct.unpack("<I", exactly(connection, 4))
            request = pb.Request.FromString(exactly(connection, length))
        except (EOFError, ConnectionError):
            return False
        response = pb.Response(id=request.id, done=pb.Done())
        if request.WhichOneof("verb") == "status":
            response.tap_status.pid = os.getpid()
        connection.sendall(framed(response))
        if request.WhichOneof("verb") == "stop":
            return True


def main() -> int:
    with os.fdopen(0, "rb") as launch:
        message = pb.TapLaunch.FromString(launch.read())
    if message.group_name == "die":
        print("no reason given", file=sys.stderr)
        return 3
    if message.group_name == "refuse":
        failure = pb.Failure(code="in-use", message="somebody holds it", hint="wait")
        os.write(1, framed(pb.Response(failure=failure)))
        return 5
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        if os.path.exists(message.control_socket):
            os.unlink(message.control_socket)
        listener.bind(message.control_socket)
        listener.listen()
        status = pb.TapStatus(pid=os.getpid())
        os.write(1, framed(pb.Response(tap_status=status)))
        while True:
            connection, _ = listener.accept()
            with connection:
                if serve(connection):
                    return 0


if __name__ == "__main__":
    sys.exit(main())
