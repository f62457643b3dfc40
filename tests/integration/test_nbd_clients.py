"""Real clients against the NBD server alone: it serves a plain file, without tap or view.

What goes wrong here is the server's own fault; `test_clients.py` runs the same tools against a
protected volume.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.nbd import Client, libnbd, nbd_error

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("leak_check")
ROOT = Path(__file__).parents[2]
SIZE = 48 << 20
BLOCK = 4096


def run(*command: str, **options: object) -> str:
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=120, **options
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def binary() -> Path:
    """The example that serves a file; built if `cargo test` has not done so yet."""
    with_target = os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target"))
    run("cargo", "build", "--quiet", "-p", "ebbtide-core", "--example", "nbd_file", cwd=ROOT)
    return Path(with_target) / "debug/examples/nbd_file"


class Served:
    """A file and the server in front of it."""

    def __init__(self, binary: Path, directory: Path, *options: str) -> None:
        self.file = directory / "disk.img"
        self.socket = directory / "nbd.sock"
        if not self.file.exists():
            with self.file.open("wb") as file:
                file.truncate(SIZE)
        self.process = subprocess.Popen(
            [binary, self.file, "--unix", self.socket, "--tcp", "127.0.0.1:0", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        first = self.process.stdout.readline().split()
        assert first[:1] == ["tcp"], first
        self.tcp = f"nbd://{first[1]}"
        assert self.process.stdout.readline() == "ready\n"
        self.uri = f"nbd+unix:///?socket={self.socket}"

    def stop(self) -> None:
        """Ask it to end, as its documentation says; it must, within seconds."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
        assert self.process.wait(20) == 0
        assert self.process.stdout is not None
        self.process.stdout.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def served(binary: Path, tmp_path: Path) -> Iterator[Served]:
    served = Served(binary, tmp_path)
    try:
        yield served
        served.stop()
    finally:
        served.kill()


@pytest.mark.needs("nbdinfo")
def test_nbdinfo_sees_every_ability_that_is_served(served: Served) -> None:
    for uri in (served.uri, served.tcp):
        found = json.loads(run("nbdinfo", "--json", uri))
        assert found["protocol"] == "newstyle-fixed"
        assert found["structured"] is True
        export = found["exports"][0]
        assert export["export-size"] == SIZE
        assert export["description"] == "a plain file"
        assert export["contexts"] == ["base:allocation"]
        abilities = {name for name, value in export.items() if value is True}
        assert abilities == {
            "can_df", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero",
        }  # fmt: skip
        sizes = [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
        assert sizes == [1, 4096, 32 << 20]


@pytest.mark.needs("nbdinfo")
def test_nbdinfo_maps_data_and_holes(served: Served) -> None:
    with served.file.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"x" * (1 << 20))
        file.flush()
        os.fsync(file.fileno())
    found = json.loads(run("nbdinfo", "--map", "--json", served.uri))
    assert [(run["offset"], run["length"], run["type"]) for run in found] == [
        (0, 1 << 20, 3),
        (1 << 20, 1 << 20, 0),
        (2 << 20, SIZE - (2 << 20), 3),
    ]


@pytest.mark.needs("nbdcopy", "qemu-img")
@pytest.mark.parametrize("transport", ["uri", "tcp"])
def test_nbdcopy_and_qemu_img_agree(
    served: Served, transport: str, tmp_path: Path, rng: random.Random
) -> None:
    uri = getattr(served, transport)
    image = tmp_path / "in.raw"
    image.write_bytes(rng.randbytes(SIZE // 2) + bytes(SIZE // 4) + rng.randbytes(SIZE // 4))
    run("nbdcopy", "--flush", str(image), uri)
    assert served.file.read_bytes() == image.read_bytes()
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), uri)
    out = tmp_path / "out.raw"
    run("nbdcopy", "--connections=4", "--requests=64", uri, str(out))
    assert out.read_bytes() == image.read_bytes()
    converted = tmp_path / "converted.raw"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(converted))
    assert converted.read_bytes() == image.read_bytes()


