"""Records real block traces: what a loaded application does to the block device under its ext4.

`python -m bench.traces NAME...` (or `all`) records into `.cache/bench/traces/`; a trace that is
there is kept. `native/core/examples/fuse_file.rs record` serves an image through our FUSE front
end, a loop device lies on that file, ext4 on the loop device, the application on ext4. So a trace
has the writes as a tap gets them: after the page cache, in device order, with FLUSH.

`NAME.trace` is 16 bytes of head (`EBBTRACE`, version u32 = 1, zero u32), then entries to the end:

```
time_us u64 | offset u64 | length u64 | kind u8 | flags u8 | zero * 6 | content
kind: 1 write (content is `length` bytes), 2 zero, 3 discard, 4 flush;  flags: 1 FUA
```

Integers are little-endian, offsets and lengths are bytes, times are microseconds since 1970.
Entries stand in the order in which they changed the device. A flush stands where it was asked for.
`NAME.json` says what ran, and `load_from_us`, the time at which the load proper began: before it
lie mkfs and the filling of tables.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_TOP = Path(__file__).resolve().parent.parent
CACHE = _TOP / ".cache" / "bench" / "traces"
_TOOL = _TOP / "target" / "release" / "examples" / "fuse_file"
_POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
_SEED = 20260101
_GIB = 1 << 30

Load = dict[str, Any]


def _run(*command: object, **options: Any) -> str:
    options = {"timeout": 1200, **options}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return str(done.stdout)


def _as_user(name: str) -> dict[str, Any]:
    """Options of `subprocess` that drop root; databases refuse it."""
    user = pwd.getpwnam(name)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": [], "cwd": "/"}


def _wait_for(ready: Callable[[], bool], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.05)


@contextlib.contextmanager
def _recorded_device(trace: Path, size: int) -> Iterator[str]:
    """A loop device of `size` bytes whose changes go into `trace`."""
    with tempfile.TemporaryDirectory(prefix="ebb-trace-", dir="/var/tmp") as name:
        top = Path(name)
        image, control, holder = top / "volume", top / "control", top / "holder"
        (top / "fuse").mkdir()
        with image.open("wb") as file:
            file.truncate(size)
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        servers = [
            subprocess.Popen([_TOOL, "holder", holder, top / "fuse"], **quiet),
            subprocess.Popen([_TOOL, "record", control, trace, image], **quiet),
        ]
        try:
            _wait_for(lambda: holder.exists() and control.exists(), "the recorder")
            _run(_TOOL, "request", control, f"attach={holder}")
            device = _run(_TOOL, "loop-attach", top / "fuse" / "volume").strip()
            try:
                yield device
            finally:
                _run(_TOOL, "loop-detach", device)
            _run(_TOOL, "request", control, "stop")
            servers[1].wait(30)
            _run(_TOOL, "request", holder, "unmount")
        finally:
            for server in servers:
                server.terminate()
                server.wait(30)


@contextlib.contextmanager
def _recorded_ext4(trace: Path, size: int) -> Iterator[Path]:
    with (
        _recorded_device(trace, size) as device,
        tempfile.TemporaryDirectory(prefix="ebb-trace-mount-", dir="/var/tmp") as mount,
    ):
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
        _run("mount", "-o", "noatime", device, mount)
        try:
            # The databases' accounts must pass through.
            Path(mount).chmod(0o711)
            yield Path(mount)
            _run("sync")
        finally:
            _run("umount", mount)


@contextlib.contextmanager
def _postgresql(mount: Path, *settings: str) -> Iterator[Path]:
    """A server with data and log on `mount`; yields the directory of its socket."""
    account, tools = _as_user("postgres"), _POSTGRES[-1]
    data = mount / "pg"
    data.mkdir()
    os.chown(data, account["user"], account["group"])
    with tempfile.TemporaryDirectory(prefix="ebb-trace-pg-", dir="/var/tmp") as name:
        os.chown(name, account["user"], account["group"])
        _run(tools / "initdb", "-D", data, "-A", "trust", "-U", "bench", **account)
        words = [f"-k {name}", *(f"-c {word}" for word in ("listen_addresses=", *settings))]
        control = (tools / "pg_ctl", "-D", data, "-w", "-l", f"{name}/log")
        _run(*control, "-o", " ".join(words), "start", **account)
        try:
            yield Path(name)
        finally:
            _run(*control, "-m", "fast", "stop", **account)


@contextlib.contextmanager
def _mariadb(mount: Path, *settings: str) -> Iterator[Path]:
    """A server with its data on `mount`; yields its socket."""
    account = _as_user("mysql")
    data = mount / "mariadb"
    data.mkdir()
    os.chown(data, account["user"], account["group"])
    with tempfile.TemporaryDirectory(prefix="ebb-trace-db-", dir="/var/tmp") as name:
        os.chown(name, account["user"], account["group"])
        common = ("--no-defaults", f"--datadir={data}")
        install = ("mariadb-install-db", *common, "--auth-root-authentication-method=normal")
        _run(*install, "--skip-test-db", "--user=mysql", cwd="/")
        socket = Path(name) / "socket"
        server = subprocess.Popen(
            ["mariadbd", *common, f"--socket={socket}", "--skip-networking", *settings],
            **account,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_for(socket.exists, "MariaDB")
            _run("mariadb", f"--socket={socket}", "-e", "CREATE DATABASE sbtest")
            yield socket
        finally:
            server.terminate()
            server.wait(120)


def _sysbench(driver: str, there: str, rows: int, seconds: int, begun: Callable[[], None]) -> Load:
    """Fill four tables, then the OLTP mix for `seconds`."""
    words = (
        "sysbench", "oltp_read_write", *driver.split(), there, "--tables=4",
        f"--table-size={rows}", "--rand-type=uniform", f"--rand-seed={_SEED}",
    )  # fmt: skip
    _run(*words, "--threads=2", "prepare")
    _run("sync")
    begun()
    out = _run(*words, f"--time={seconds}", "--threads=4", "run")
    done = [line.split()[1] for line in out.splitlines() if "transactions:" in line]
    return {"tables": 4, "rows": rows, "seconds": seconds, "transactions": int(done[0])}


def _sysbench_pg(trace: Path, begun: Callable[[], None]) -> Load:
    settings = ("shared_buffers=512MB", "checkpoint_timeout=60s", "max_wal_size=8GB")
    with _recorded_ext4(trace, 6 * _GIB) as mount, _postgresql(mount, *settings) as socket:
        driver = "--db-driver=pgsql --pgsql-user=bench --pgsql-db=postgres"
        load = _sysbench(driver, f"--pgsql-host={socket}", 250_000, 420, begun)
    return {**load, "settings": settings}


def _sysbench_mariadb(trace: Path, begun: Callable[[], None]) -> Load:
    settings = ("--innodb-buffer-pool-size=256M", "--innodb-log-file-size=96M")
    with _recorded_ext4(trace, 4 * _GIB) as mount, _mariadb(mount, *settings) as socket:
        driver = "--db-driver=mysql --mysql-user=root --mysql-db=sbtest"
        load = _sysbench(driver, f"--mysql-socket={socket}", 250_000, 300, begun)
    return {**load, "settings": settings}


def _pgbench(trace: Path, begun: Callable[[], None]) -> Load:
    settings = ("shared_buffers=512MB", "checkpoint_timeout=30min", "max_wal_size=16GB")
    with _recorded_ext4(trace, 6 * _GIB) as mount, _postgresql(mount, *settings) as socket:
        words = ("pgbench", "-h", socket, "-U", "bench", "postgres")
        _run(*words, "-i", "-q", "-s", "20")
        _run("sync")
        begun()
        _run(*words, "-c", "4", "-j", "2", "-T", "240", f"--random-seed={_SEED}")
    return {"scale": 20, "clients": 4, "seconds": 240, "settings": settings}


def _digits(rng: random.Random, length: int) -> str:
    return "".join(rng.choices("0123456789-", k=length))


def _sqlite(trace: Path, begun: Callable[[], None]) -> Load:
    rng = random.Random(_SEED)
    rows, transactions = 200_000, 12_000
    with _recorded_ext4(trace, _GIB) as mount:
        base = sqlite3.connect(mount / "lab.db")
        base.execute("PRAGMA journal_mode=WAL")
        base.execute("CREATE TABLE lab (id INTEGER PRIMARY KEY, k INTEGER, c TEXT, pad TEXT)")
        base.execute("CREATE INDEX lab_k ON lab (k)")
        filling = ((rng.randrange(rows), _digits(rng, 120), _digits(rng, 60)) for _ in range(rows))
        base.executemany("INSERT INTO lab (k, c, pad) VALUES (?, ?, ?)", filling)
        base.commit()
        _run("sync")
        begun()
        for _ in range(transactions):
            for _ in range(2):
                change = (_digits(rng, 120), rng.randrange(rows))
                base.execute("UPDATE lab SET c = ? WHERE id = ?", change)
            new = (rng.randrange(rows), _digits(rng, 120), _digits(rng, 60))
            base.execute("INSERT INTO lab (k, c, pad) VALUES (?, ?, ?)", new)
            base.commit()
        base.close()
    return {"rows": rows, "transactions": transactions}


def _small_files(trace: Path, begun: Callable[[], None]) -> Load:
    """A source tree copied, changed in places and removed, as mail stores and builds do."""
    rng = random.Random(_SEED)
    sources = [path for path in Path("/usr/lib/python3").rglob("*") if path.is_file()]
    sources += [path for path in Path("/usr/share/doc").rglob("*") if path.is_file()]
    sources = sorted(path for path in sources if path.stat().st_size < 1 << 16)[:12_000]
    with _recorded_ext4(trace, 2 * _GIB) as mount:
        begun()
        for turn in range(4):
            top = mount / str(turn)
            for number, path in enumerate(sources):
                target = top / str(number % 97) / f"{number}-{path.name}"
                target.parent.mkdir(parents=True, exist_ok=True)
                content = bytearray(path.read_bytes())
                if content and rng.random() < 0.3:
                    at = rng.randrange(len(content))
                    content[at : at + 40] = _digits(rng, 40).encode()
                target.write_bytes(content)
                if number % 500 == 0:
                    _run("sync", "-f", mount)
            if turn >= 2:
                shutil.rmtree(mount / str(turn - 2))
        _run("sync", "-f", mount)
    return {"files": len(sources), "turns": 4}


def _dicom(trace: Path, begun: Callable[[], None]) -> Load:
    """512 x 512 slices of 16 bits: a smooth body with noise, a header, fsynced one by one."""
    rng = random.Random(_SEED)
    slices = 1000
    with _recorded_ext4(trace, 2 * _GIB) as mount:
        begun()
        for number in range(slices):
            # Low bytes are noise, as in 12-bit detectors; high bytes follow the body's shape.
            pixels = bytearray(2 * 512 * 512)
            pixels[::2] = rng.randbytes(512 * 512)
            pixels[1::2] = b"".join(
                bytes([3 + (row * (512 - row) + number) // 16384]) * 512 for row in range(512)
            )
            head = bytes(128) + b"DICM" + f"study {number // 100} series {number // 20}".encode()
            with (mount / f"{number}.dcm").open("wb") as file:
                file.write(head.ljust(1024, b"\0") + pixels)
                file.flush()
                os.fsync(file.fileno())
    return {"slices": slices}


def _encrypted(trace: Path, begun: Callable[[], None]) -> Load:
    """An encrypted image, filled and rewritten; ciphertext is random bytes to everyone else."""
    with _recorded_ext4(trace, 2 * _GIB) as mount:
        begun()
        with (mount / "vault.img").open("w+b") as file:
            for _ in range(2):
                file.seek(0)
                for _ in range(256):
                    file.write(os.urandom(1 << 20))
                file.flush()
                os.fsync(file.fileno())
    return {"bytes": 512 << 20}


LOADS: dict[str, Callable[[Path, Callable[[], None]], Load]] = {
    "sysbench_pg": _sysbench_pg,
    "sysbench_mariadb": _sysbench_mariadb,
    "pgbench": _pgbench,
    "sqlite": _sqlite,
    "small_files": _small_files,
    "dicom": _dicom,
    "encrypted": _encrypted,
}


def record(name: str) -> Path:
    """The trace of `name`, recorded now unless it is there."""
    CACHE.mkdir(parents=True, exist_ok=True)
    trace = CACHE / f"{name}.trace"
    if trace.exists():
        return trace
    part = CACHE / f"{name}.part"
    load_from: list[int] = []
    load = LOADS[name](part, lambda: load_from.append(time.time_ns() // 1000))
    about = {"name": name, "load_from_us": load_from[0], "load": load}
    trace.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    part.rename(trace)
    return trace


def main(names: list[str]) -> None:
    for name in LOADS if names == ["all"] else names:
        begun = time.monotonic()
        trace = record(name)
        took = time.monotonic() - begun
        print(f"{name}: {trace.stat().st_size / 1e6:.0f} MB in {took:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
