"""The checks of `ebb doctor` that need no agent. Each returns findings; none raises or prints."""

from __future__ import annotations

import ctypes
import errno
import importlib.metadata
import os
import platform
import resource
import socket
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from ebbtide.config import split_address
from ebbtide.errors import EbbError
from ebbtide.rpc import replication_pb2
from ebbtide.rpc.replication_pb2_grpc import ReplicationStub
from ebbtide.security.keys import MasterKey
from ebbtide.security.peers import load_peers
from ebbtide.security.tls import client_credentials, client_options
from ebbtide.times import US_PER_S, format_duration, now_us
from ebbtide.units import format_size

if TYPE_CHECKING:
    from ebbtide.config import Config
    from ebbtide.security.identity import Identity
    from ebbtide.security.peers import Peer

#: Oldest kernel that we have run on; older ones may do.
KERNEL_MIN = (5, 10)
#: Queue, cache and frames of one tap: what is locked in memory.
MEMLOCK_MIN = 512 << 20
#: Segments, runs, connections of one agent.
FILES_MIN = 4096
#: Days before a certificate's end from which doctor warns.
EXPIRY_WARN_DAYS = 60
#: Clocks further apart than this confuse whoever compares times of two hosts.
CLOCK_WARN_S = 0.5
FREE_FAIL = 1 << 30