@pytest.mark.needs("qemu-io")
def test_qemu_io_reads_what_it_wrote(served: Served) -> None:
    commands = [
        "write -P 0x5a 0 4M", "write -P 0x11 -f 100 5000", "read -P 0x11 100 5000",
        "write -z 256k 64k", "read -P 0 256k 64k", "write -z -u 1M 64k", "read -P 0 1M 64k",
        "discard 2M 128k", "read -P 0 2M 128k", "aio_write -P 3 3M 512k", "aio_flush",
        "read -P 3 3M 512k", "flush", "read -P 0x5a 3584k 512k",
    ]  # fmt: skip
    said = run("qemu-io", "-f", "raw", *(f"-c{command}" for command in commands), served.uri)
    assert "failed" not in said
    with served.file.open("rb") as file:
        assert file.read(6000) == b"\x5a" * 100 + b"\x11" * 5000 + b"\x5a" * 900


@pytest.mark.needs("fio")
@pytest.mark.parametrize("blocks", ["--bs=4k", "--bsrange=512-1m", "--bs=600k"])
def test_fio_verifies(served: Served, blocks: str, tmp_path: Path) -> None:
    if "nbd" not in run("fio", "--enghelp").split():
        pytest.skip("needs fio with its nbd engine")
    run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={served.uri}", "--rw=randwrite",
        blocks, "--blockalign=512", "--iodepth=32", "--size=24m", "--verify=crc32c",
        "--verify_fatal=1", "--end_fsync=1", "--randrepeat=0",
        cwd=tmp_path,
    )  # fmt: skip


def test_libnbd_random_requests_equal_a_model(served: Served, rng: random.Random) -> None:
    """Unaligned writes, zeroes and trims in every reply style, checked after each round."""
    model = bytearray(SIZE)
    handles = []
    for structured in (True, False):
        handle = libnbd().NBD()
        handle.set_request_structured_replies(structured)
        handle.connect_uri(served.uri)
        handles.append(handle)
    for _ in range(400):
        handle = rng.choice(handles)
        length = rng.choice([1, 100, BLOCK, 70_000, 1 << 20, 5 << 20])
        offset = rng.randrange(SIZE - length)
        match rng.choice(["write", "write", "zero", "trim", "read"]):
            case "write":
                data = rng.randbytes(length)
                handle.pwrite(data, offset, rng.choice([0, 0, 0, libnbd().CMD_FLAG_FUA]))
                model[offset : offset + length] = data
            case "zero":
                handle.zero(length, offset, rng.choice([0, libnbd().CMD_FLAG_NO_HOLE]))
                model[offset : offset + length] = bytes(length)
            case "trim":
                handle.trim(length, offset)
                model[offset : offset + length] = bytes(length)
            case "read":
                assert bytes(handle.pread(length, offset)) == model[offset : offset + length]
    for handle in handles:
        handle.flush()
        whole = b"".join(bytes(handle.pread(8 << 20, at)) for at in range(0, SIZE, 8 << 20))
        assert whole == model
        handle.shutdown()
    assert served.file.read_bytes() == model


def test_libnbd_pipelines_on_many_connections(served: Served, rng: random.Random) -> None:
    """Eight connections with 64 requests each under way, on disjoint blocks."""
    contents = {index: rng.randbytes(BLOCK) for index in range(2048)}
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(served.uri)) for _ in range(8)]
        answers: list[int] = []

        def done(error: int) -> int:
            answers.append(error)
            return 1

        for number, client in enumerate(clients):
            for index in range(number, 2048, 8):
                while client.in_flight() >= 64:
                    client.poll()
                client.submit("write", contents[index], 0, index * BLOCK, done)
        for client in clients:
            client.submit("flush", b"", 0, 0, done)
            while client.in_flight():
                client.poll()
        assert answers == [0] * (2048 + 8)
        assert clients[3].pread(2048 * BLOCK, 0) == b"".join(contents[i] for i in range(2048))


