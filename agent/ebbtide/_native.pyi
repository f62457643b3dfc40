"""The native part. Calls release the GIL while they may take more than about 10 us."""

from typing import final

__all__ = [
    "VERSION",
    "Batch",
    "FuseDescriptor",
    "Gcm",
    "History",
    "HistoryView",
    "Indexer",
    "Journal",
    "LogEnd",
    "LogReader",
    "NativeError",
    "PanicException",
    "Restore",
    "Sm4Cbc",
    "Sm4Ctr",
    "Sm4Xts",
    "SyncHandle",
    "Text",
    "Timeline",
    "forbid_core_files",
    "holder_main",
    "loop_attach",
    "loop_detach",
    "sm4_kernel",
    "sm4_kernels",
    "tap_main",
    "view_main",
]

VERSION: str

class NativeError(Exception):
    """A failure: args are (code, message, hint, kind); kind is the exit code."""

    args: tuple[str, str, str, int]

class PanicException(BaseException):
    """A defect of native code; the object it came from is not used any more."""

@final
class LogEnd:
    """State of the newest end of a log; immutable."""

    @staticmethod
    def from_proto(message: bytes) -> LogEnd: ...
    def to_proto(self) -> bytes: ...
    @property
    def incarnation(self) -> bytes | None: ...
    @property
    def ordinal(self) -> int: ...
    @property
    def next_frame(self) -> int: ...
    #: Ordinal and first frame of the segment that grows; None if none does.
    @property
    def open_segment(self) -> tuple[int, int] | None: ...
    @property
    def last_digest(self) -> bytes: ...
    @property
    def last_seq(self) -> int: ...
    @property
    def last_time_us(self) -> int: ...
    @property
    def committed_len(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...

@final
class Journal:
    """The history that a target keeps of a group. One writer; safe to use from several threads."""

    def __new__(cls, directory: str, group: bytes) -> Journal: ...
    @property
    def notices(self) -> list[str]: ...
    def promise(self, counter: int, site: int) -> None: ...
    def begin(self, header: bytes) -> None: ...
    def append(self, message: bytes, skip: int = 0) -> LogEnd: ...
    def sync_handle(self) -> SyncHandle: ...
    def end(self) -> LogEnd: ...
    def manifest_json(self) -> str: ...
    def close(self) -> None: ...

@final
class SyncHandle:
    """Makes durable what was appended before it was made."""

    @property
    def end(self) -> LogEnd: ...
    def sync(self) -> None: ...

@final
class Indexer:
    """Keeps the index runs of a log that another process writes."""

    def __new__(cls, directory: str, group: bytes) -> Indexer: ...
    def index_sealed(self) -> int: ...
    def stop(self) -> None: ...

@final
class Batch:
    """Frames read in one go, ready for the wire."""

    @property
    def announcement(self) -> bytes | None: ...
    @property
    def message(self) -> bytes: ...
    @property
    def incarnation(self) -> bytes: ...
    @property
    def first_frame(self) -> int: ...
    @property
    def last_frame(self) -> int: ...
    @property
    def first_time_us(self) -> int: ...
    @property
    def last_time_us(self) -> int: ...
    @property
    def last_seq(self) -> int: ...
    @property
    def frame_count(self) -> int: ...

@final
class LogReader:
    """Reads a log that another process may be writing; `verify`: checks body digests, too."""

    def __new__(cls, directory: str, group: bytes, *, verify: bool = True) -> LogReader: ...
    def seek(self, to: tuple[bytes, int] | None = None) -> None: ...
    def agrees(self, at: tuple[bytes, int], digest: bytes, end: LogEnd) -> bool: ...
    def next_batch(self, end: LogEnd, max_bytes: int) -> Batch | None: ...

@final
class Timeline:
    """What a history has to offer. A point is (seq, time_us)."""

    @property
    def oldest(self) -> tuple[int, int] | None: ...
    @property
    def newest(self) -> tuple[int, int] | None: ...
    @property
    def last_record(self) -> tuple[int, int] | None: ...
    #: seq, time, label, whether it can be opened itself.
    @property
    def bookmarks(self) -> list[tuple[int, int, str, bool]]: ...
    #: seq, first time, end time, bytes, cause.
    @property
    def gaps(self) -> list[tuple[int, int, int, int, str]]: ...
    #: First point, last point or None while it is open, cause.
    @property
    def spans(self) -> list[tuple[tuple[int, int], tuple[int, int] | None, str]]: ...
    #: index, name, bytes.
    @property
    def volumes(self) -> list[tuple[int, str, int]]: ...
    @property
    def records(self) -> int: ...
    @property
    def log_bytes(self) -> int: ...

@final
class History:
    """The readable history of a group, up to a committed end."""

    def __new__(cls, directory: str, group: bytes, end: LogEnd | None = None) -> History: ...
    def timeline(self) -> Timeline: ...
    def records(
        self, from_us: int, to_us: int, volume: int | None, limit: int
    ) -> list[tuple[int, int, str, int | None, int, int, str]]:
        """seq, time, kind, volume, offset, length, label; oldest first."""

@final
class HistoryView:
    """All volumes of a group at one point, read-only, in this process."""

    def __new__(
        cls,
        history: History,
        key: bytes,
        kind: str,
        value: int | str | None,
        exact: bool,
        cache_bytes: int,
    ) -> HistoryView: ...
    @property
    def seq(self) -> int: ...
    @property
    def time_us(self) -> int: ...
    @property
    def volumes(self) -> list[tuple[int, str, int]]: ...

@final
class Restore:
    """Writes one volume of a view into a file or device; blocks already right are left alone."""

    def __new__(cls, view: HistoryView, volume: int, path: str) -> Restore: ...
    def run(self) -> None: ...
    def cancel(self) -> None: ...
    @property
    def bytes_done(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...

@final
class Text:
    """Bytes that ciphers change in place, where Python cannot touch them meanwhile."""

    def __new__(cls, data: bytes) -> Text: ...
    def __len__(self) -> int: ...
    def __bytes__(self) -> bytes: ...

@final
class Gcm:
    """GCM with a key of a suite; for tests and benchmarks, as all ciphers here."""

    def __new__(cls, suite: int, key: bytes, kernel: str | None = None) -> Gcm: ...
    def seal(self, nonce: bytes, aad: bytes, text: Text) -> bytes:
        """Encrypt in place; returns the tag."""

    def open(self, nonce: bytes, aad: bytes, text: Text, tag: bytes) -> None:
        """Decrypt in place; the text is lost if the tag is wrong."""

@final
class Sm4Ctr:
    """SM4-CTR; calls go on where the last one ended."""

    def __new__(cls, key: bytes, counter: bytes, kernel: str | None = None) -> Sm4Ctr: ...
    def apply(self, text: Text) -> None: ...

@final
class Sm4Cbc:
    """SM4-CBC on whole blocks; calls go on where the last one ended."""

    def __new__(cls, key: bytes, iv: bytes, kernel: str | None = None) -> Sm4Cbc: ...
    def encrypt(self, text: Text) -> None: ...
    def decrypt(self, text: Text) -> None: ...

@final
class Sm4Xts:
    """SM4-XTS; `standard` is "gb" (GB/T 17964-2021) or "ieee" (IEEE 1619)."""

    def __new__(cls, standard: str, key: bytes, kernel: str | None = None) -> Sm4Xts: ...
    def encrypt(self, tweak: bytes, text: Text) -> None: ...
    def decrypt(self, tweak: bytes, text: Text) -> None: ...
    def encrypt_units(self, first: int, unit_len: int, text: Text) -> None:
        """Encrypt consecutive units; a unit's tweak is its number, little-endian."""

    def decrypt_units(self, first: int, unit_len: int, text: Text) -> None: ...

def sm4_kernel() -> str:
    """Name of the SM4 kernel that this process uses; EBB_SM4_KERNEL may name it."""

def sm4_kernels() -> list[str]:
    """Names of the SM4 kernels that this processor can run, the best first."""

def tap_main(launch: bytes) -> int:
    """Be a tap server until it ends; returns the exit code."""

def view_main(launch: bytes) -> int:
    """Be a view server until it ends; returns the exit code."""

def holder_main(launch: bytes) -> int:
    """Be a holder until it ends; returns the exit code."""

def forbid_core_files() -> None:
    """Keep keys out of core files and away from debuggers of the same user, until the next exec."""

@final
class FuseDescriptor:
    """A duplicate of a mount's /dev/fuse descriptor, closed with the object.

    Kept, never read: the mount outlives the death of its server and its holder at once.
    """

    @staticmethod
    def copy_from(holder_socket: str) -> FuseDescriptor:
        """Ask a holder for a duplicate."""

    def give_to(self, holder_socket: str) -> None:
        """Offer it to a holder, which takes it if it has none."""

def loop_attach(file: str, read_only: bool) -> str:
    """Path of a loop device over a file, direct I/O on both."""

def loop_detach(device: str) -> None:
    """Give a loop device back."""