class Grade(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check; `check` is a stable word."""

    check: str
    subject: str
    grade: Grade
    message: str
    hint: str = ""

    def as_dict(self) -> dict[str, str]:
        """For `--json`."""
        return asdict(self)


def of_host(root: Path = Path("/")) -> list[Finding]:
    """Kernel, limits, clock and versions of this host. `root` is replaced by tests."""
    return [*_versions(), _kernel(), *_devices(root), _memlock(), _files(), _clock()]


def _versions() -> list[Finding]:
    try:
        version = importlib.metadata.version("ebbtide")
    except importlib.metadata.PackageNotFoundError:
        hint = "install the package: make build"
        return [Finding("version", "ebbtide", Grade.FAIL, "is not installed", hint)]
    found = [
        Finding("version", "ebbtide", Grade.OK, f"{version}, Python {platform.python_version()}")
    ]
    try:
        from ebbtide import _native

        native = _native.VERSION
    except ImportError as error:
        hint = "build it with 'make build'"
        return [*found, Finding("native", "_native", Grade.FAIL, f"does not load: {error}", hint)]
    if native != version:
        hint = "build the native module again: make build"
        return [*found, Finding("native", "_native", Grade.FAIL, f"is version {native}", hint)]
    return [*found, Finding("native", "_native", Grade.OK, native)]


def _kernel() -> Finding:
    release = platform.release()
    parts = release.split(".")
    try:
        number = (int(parts[0]), int(parts[1].split("-")[0]))
    except (ValueError, IndexError):
        return Finding("kernel", release, Grade.WARN, "is a version we cannot read")
    if number < KERNEL_MIN:
        return Finding("kernel", release, Grade.WARN, "is older than 5.10", "use a newer kernel")
    return Finding("kernel", release, Grade.OK, platform.machine())


def _devices(root: Path) -> list[Finding]:
    """What can make block devices. NBD over a socket needs none of it."""
    found, ways = [], 0
    fuse, loop = root / "dev/fuse", root / "dev/loop-control"
    for check, path, purpose in (
        ("fuse", fuse, "'attach' by FUSE and loop"),
        ("loop", loop, "'attach' by FUSE and loop"),
        ("nbd", root / "sys/module/nbd", "'attach' by the kernel's NBD client"),
        ("ublk", root / "dev/ublk-control", "'attach' by ublk (later versions)"),
    ):
        there = path.exists()
        usable = there and (check == "nbd" or os.access(path, os.R_OK | os.W_OK))
        state = "is there" if usable else ("needs root" if there else "is not in this kernel")
        grade = Grade.OK if usable or check in ("nbd", "ublk") else Grade.WARN
        hint = f"only needed for {purpose}; 'modprobe {check}' may load it"
        found.append(Finding(check, str(path), grade, state, hint))
        ways += usable and check in ("fuse", "nbd")
    if not ways:
        hint = "volumes and views are still served over NBD sockets"
        found.append(Finding("attach", "", Grade.WARN, "no block device can be made here", hint))
    return found


def _memlock() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    subject = "RLIMIT_MEMLOCK"
    if os.geteuid() == 0 or soft == resource.RLIM_INFINITY:
        return Finding("memory-lock", subject, Grade.OK, "unlimited")
    if soft < MEMLOCK_MIN:
        hint = "set LimitMEMLOCK=infinity for the agent, or under memory pressure writes can stall"
        return Finding("memory-lock", subject, Grade.WARN, f"is {format_size(soft)}", hint)
    return Finding("memory-lock", subject, Grade.OK, format_size(soft))


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < FILES_MIN:
        hint = f"set LimitNOFILE={FILES_MIN} or more for the agent"
        return Finding("open-files", "RLIMIT_NOFILE", Grade.WARN, f"is {hard}", hint)
    return Finding("open-files", "RLIMIT_NOFILE", Grade.OK, f"{soft}, up to {hard}")


def _clock() -> Finding:
    """adjtimex(2) says whether anything keeps the clock in step; it needs no privilege to ask."""

    class Timex(ctypes.Structure):
        """struct timex of Linux, as far as we read it, padded to its 208 bytes and beyond."""

        _fields_ = (
            ("modes", ctypes.c_uint),
            ("offset", ctypes.c_long),
            ("freq", ctypes.c_long),
            ("maxerror", ctypes.c_long),
            ("esterror", ctypes.c_long),
            ("status", ctypes.c_int),
            ("rest", ctypes.c_char * 256),
        )

    timex = Timex()
    unsynchronized = 0x40  # STA_UNSYNC
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex))
    except (OSError, AttributeError):
        state = -1
    hint = "run chrony or systemd-timesyncd: points in time are only as right as the clock"
    if state < 0:
        return Finding("clock", "adjtimex", Grade.WARN, "cannot be asked", hint)
    if timex.status & unsynchronized:
        return Finding("clock", "system", Grade.WARN, "is not synchronised", hint)
    error_s = timex.maxerror / US_PER_S
    return Finding("clock", "system", Grade.OK, f"synchronised within {format_duration(error_s)}")


def of_config(config: Config, *, agent_runs: bool) -> list[Finding]:
    """Identity, disks and port that `agent.toml` names."""
    found = [*_identity(config), *_master_key(config)]
    found += _directory("state", config.agent.state_dir, 0)
    found += _directory("spool", config.source.spool_dir, config.source.spool_bytes_max)
    found += _directory("journal", config.target.journal_dir, config.target.journal_free_min)
    if config.agent.listen:
        found.append(_port(config.agent.listen, agent_runs=agent_runs))
    return found


def _identity(config: Config) -> list[Finding]:
    try:
        identity, peers = load_peers(config)
    except EbbError as error:
        return [Finding("certificate", "identity", Grade.FAIL, error.message, error.hint)]
    own = [(config.agent.name, identity.certificate)]
    own += [(peer.name, peer.certificate) for peer in peers]
    found = []
    for name, certificate in own:
        days = (certificate.not_after - datetime.now(UTC)).days
        early = certificate.not_before > datetime.now(UTC)
        if days < 0 or early:
            grade, text = Grade.FAIL, f"valid {certificate.not_before} .. {certificate.not_after}"
        elif days < EXPIRY_WARN_DAYS:
            grade, text = Grade.WARN, f"ends in {days} days"
        else:
            grade, text = Grade.OK, f"{certificate.fingerprint[:16]}, valid for {days} days"
        hint = "check the clock; make a new identity with 'ebb init' and pin it at the peers"
        found.append(Finding("certificate", name, grade, text, hint))
    return found


def _master_key(config: Config) -> list[Finding]:
    subject = str(config.identity.master_key)
    try:
        key = MasterKey.load(config.identity.master_key)
    except EbbError as error:
        return [Finding("master-key", subject, Grade.FAIL, error.message, error.hint)]
    return [Finding("master-key", subject, Grade.OK, f"id {key.id}")]


def _directory(check: str, path: Path, wanted: int) -> list[Finding]:
    """A directory exists, is writable, lasts, has room, and is not behind our own devices."""
    if not path.is_dir():
        hint = "run 'ebb init', or create it with mode 700"
        return [Finding(check, str(path), Grade.FAIL, "does not exist", hint)]
    if not os.access(path, os.W_OK):
        hint = "run as the agent's user or as root"
        return [Finding(check, str(path), Grade.FAIL, "is not writable for us", hint)]
    found = []
    kind, source = mount_of(path)
    if kind in ("tmpfs", "ramfs", "overlay"):
        hint = "put it on a disk: what lies there is lost with the next start"
        found.append(Finding(check, str(path), Grade.WARN, f"lies on {kind}", hint))
    elif kind.startswith(("nfs", "cifs", "smb", "fuse")) and not kind.startswith("fuseblk"):
        hint = "use a local disk: locks and fsync are not what they seem there"
        found.append(Finding(check, str(path), Grade.WARN, f"lies on {kind}", hint))
    if behind := own_device(source):
        hint = "move it to another disk: it would record its own writes for ever"
        text = f"lies on {source}, which is a protected volume or a view ({behind})"
        found.append(Finding(check, str(path), Grade.FAIL, text, hint))
    space = os.statvfs(path)
    free = space.f_bavail * space.f_frsize
    text = f"{format_size(free)} free on {source} ({kind})"
    if free < FREE_FAIL:
        hint = "make room: history stops when the disk is full"
        found.append(Finding(check, str(path), Grade.FAIL, text, hint))
    elif free < wanted:
        hint = f"the configuration counts on {format_size(wanted)}"
        found.append(Finding(check, str(path), Grade.WARN, text, hint))
    else:
        found.append(Finding(check, str(path), Grade.OK, text))
    return found


def mount_of(path: Path, table: str | None = None) -> tuple[str, str]:
    """Type and source of the file system that holds `path`, by /proc/self/mountinfo."""
    text = Path("/proc/self/mountinfo").read_text() if table is None else table
    real = os.path.realpath(path)
    best, found = "", ("unknown", "unknown")
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, tail = left.split(), right.split()
        if len(fields) < 5 or len(tail) < 2:
            continue
        point = fields[4].encode().decode("unicode_escape")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, found = point, (tail[0], tail[1])
    return found


def own_device(source: str, sys_block: Path = Path("/sys/class/block")) -> str:
    """The file of ours behind a block device (a loop device over our FUSE mount), or ''.

    Follows partitions, device-mapper and md downwards.
    """
    todo, seen = [os.path.basename(os.path.realpath(source))], set()  # noqa: PTH119
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        entry = sys_block / name
        backing = entry / "loop/backing_file"
        if backing.exists():
            file = Path(backing.read_text().strip())
            kind, origin = mount_of(file)
            if kind.startswith("fuse") and "ebb" in f"{kind} {origin}":
                return str(file)
            todo.append(os.path.basename(os.path.realpath(origin)))  # noqa: PTH119
        if (entry / "slaves").is_dir():
            todo += [slave.name for slave in (entry / "slaves").iterdir()]
        if (entry / "partition").exists():
            todo.append(entry.resolve().parent.name)
    return ""


def _port(listen: str, *, agent_runs: bool) -> Finding:
    host, port = split_address(listen)
    if agent_runs:
        return Finding("port", listen, Grade.OK, "the agent is running")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        hint = f"see 'ss -ltnp sport = :{port}'" if taken else "check [agent] listen"
        return Finding("port", listen, Grade.FAIL, os.strerror(error.errno or 0).lower(), hint)
    return Finding("port", listen, Grade.OK, "is free")


def of_peers(config: Config) -> list[Finding]:
    """Each peer answers, shows the pinned certificate, accepts ours, and has a similar clock."""
    try:
        identity, peers = load_peers(config)
    except EbbError:
        return []
    return [_peer(identity, peer) for peer in peers if peer.address]


def _peer(identity: Identity, peer: Peer) -> Finding:
    host, port = split_address(peer.address)
    subject = f"{peer.name} {peer.address}"
    try:
        socket.create_connection((host, port), timeout=3.0).close()
    except OSError as error:
        hint = "is its agent running, is the address right, does a firewall stand between?"
        return Finding("peer", subject, Grade.WARN, f"does not answer: {error}", hint)
    credentials = client_credentials(identity, peer)
    with grpc.secure_channel(peer.address, credentials, client_options()) as channel:
        try:
            sent = now_us()
            started = time.monotonic()
            answer = ReplicationStub(channel).Ping(
                replication_pb2.PingRequest(sent_us=sent), timeout=5.0
            )
        except grpc.RpcError:
            hint = "both sides must hold the other's identity/agent.crt as it is now"
            return Finding("peer", subject, Grade.FAIL, "answers, but not with TLS to us", hint)
    round_trip_s = time.monotonic() - started
    apart_s = abs(answer.received_us - sent - round_trip_s * US_PER_S / 2) / US_PER_S
    text = f"round trip {format_duration(round_trip_s)}, clocks {format_duration(apart_s)} apart"
    if apart_s > CLOCK_WARN_S + round_trip_s:
        return Finding("peer", subject, Grade.WARN, text, "synchronise the clocks of both hosts")
    return Finding("peer", subject, Grade.OK, text)
