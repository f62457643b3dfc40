"""What a hospital writes, and the ledger of what it was told is safe.

The ledger lies in the demo's memory, outside of the protected volume. An entry is made after the
database's COMMIT, or a file's fsync, has returned. History must contain exactly that.
"""

from __future__ import annotations

import hashlib
import random
import sqlite3
from dataclasses import dataclass, field

SCHEMA = """
CREATE TABLE patients (id INTEGER PRIMARY KEY, name TEXT NOT NULL, ward TEXT NOT NULL);
CREATE TABLE orders (id INTEGER PRIMARY KEY, patient INTEGER NOT NULL REFERENCES patients,
                     drug TEXT NOT NULL, dose_mg INTEGER NOT NULL, note TEXT NOT NULL);
CREATE TABLE surgeries (id INTEGER PRIMARY KEY, patient INTEGER NOT NULL REFERENCES patients,
                        surgeon TEXT NOT NULL, report TEXT NOT NULL);
CREATE INDEX orders_by_patient ON orders (patient);
"""
TABLES = ("patients", "orders", "surgeries")
ACCIDENT = "DROP TABLE surgeries; DROP TABLE orders; DROP TABLE patients;"

_NAMES = ("Li Wei", "Wang Fang", "Zhang Min", "Liu Yang", "Chen Jing", "Zhao Lei", "Sun Li")
_WARDS = ("cardiology", "neurology", "surgery 1", "surgery 2", "intensive care")
_DRUGS = ("heparin", "cefazolin", "propofol", "fentanyl", "insulin", "metoprolol")
_WORDS = ("incision", "suture", "stable", "bleeding", "none", "drain", "closed", "count", "correct")


@dataclass(slots=True)
class Contents:
    """Everything that can be compared: row digests by table and id, file digests by name."""

    rows: dict[tuple[str, int], str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    #: What the database itself says: "ok", or what is broken.
    integrity: str = "ok"

    def missing_from(self, other: Contents) -> tuple[int, int]:
        """How many of our rows and files `other` lacks or has changed."""
        rows = sum(other.rows.get(key) != value for key, value in self.rows.items())
        files = sum(other.files.get(key) != value for key, value in self.files.items())
        return rows, files

    def copy(self) -> Contents:
        """A copy that later entries do not change."""
        return Contents(rows=dict(self.rows), files=dict(self.files), integrity=self.integrity)


class Ward:
    """Writes one transaction after another into a database and keeps the ledger."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - patients are no secret
        self.ledger = Contents()
        self.commits = 0
        self._ids = dict.fromkeys(TABLES, 0)

    def set_up(self, database: sqlite3.Connection) -> None:
        """Create the tables and some patients, in one transaction."""
        database.executescript(f"BEGIN; {SCHEMA} COMMIT;")
        pending = [
            self._row("patients", self._random.choice(_NAMES), self._random.choice(_WARDS))
            for _ in range(40)
        ]
        self._commit(database, pending)

    def transaction(self, database: sqlite3.Connection) -> None:
        """Some orders and, in every third transaction, an operation's report; then COMMIT."""
        chance = self._random
        patient = chance.randint(1, self._ids["patients"])
        pending = [
            self._row(
                "orders", patient, chance.choice(_DRUGS), chance.randint(1, 900), self._text(9)
            )
            for _ in range(chance.randint(1, 4))
        ]
        if self.commits % 3 == 0:
            pending.append(self._row("surgeries", patient, chance.choice(_NAMES), self._text(120)))
        self._commit(database, pending)

    def image(self, size: int) -> bytes:
        """Something like a DICOM file: preamble, magic, 12-bit noise in 16-bit words."""
        noise = self._random.getrandbits(size * 8).to_bytes(size, "little")
        pixels = bytearray(noise)
        pixels[1::2] = bytes(value & 0x0F for value in pixels[1::2])
        return bytes(128) + b"DICM" + bytes(pixels)

    def stored(self, name: str, content: bytes) -> None:
        """Note a file that is durable."""
        self.ledger.files[name] = digest(content)

    def _row(self, table: str, *values: object) -> tuple[str, tuple[object, ...]]:
        self._ids[table] += 1
        return table, (self._ids[table], *values)

    def _text(self, words: int) -> str:
        return " ".join(self._random.choices(_WORDS, k=words))

    def _commit(
        self, database: sqlite3.Connection, pending: list[tuple[str, tuple[object, ...]]]
    ) -> None:
        database.execute("BEGIN IMMEDIATE")
        for table, row in pending:
            marks = ",".join("?" * len(row))
            database.execute(f"INSERT INTO {table} VALUES ({marks})", row)  # noqa: S608
        database.execute("COMMIT")
        self.commits += 1
        for table, row in pending:
            self.ledger.rows[table, int(str(row[0]))] = digest_row(row)


def read_rows(database: sqlite3.Connection) -> Contents:
    """What a database holds, read back row by row, after its own integrity check."""
    found = Contents()
    try:
        found.integrity = str(database.execute("PRAGMA integrity_check").fetchone()[0])
        for table in TABLES:
            for row in database.execute(f"SELECT * FROM {table}"):  # noqa: S608 - our own names
                found.rows[table, row[0]] = digest_row(row)
    except sqlite3.Error as error:
        found.integrity = str(error)
    return found


def digest_row(row: tuple[object, ...]) -> str:
    """SHA-256 of a row's values."""
    return digest(repr(tuple(row)).encode())


def digest(content: bytes) -> str:
    """SHA-256, hex."""
    return hashlib.sha256(content).hexdigest()
