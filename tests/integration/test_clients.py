"""Real clients: the field's own tools work on a protected volume, and its view equals it.

nbdinfo, nbdcopy, qemu-img, qemu-io and fio over NBD; ext4 and xfs on the attached block device,
with SQLite and PostgreSQL inside.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import sqlite3
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ebbtide.rpc import agent_pb2
from tests.support.stack import Stack

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.needs("root"),
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("leak_check"),
]
SIZE = 64 << 20
POSTGRES = Path("/usr/lib/postgresql/15/bin")


def run(*command: str, **options: object) -> str:
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with Stack.run(tmp_path) as stack:
        stack.protect("ward", {"disk": SIZE})
        yield stack


def view_equals_source(stack: Stack) -> None:
    """qemu-img compares the newest view with the protected volume."""
    stack.wait_durable("ward")
    with stack.view("ward") as view:
        run(
            "qemu-img", "compare", "-f", "raw", "-F", "raw",
            stack.uri("ward", "disk"), view.volumes[0].nbd_uri,
        )  # fmt: skip


@pytest.mark.needs("nbdinfo")
def test_nbdinfo_lists_and_describes(stack: Stack) -> None:
    uri = stack.uri("ward", "disk")
    found = json.loads(run("nbdinfo", "--json", uri))
    export = found["exports"][0]
    assert found["protocol"] == "newstyle-fixed"
    assert export["export-size"] == SIZE
    for ability in ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"):
        assert export[ability] is True, ability
    assert "base:allocation" in export["contexts"]
    listed = json.loads(run("nbdinfo", "--list", "--json", uri))
    assert [one["export-name"] for one in listed["exports"]] == ["disk"]


@pytest.mark.needs("nbdcopy", "qemu-img")
def test_nbdcopy_in_and_out(stack: Stack, tmp_path: Path, rng: random.Random) -> None:
    image = tmp_path / "in.raw"
    image.write_bytes(rng.randbytes(SIZE // 2) + bytes(SIZE // 2))
    run("nbdcopy", "--flush", str(image), stack.uri("ward", "disk"))
    out = tmp_path / "out.raw"
    stack.wait_durable("ward")
    with stack.view("ward") as view:
        run("nbdcopy", view.volumes[0].nbd_uri, str(out))
    assert out.read_bytes() == image.read_bytes()


@pytest.mark.needs("qemu-io", "qemu-img")
def test_qemu_io_patterns(stack: Stack) -> None:
    uri = stack.uri("ward", "disk")
    commands = [
        "write -P 0x5a 0 1M", "write -z 256k 64k", "discard 512k 128k", "write -P 7 1000k 4k",
        "read -P 0x5a 0 256k", "read -P 0 256k 64k", "read -P 0 512k 128k", "flush",
    ]  # fmt: skip
    said = run("qemu-io", "-f", "raw", *(f"-c{command}" for command in commands), uri)
    assert "failed" not in said
    view_equals_source(stack)


@pytest.mark.needs("fio", "qemu-img")
@pytest.mark.parametrize("block", ["4k", "512-64k"])
def test_fio_verifies(stack: Stack, block: str, tmp_path: Path) -> None:
    size = ["--bsrange=" + block, "--blockalign=512"] if "-" in block else ["--bs=" + block]
    engines = run("fio", "--enghelp")
    if "nbd" not in engines.split():
        pytest.skip("needs fio with its nbd engine")
    run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={stack.uri('ward', 'disk')}",
        "--rw=randwrite", *size, "--iodepth=32", "--size=32m", "--verify=crc32c",
        "--verify_fatal=1", "--end_fsync=1", "--randrepeat=0",
        cwd=tmp_path,
    )  # fmt: skip
    view_equals_source(stack)


@pytest.fixture
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Stack, Path]]:
    """A file system of the given kind on the attached device of a protected volume."""
    kind = request.param
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    with Stack.run(tmp_path) as stack:
        stack.protect("ward", {"disk": 512 << 20})
        attached = stack.source.stub.Attach(agent_pb2.AttachRequest(group="ward"), timeout=30)
        device = attached.devices[0].device
        run(f"mkfs.{kind}", "-q", device)
        run("mount", device, str(mountpoint))
        try:
            yield stack, mountpoint
        finally:
            subprocess.run(["umount", str(mountpoint)], check=False)


@contextlib.contextmanager
def look(stack: Stack) -> Iterator[Path]:
    """Mount the newest view, writable so that file systems and databases recover, and yield it."""
    stack.wait_durable("ward")
    directory = stack.directory / "look"
    directory.mkdir()
    with stack.view("ward", writable=True) as view:
        stack.target.stub.MountView(
            agent_pb2.MountViewRequest(view=view.id, directory=str(directory)), timeout=60
        )
        try:
            yield directory
        finally:
            stack.target.stub.UnmountView(
                agent_pb2.UnmountViewRequest(view=view.id, directory=str(directory)), timeout=60
            )


@pytest.mark.needs("fuse", "loop", "mkfs.ext4", "mkfs.xfs")
@pytest.mark.parametrize("mounted", ["ext4", "xfs"], indirect=True)
def test_sqlite_in_a_file_system(mounted: tuple[Stack, Path]) -> None:
    stack, mountpoint = mounted
    with contextlib.closing(sqlite3.connect(mountpoint / "his.db")) as database:
        # FULL syncs each commit only with a write-ahead log; a rollback journal needs EXTRA.
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("CREATE TABLE surgery (id INTEGER PRIMARY KEY, note TEXT)")
        for number in range(200):
            database.execute("INSERT INTO surgery (note) VALUES (?)", (f"note {number} " * 50,))
            database.commit()
        with (
            look(stack) as directory,
            contextlib.closing(sqlite3.connect(directory / "his.db")) as found,
        ):
            assert found.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert found.execute("SELECT count(*) FROM surgery").fetchone() == (200,)


class Postgres:
    """A PostgreSQL server of our own on a data directory, on a unix socket only."""

    def __init__(self, data: Path, socket: Path) -> None:
        self.data, self.socket = data, socket
        account = pwd.getpwnam("postgres")
        self.user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}

    def own(self, *paths: Path) -> None:
        for path in paths:
            os.chown(path, self.user["user"], self.user["group"])  # type: ignore[arg-type]

    def init(self) -> None:
        run(str(POSTGRES / "initdb"), "-D", str(self.data), "-A", "trust", **self.user, cwd="/")

    def start(self) -> None:
        run(
            str(POSTGRES / "pg_ctl"), "-D", str(self.data), "-w", "-l", str(self.socket / "pg.log"),
            "-o", f"-k {self.socket} -c listen_addresses='' -c shared_buffers=16MB", "start",
            **self.user, cwd="/",
        )  # fmt: skip

    def stop(self, mode: str = "fast") -> None:
        run(str(POSTGRES / "pg_ctl"), "-D", str(self.data), "-m", mode, "-w", "stop",
            **self.user, cwd="/")  # fmt: skip

    def sql(self, text: str) -> str:
        return run(
            str(POSTGRES / "psql"), "-h", str(self.socket), "-U", "postgres", "-At", "-c", text
        ).strip()


@pytest.mark.needs("fuse", "loop", "mkfs.ext4", str(POSTGRES / "initdb"))
@pytest.mark.parametrize("mounted", ["ext4"], indirect=True)
def test_postgresql_in_ext4(mounted: tuple[Stack, Path], tmp_path: Path) -> None:
    """A table is dropped; one microsecond before, everything committed is there."""
    stack, mountpoint = mounted
    for parent in [tmp_path, *tmp_path.parents][:-2]:
        parent.chmod(0o755)
    (mountpoint / "pg").mkdir()
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    live = Postgres(mountpoint / "pg", sockets)
    live.own(live.data, sockets)
    live.init()
    live.start()
    try:
        live.sql("CREATE TABLE lab (id serial PRIMARY KEY, value text)")
        for _ in range(50):
            live.sql("INSERT INTO lab (value) SELECT md5(g::text) FROM generate_series(1, 20) g")
        stack.source.stub.Bookmark(
            agent_pb2.PlaceBookmarkRequest(group="ward", label="before the accident")
        )
        live.sql("DROP TABLE lab")
        live.sql("CHECKPOINT")
        stack.wait_durable("ward")
    finally:
        live.stop("immediate")
    directory = tmp_path / "look"
    directory.mkdir()
    with stack.view("ward", bookmark="before the accident", writable=True) as view:
        stack.target.stub.MountView(
            agent_pb2.MountViewRequest(view=view.id, directory=str(directory)), timeout=60
        )
        past = Postgres(directory / "pg", sockets)
        (past.data / "postmaster.pid").unlink(missing_ok=True)
        past.start()
        try:
            assert past.sql("SELECT count(*) FROM lab") == "1000"
        finally:
            past.stop()
        stack.target.stub.UnmountView(
            agent_pb2.UnmountViewRequest(view=view.id, directory=str(directory)), timeout=60
        )
