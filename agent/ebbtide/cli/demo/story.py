"""The demo's story: protect, work, accident, search, rewind, proof."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from ebbtide.cli.client import WORK_S, Client
from ebbtide.cli.demo.clinics import Clinic, MountedClinic, SocketClinic
from ebbtide.cli.demo.hosts import Hosts
from ebbtide.cli.demo.records import Contents
from ebbtide.cli.demo.search import Culprit, first_bad, recorded_writes
from ebbtide.cli.output import plural
from ebbtide.errors import DamagedError, EbbError, UnreachableError
from ebbtide.rpc import agent_pb2
from ebbtide.times import US_PER_S, format_duration, format_time, now_us
from ebbtide.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ebbtide.cli.output import Output

GROUP = "his"
VOLUME = "data"
VOLUME_BYTES = 256 << 20
BOOKMARK = "after the first half"
#: A busy ward's pace: what is measured is the lag of a host that has work, not of one that drowns.
TRANSACTIONS_PER_S = 400
#: Longest wait for the target to have everything.
DRAIN_S = 30.0


@dataclass(slots=True)
class Numbers:
    """What `--json` prints, in the order of the story."""

    values: dict[str, Any] = field(default_factory=dict)

    def add(self, **values: Any) -> None:
        """Note numbers."""
        self.values.update(values)


class LagMeter:
    """Samples how far the target is behind, ten times a second, on a thread of its own."""

    def __init__(self, hosts: Hosts) -> None:
        self.samples_us: list[int] = []
        self._client = Client.over_socket(hosts.source.root / "agent.sock")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="lag-meter", daemon=True)

    def __enter__(self) -> LagMeter:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(5.0)
        self._client.close()

    def _sample(self) -> None:
        while not self._stop.wait(0.1):
            with contextlib.suppress(EbbError):
                self.samples_us.append(source_group(self._client).shipping.lag_us)


class Story:
    """Tells and measures one run."""

    def __init__(self, out: Output, *, work_s: float, use_socket: bool) -> None:
        self.out = out
        self.numbers = Numbers()
        self._work_s = work_s
        self._use_socket = use_socket
        self._started = time.monotonic()
        self._opened_us: list[int] = []
        self._at_bookmark = Contents()

    def run(self) -> None:
        """The whole story. Raises `EbbError` if any part of it is not as promised."""
        self._say("two agents on this machine: 'hospital' and 'refuge'; sockets, TLS 1.3, SM4-GCM")
        with Hosts() as hosts:
            clinic: Clinic = (SocketClinic if self._use_socket else MountedClinic)(hosts, GROUP)
            try:
                self._protect(hosts, clinic)
                self._work(hosts, clinic)
                begun_us, ended_us = self._accident(hosts, clinic)
                culprit = self._search(hosts, clinic, begun_us, ended_us)
                self._prove(hosts, clinic, culprit)
                self._measure(hosts)
            finally:
                with contextlib.suppress(EbbError):
                    clinic.close()
            self._say("taking everything down")
        took_s = time.monotonic() - self._started
        self.numbers.add(took_s=round(took_s, 2), proven=True)
        self._say(f"[bold green]done[/] in {format_duration(took_s)}; nothing is left behind")

    def _protect(self, hosts: Hosts, clinic: Clinic) -> None:
        request = agent_pb2.ProtectRequest(
            name=GROUP,
            target_peer=hosts.target.name,
            suite=1,
        )
        request.volumes.add(
            name=VOLUME, backing=str(hosts.root / "his.img"), create_bytes=VOLUME_BYTES
        )
        group = hosts.source.client.call("Protect", request, timeout_s=WORK_S)
        self._say(
            f"protected volume '{VOLUME}' of group '{GROUP}', {format_size(VOLUME_BYTES)}; "
            f"history goes to 'refuge'"
        )
        clinic.set_up(group.volumes[0].nbd_uri)
        self._say(f"on it: {clinic.layout}")
        self.numbers.add(layout=clinic.layout, volume_bytes=VOLUME_BYTES, suite="sm4-gcm")

    def _work(self, hosts: Hosts, clinic: Clinic) -> None:
        self._say(
            f"the hospital works for {format_duration(self._work_s)}, up to {TRANSACTIONS_PER_S} "
            "transactions a second ..."
        )
        begun = time.monotonic()
        marked = False
        with LagMeter(hosts) as meter:
            while (spent := time.monotonic() - begun) < self._work_s:
                clinic.work()
                time.sleep(
                    max(0.0, begun + clinic.transactions / TRANSACTIONS_PER_S - time.monotonic())
                )
                if not marked and spent > self._work_s / 2:
                    request = agent_pb2.PlaceBookmarkRequest(group=GROUP, label=BOOKMARK)
                    hosts.source.client.call("Bookmark", request)
                    self._at_bookmark, marked = clinic.ward.ledger.copy(), True
        ledger = clinic.ward.ledger
        group = source_group(hosts.source.client)
        lag_us = sorted(meter.samples_us) or [0]
        self.numbers.add(
            work_s=round(spent, 2),
            transactions=clinic.transactions,
            rows=len(ledger.rows),
            files=len(ledger.files),
            lag_p50_us=int(median(lag_us)),
            lag_max_us=lag_us[-1],
            ack_p50_us=group.shipping.ack_p50_us,
            ack_p99_us=group.shipping.ack_p99_us,
        )
        self._say(
            f"{plural(clinic.transactions, 'transaction')} committed "
            f"({plural(len(ledger.rows), 'row')}), {plural(len(ledger.files), 'image')} stored; "
            f"each is in a ledger kept elsewhere"
        )
        self._say(
            f"refuge was behind by {_us(int(median(lag_us)))} (median) and at most "
            f"{_us(lag_us[-1])}; write answered to durable there: "
            f"{_us(group.shipping.ack_p50_us)}, p99 {_us(group.shipping.ack_p99_us)}"
        )

    def _accident(self, hosts: Hosts, clinic: Clinic) -> tuple[int, int]:
        begun_us = now_us()
        clinic.accident()
        ended_us = now_us()
        clinic.close()
        self._say(
            f"[bold red]accident[/] about {format_time(begun_us)}: tables dropped, every image "
            f"overwritten, and all of it replicated"
        )
        self._drain(hosts)
        return begun_us, ended_us

    def _drain(self, hosts: Hosts) -> None:
        """Wait until everything recorded is durable at the target."""
        wanted = source_group(hosts.source.client).tap.last_seq
        deadline = time.monotonic() + DRAIN_S
        while source_group(hosts.source.client).shipping.durable_seq < wanted:
            if time.monotonic() > deadline:
                raise UnreachableError(
                    f"refuge does not have write {wanted} within {DRAIN_S:.0f} s", code="timeout"
                )
            time.sleep(0.02)

    def _search(self, hosts: Hosts, clinic: Clinic, begun_us: int, ended_us: int) -> Culprit:
        """Bisect the writes around the accident until the exact one is known."""
        client = hosts.target.client
        records = recorded_writes(client, GROUP, begun_us - US_PER_S, ended_us + US_PER_S)
        before = [record for record in records if record.time_us < begun_us]
        records = before[-1:] + [record for record in records if record.time_us >= begun_us]
        ledger = clinic.ward.ledger

        def is_whole(record: agent_pb2.HistoryRecord) -> bool:
            point = agent_pb2.PointSpec(at_seq=record.seq)
            with self._view(hosts, point) as view:
                return clinic.read(view) == ledger

        culprit = first_bad(records, is_whole)
        self._say(
            f"searched {plural(culprit.candidates, 'recorded write')} with "
            f"{plural(culprit.tried, 'view')}: the first bad one is write {culprit.seq:,}, "
            f"{format_size(culprit.length)} at {format_size(culprit.offset)} of '{culprit.volume}'"
        )
        self._say(f"  at [bold]{format_time(culprit.time_us)}[/]")
        self.numbers.add(
            searched_writes=culprit.candidates,
            searched_views=culprit.tried,
            culprit_seq=culprit.seq,
            culprit_time_us=culprit.time_us,
            culprit_offset=culprit.offset,
            culprit_length=culprit.length,
        )
        return culprit

    def _prove(self, hosts: Hosts, clinic: Clinic, culprit: Culprit) -> None:
        """Open three points, read all of each back and compare it with the ledger."""
        ledger = clinic.ward.ledger
        rewound = agent_pb2.PointSpec(at_time_us=culprit.time_us - 1)
        found = self._read(hosts, clinic, rewound)
        _demand_equal(found, ledger, "one microsecond before the accident")
        self._say(
            f"[bold green]one microsecond before it[/]: {plural(len(found.rows), 'row')} and "
            f"{plural(len(found.files), 'image')} read back, all equal to the ledger"
        )
        marked = self._read(hosts, clinic, agent_pb2.PointSpec(bookmark=BOOKMARK))
        _demand_equal(marked, self._at_bookmark, f"bookmark '{BOOKMARK}'")
        self._say(
            f"[bold green]bookmark '{BOOKMARK}'[/]: {plural(len(marked.rows), 'row')} and "
            f"{plural(len(marked.files), 'image')}, all equal to the ledger as it was then"
        )
        newest = self._read(hosts, clinic, agent_pb2.PointSpec())
        rows, files = ledger.missing_from(newest)
        self._say(
            f"newest point, as any replica would have it: {plural(rows, 'row')} and "
            f"{plural(files, 'image')} of the ledger are lost"
        )
        if not rows or rows != len(ledger.rows) or files != len(ledger.files):
            raise DamagedError("the newest point does not show the accident")
        self.numbers.add(
            proven_rows=len(found.rows),
            proven_files=len(found.files),
            bookmark_rows=len(marked.rows),
            lost_rows_at_newest=rows,
            lost_files_at_newest=files,
        )

    def _read(self, hosts: Hosts, clinic: Clinic, point: agent_pb2.PointSpec) -> Contents:
        with self._view(hosts, point) as view:
            return clinic.read(view)

    @contextlib.contextmanager
    def _view(self, hosts: Hosts, point: agent_pb2.PointSpec) -> Iterator[agent_pb2.View]:
        """A writable view: its overlay takes what ext4's journal replay and SQLite's recovery
        write, history stays as it is."""
        client = hosts.target.client
        request = agent_pb2.OpenViewRequest(group=GROUP, point=point, writable=True)
        begun = time.monotonic()
        view = client.call("OpenView", request, timeout_s=WORK_S)
        self._opened_us.append(round((time.monotonic() - begun) * US_PER_S))
        try:
            yield view
        finally:
            client.call(
                "CloseView", agent_pb2.CloseViewRequest(view=view.id, force=True), timeout_s=WORK_S
            )

    def _measure(self, hosts: Hosts) -> None:
        group = source_group(hosts.source.client)
        points = hosts.target.client.call("Points", agent_pb2.PointsRequest(group=GROUP))
        span_us = points.newest.time_us - points.horizon.time_us
        opened_us = sorted(self._opened_us)
        self.numbers.add(
            writes=group.tap.writes,
            write_bytes=group.tap.write_bytes,
            flushes=group.tap.flushes,
            shipped_bytes=group.shipping.shipped_bytes,
            points=points.record_count,
            span_us=span_us,
            journal_bytes=points.log_bytes,
            views_opened=len(opened_us),
            open_p50_us=int(median(opened_us)),
            open_max_us=opened_us[-1],
        )
        tap, shipped = group.tap, group.shipping.shipped_bytes
        share = 100.0 * shipped / max(1, tap.write_bytes)
        spanned = format_duration(span_us / US_PER_S)
        self.out.say(
            "",
            f"  written   {plural(tap.writes, 'write')}, {format_size(tap.write_bytes)}, "
            f"{plural(tap.flushes, 'flush', 'es')}",
            f"  shipped   {format_size(shipped)}, {share:.0f} % of what was written; sealed once, "
            "stored as sent",
            f"  points    {points.record_count:,} in {spanned}: every write, to the microsecond",
            f"  to open   {_us(int(median(opened_us)))} median, {_us(opened_us[-1])} at most, of "
            f"{plural(len(opened_us), 'view')}",
            "",
        )

    def _say(self, text: str) -> None:
        self.out.say(f"[dim]{time.monotonic() - self._started:5.1f} s[/]  {text}")


def source_group(client: Client) -> agent_pb2.SourceGroup:
    """The demo's group as its source sees it."""
    status = client.call("Status", agent_pb2.AgentStatusRequest(group=GROUP))
    group: agent_pb2.SourceGroup = status.sources[0]
    return group


def _demand_equal(found: Contents, wanted: Contents, where: str) -> None:
    if found == wanted:
        return
    rows, files = wanted.missing_from(found)
    more = len(found.rows) + len(found.files) - len(wanted.rows) - len(wanted.files) + rows + files
    raise DamagedError(
        f"{where}: {rows} rows and {files} files are missing or changed, {more} are too many; "
        f"integrity check: {found.integrity}",
        hint="this must not happen: please report it with the output of 'ebb demo --json'",
    )


def _us(value: int) -> str:
    return format_duration(value / US_PER_S)
