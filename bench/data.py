"""What the loads write: pages recorded from a real database, and random bytes.

The pages come out of PostgreSQL's data files and log after sysbench's OLTP mix ran on it; without
PostgreSQL or sysbench, out of SQLite after a similar mix. They are made once and kept.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import shutil
import sqlite3
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
_PAGE = 8192
_SEED = 20260101


@dataclass(frozen=True, slots=True)
class Pages:
    """A file of pages and where they come from."""

    path: Path
    source: str


def database_pages(cache: Path, size: int) -> Pages:
    """Up to `size` bytes of recorded pages in shuffled order, from the cache if they are there."""
    cache.mkdir(parents=True, exist_ok=True)
    for path in sorted(cache.glob("pages-*.bin")):
        if path.stat().st_size >= size // 2:
            return Pages(path, path.stem.removeprefix("pages-"))
    try:
        source, pages = "postgresql-sysbench", _from_postgresql(size)
    except (OSError, KeyError, subprocess.SubprocessError):
        source, pages = "sqlite", _from_sqlite(size)
    random.Random(_SEED).shuffle(pages)
    path = cache / f"pages-{source}.bin"
    part = path.with_suffix(".part")
    part.write_bytes(b"".join(pages[: size // _PAGE]))
    part.rename(path)
    return Pages(path, source)


def random_pages(cache: Path, size: int) -> Pages:
    """`size` random bytes, for the image that random reads find."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / "random.bin"
    if not path.exists() or path.stat().st_size < size:
        path.write_bytes(os.urandom(size))
    return Pages(path, "random")


def fill_image(path: Path, pages: Pages, size: int) -> None:
    """Write an image of `size` bytes full of `pages`, again and again."""
    with path.open("wb") as image:
        left = size
        while left > 0:
            with pages.path.open("rb") as file:
                while left > 0 and (chunk := file.read(min(left, 8 << 20))):
                    image.write(chunk)
                    left -= len(chunk)
        image.flush()
        os.fsync(image.fileno())


def _used_pages(path: Path) -> list[bytes]:
    """Pages of a file that hold something."""
    data = path.read_bytes()
    pages = [data[at : at + _PAGE] for at in range(0, len(data) - _PAGE + 1, _PAGE)]
    return [page for page in pages if any(page)]


def _run(*command: object, **options: Any) -> None:
    subprocess.run(
        [str(word) for word in command], check=True, capture_output=True, timeout=300, **options
    )


@contextlib.contextmanager
def _postgresql() -> Iterator[tuple[Path, Path]]:
    """A server of our own on a unix socket; yields its data directory and its socket's."""
    tools = _POSTGRES[-1] if _POSTGRES else Path("/nowhere")
    account: dict[str, Any] = {"cwd": "/"}
    with tempfile.TemporaryDirectory(prefix="ebb-bench-", dir="/var/tmp") as name:
        top = Path(name)
        if os.geteuid() == 0:
            postgres = pwd.getpwnam("postgres")
            account |= {"user": postgres.pw_uid, "group": postgres.pw_gid, "extra_groups": []}
            os.chown(top, postgres.pw_uid, postgres.pw_gid)
        data = top / "data"
        _run(tools / "initdb", "-D", data, "-A", "trust", "-U", "bench", **account)
        settings = f"-k {top} -c listen_addresses= -c shared_buffers=64MB -c fsync=off"
        control = (tools / "pg_ctl", "-D", data, "-w", "-l", top / "log")
        _run(*control, "-o", settings, "start", **account)
        try:
            yield data, top
        finally:
            _run(*control, "-m", "fast", "stop", **account)


def _from_postgresql(size: int) -> list[bytes]:
    if shutil.which("sysbench") is None:
        raise FileNotFoundError("sysbench")
    # About 250 bytes a row with its index.
    rows = max(10_000, size // 250 // 4)
    sysbench = (
        "sysbench", "oltp_read_write", "--db-driver=pgsql", "--pgsql-user=bench",
        "--pgsql-db=postgres", "--tables=4", f"--table-size={rows}", "--rand-type=uniform",
    )  # fmt: skip
    with _postgresql() as (data, socket):
        there = f"--pgsql-host={socket}"
        _run(*sysbench, there, "prepare")
        _run(*sysbench, there, "--time=8", "--threads=4", "run")
        _run(_POSTGRES[-1] / "psql", "-h", socket, "-U", "bench", "-c", "CHECKPOINT", "postgres")
        pages: list[bytes] = []
        # Tables and indexes, and the log for about a tenth.
        for path in sorted((data / "base").rglob("[0-9]*")):
            if path.is_file() and path.stat().st_size > 1 << 20:
                pages += _used_pages(path)
        for path in sorted((data / "pg_wal").glob("0*"))[-max(1, size // (160 << 20)) :]:
            pages += _used_pages(path)
    return pages


def _from_sqlite(size: int) -> list[bytes]:
    rng = random.Random(_SEED)
    digits = "0123456789"

    def words(length: int) -> str:
        return "-".join("".join(rng.choices(digits, k=11)) for _ in range(length // 12 + 1))

    with tempfile.TemporaryDirectory(prefix="ebb-bench-") as name:
        path = Path(name) / "his.db"
        database = sqlite3.connect(path)
        database.execute(f"PRAGMA page_size={_PAGE}")
        database.execute("CREATE TABLE lab (id INTEGER PRIMARY KEY, k INTEGER, c TEXT, pad TEXT)")
        database.execute("CREATE INDEX lab_k ON lab (k)")
        rows = size // 230
        insert = "INSERT INTO lab (k, c, pad) VALUES (?, ?, ?)"
        database.executemany(
            insert, ((rng.randrange(rows), words(120), words(60)) for _ in range(rows))
        )
        database.commit()
        for _ in range(rows // 10):
            change = (words(120), rng.randrange(rows))
            database.execute("UPDATE lab SET c = ? WHERE id = ?", change)
        database.commit()
        database.close()
        return _used_pages(path)