def test_errors_have_the_protocols_numbers(binary: Path, tmp_path: Path) -> None:
    """libnbd checks nothing here (strict mode off), so the server must."""
    served = Served(binary, tmp_path)
    try:
        handle = libnbd().NBD()
        handle.set_strict_mode(0)
        handle.connect_uri(served.uri)
        cases = [
            (lambda: handle.pread(2, SIZE - 1), "Invalid argument"),
            (lambda: handle.pwrite(b"xx", SIZE - 1), "No space left on device"),
            (lambda: handle.zero(2, SIZE - 1), "No space left on device"),
            (lambda: handle.trim(2, SIZE - 1), "Invalid argument"),
            (lambda: handle.cache(2, 0), "Invalid argument"),
            (lambda: handle.pwrite(b"xx", 0, 1 << 7), "Invalid argument"),
        ]
        for request, message in cases:
            with pytest.raises(nbd_error(), match=message):
                request()
        assert bytes(handle.pread(1, SIZE - 1)) == b"\0"
        handle.shutdown()
    finally:
        served.stop()
    frozen = Served(binary, tmp_path, "--read-only")
    try:
        handle = libnbd().NBD()
        handle.set_strict_mode(0)
        handle.connect_uri(frozen.uri)
        assert handle.is_read_only()
        for request in (
            lambda: handle.pwrite(b"x", 0),
            lambda: handle.trim(1, 0),
            lambda: handle.zero(1, 0),
        ):
            with pytest.raises(nbd_error(), match="Operation not permitted"):
                request()
        handle.shutdown()
    finally:
        frozen.stop()


def test_options_before_go(served: Served) -> None:
    """Interactive negotiation: list, info, contexts, then abort."""
    handle = libnbd().NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(served.uri)
    names: list[str] = []
    handle.opt_list(lambda name, _: names.append(name) or 0)
    assert names == [""]
    handle.set_export_name("nobody")
    with pytest.raises(nbd_error()):
        handle.opt_info()
    handle.set_export_name("")
    handle.opt_info()
    assert handle.get_size() == SIZE
    contexts: list[str] = []
    handle.add_meta_context("base:")
    handle.opt_list_meta_context(lambda name: contexts.append(name) or 0)
    assert contexts == ["base:allocation"]
    handle.opt_abort()


def test_a_killed_servers_socket_is_taken_over(binary: Path, tmp_path: Path) -> None:
    first = Served(binary, tmp_path)
    with Client(first.uri) as client:
        client.pwrite(b"kept", 0)
    first.kill()
    assert first.socket.exists()
    second = Served(binary, tmp_path)
    try:
        with Client(second.uri) as client:
            assert client.pread(4, 0) == b"kept"
        refused = subprocess.run(
            [str(binary), str(second.file), "--unix", str(second.socket)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
        assert refused.returncode == 1
        assert "in use" in refused.stderr
    finally:
        second.stop()
    assert not second.socket.exists()


def test_garbage_ends_only_its_own_connection(served: Served, rng: random.Random) -> None:
    """Random bytes at every stage: the server lives, memory and descriptors stay."""
    descriptors = Path(f"/proc/{served.process.pid}/fd")
    with Client(served.uri) as good:
        good.pwrite(b"good", 0)
        before = len(list(descriptors.iterdir()))
        option = struct.pack(">Q", 0x49484156454F5054)
        go = option + struct.pack(">II", 7, 6) + bytes(6)
        request = struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 1 << 20)
        for beginning in (
            b"",
            struct.pack(">I", 3),
            struct.pack(">I", 3) + option,
            struct.pack(">I", 3) + go,
            struct.pack(">I", 3) + go + request,
        ):
            for _ in range(20):
                with socket.socket(socket.AF_UNIX) as bad:
                    bad.connect(str(served.socket))
                    with contextlib.suppress(OSError):
                        bad.sendall(beginning + rng.randbytes(rng.randrange(1, 300)))
        assert good.pread(4, 0) == b"good"
        with Client(served.uri) as again:
            assert again.size == SIZE
        for _ in range(200):
            if len(list(descriptors.iterdir())) <= before:
                break
            threading.Event().wait(0.05)
        assert len(list(descriptors.iterdir())) <= before
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    resident_kib = int(status.split("VmRSS:")[1].split()[0])
    assert resident_kib < 64 << 10


def test_an_idle_connection_costs_no_processor_time(served: Served) -> None:
    with Client(served.uri) as client:
        client.pwrite(b"x", 0)
        stat = Path(f"/proc/{served.process.pid}/stat")

        def ticks() -> int:
            fields = stat.read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        before = ticks()
        threading.Event().wait(1.0)
        assert ticks() - before <= 1
