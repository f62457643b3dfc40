"""Suite `capture`: what protection costs the application, and how far history lags behind.

Every case runs on images of equal content: ours protected and shipping to a second agent (an image
for each cipher), the peers' bare. Target and agents run at idle priority. Reads and writes of the
rows that end in `_random` are fio's, the others' data are recorded database pages.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import struct
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench import data, disk, grpc_rate
from bench.durable import DurableWatch
from bench.errors import NOT_MEASURED, UnavailableError, reason_of
from bench.load import Case, Outcome, fio, generator
from bench.peers import serving
from bench.product import AES_256_GCM, SUITES, Product, Suite
from bench.rows import Row, measured, missing, ratio
from bench.turns import take_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PEERS = ("nbdkit", "qemu-nbd")
LAG_WRITES_PER_S = 5000
#: A disk by the file hierarchy standard, where /tmp may be memory.
WORK = "/var/tmp"  # noqa: S108


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is done; the short form is for a quick look, not for quoting."""

    runs: int
    seconds: float
    image: int
    bytes_max: int
    pages: int
    copy: int
    records: int
    lag_seconds: float


FULL = Scale(
    runs=5,
    seconds=2.0,
    image=1 << 30,
    bytes_max=1 << 30,
    pages=256 << 20,
    copy=2 << 30,
    records=1_000_000,
    lag_seconds=6.0,
)
QUICK = Scale(
    runs=2,
    seconds=0.5,
    image=256 << 20,
    bytes_max=64 << 20,
    pages=64 << 20,
    copy=256 << 20,
    records=50_000,
    lag_seconds=2.0,
)


@dataclass(frozen=True, slots=True)
class Bench:
    """Where the suite works and how much it does."""

    scale: Scale
    cache: Path
    work: Path

    def cases(self) -> list[Case]:
        base = Case(
            name="",
            rw="",
            block=4096,
            depth=1,
            seconds=self.scale.seconds,
            bytes_max=self.scale.bytes_max,
            size=self.scale.image,
        )
        return [
            replace(base, name="randwrite4k_qd1", rw="randwrite"),
            replace(base, name="randwrite4k_qd32", rw="randwrite", depth=32),
            replace(base, name="randread4k_qd1", rw="randread"),
            replace(base, name="randread4k_qd32", rw="randread", depth=32),
            replace(base, name="seqwrite128k", rw="write", block=128 << 10, depth=8),
        ]

    def image(self, name: str, pages: data.Pages) -> Path:
        path = self.work / f"{name}.img"
        data.fill_image(path, pages, self.scale.image)
        return path


def run(cache: Path, keep: Callable[[list[Row]], None], *, quick: bool) -> None:
    """Measure everything; what cannot be measured here becomes a row that says why.

    `keep` is called with the rows of each part as soon as it is done.
    """
    scale = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(
        prefix="ebb-bench-",
        dir=WORK,
        ignore_cleanup_errors=True,
    ) as work:
        bench = Bench(scale, cache, Path(work))
        for suffix in ("", "_random"):
            throughput(bench, suffix, keep)
        for part in (lag, initial_copy, view_open):
            keep(part(bench))


# Throughput


def throughput(bench: Bench, suffix: str, keep: Callable[[list[Row]], None]) -> None:
    """All cases with one kind of data: "" for database pages, "_random" for random bytes."""
    pages = (
        data.random_pages(bench.cache, bench.scale.pages)
        if suffix
        else data.database_pages(bench.cache, bench.scale.pages)
    )
    peers_image = bench.image("peers", pages)
    images = {suite: bench.image(f"ours{suite.suffix}", pages) for suite in SUITES}
    with contextlib.ExitStack() as stack:
        product: Product | None = None
        reason = ""
        try:
            product = stack.enter_context(Product.run(bench.work))
        except NOT_MEASURED as error:
            reason = reason_of(error)
        for case in bench.cases():
            keep(one_case(bench, case, suffix, pages, peers_image, images, product, reason))
    for image in (peers_image, *images.values()):
        image.unlink()


def one_case(
    bench: Bench,
    case: Case,
    suffix: str,
    pages: data.Pages,
    peers_image: Path,
    images: dict[Suite, Path],
    product: Product | None,
    reason: str,
) -> list[Row]:
    """Ours under each cipher, our server alone, and the peers, in turn."""
    sides: dict[str, Callable[[], Outcome]] = {}
    absent: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for suite in SUITES:
            side = f"ours{suite.suffix}"
            if product is None:
                absent[side] = reason
                continue
            try:
                stack.enter_context(protected(product, case.name, images[suite], suite))
            except NOT_MEASURED as error:
                absent[side] = reason_of(error)
                continue
            sides[side] = protected_side(bench, case, suffix, pages, product, suite)
        for peer in ("nbd_file", *PEERS):
            try:
                with serving(peer, peers_image, bench.work):
                    sides[peer] = bare_side(bench, case, suffix, pages, peer, peers_image)
            except NOT_MEASURED as error:
                absent[peer] = reason_of(error)
        turns = {name: attempt(name, side, absent) for name, side in sides.items()}
        outcomes = take_turns(turns, bench.scale.runs)
    results = {
        name: [one for one in found if one is not None]
        for name, found in outcomes.items()
        if name not in absent
    }
    return rows_of_case(case, suffix, results, absent)


def attempt(
    name: str, side: Callable[[], Outcome], absent: dict[str, str]
) -> Callable[[], Outcome | None]:
    """A side whose first failure takes it out of the comparison, and says why."""

    def once() -> Outcome | None:
        if name in absent:
            return None
        try:
            return side()
        except NOT_MEASURED as error:
            absent[name] = reason_of(error)
            return None

    return once


@contextlib.contextmanager
def protected(product: Product, case: str, image: Path, suite: Suite) -> Iterator[None]:
    """A group of its own for a case, whose history is deleted afterwards."""
    group = group_name(case, suite)
    product.protect(group, image, suite)
    try:
        yield
    finally:
        # What it measured stands, also if the clean-up fails.
        with contextlib.suppress(*NOT_MEASURED):
            product.drop(group)


def group_name(case: str, suite: Suite) -> str:
    return f"{case}{suite.suffix}"


def protected_side(
    bench: Bench, case: Case, suffix: str, pages: data.Pages, product: Product, suite: Suite
) -> Callable[[], Outcome]:
    group = group_name(case.name, suite)
    seed = iter(range(1, 1 << 20))

    def once() -> Outcome:
        export = product.export(group)
        before = export.cpu_s()
        outcome = (
            fio(export, case, bench.work)
            if suffix
            else generator(export, case, pages.path, seed=next(seed))
        )
        lag_s = product.settle(group)
        return replace(outcome, cpu_s=export.cpu_s() - before, lag_ms=lag_s * 1000)

    return once


def bare_side(
    bench: Bench, case: Case, suffix: str, pages: data.Pages, peer: str, image: Path
) -> Callable[[], Outcome]:
    seed = iter(range(1, 1 << 20))

    def once() -> Outcome:
        with serving(peer, image, bench.work) as export:
            before = export.cpu_s()
            outcome = (
                fio(export, case, bench.work)
                if suffix
                else generator(export, case, pages.path, seed=next(seed))
            )
            return replace(outcome, cpu_s=export.cpu_s() - before)

    return once


def rows_of_case(
    case: Case, suffix: str, results: dict[str, list[Outcome]], absent: dict[str, str]
) -> list[Row]:
    """Speed, ratio to the better peer, lag at the end and processor time of one case."""
    speeds = {side: [one.iops for one in found] for side, found in results.items()}
    there = [peer for peer in PEERS if peer in speeds]
    better = max(there, key=lambda peer: median(speeds[peer]), default=None)
    name = f"capture.{case.name}"
    rows: list[Row] = []
    for side, tail in [
        *((f"ours{suite.suffix}", suite.suffix) for suite in SUITES),
        ("nbd_file", "_server_only"),
    ]:
        end = f"{tail}{suffix}"
        if side not in speeds:
            why = absent[side]
            rows.append(missing(f"{name}.ratio{end}", "ratio", "higher", why, better))
            rows.append(missing(f"{name}.iops{end}", "1/s", "higher", why, better))
            continue
        if better is None:
            why = "; ".join(absent.values())
            rows.append(missing(f"{name}.ratio{end}", "ratio", "higher", why))
        else:
            rows.append(ratio(f"{name}.ratio{end}", speeds[side], speeds[better], better))
        peer_speeds = speeds[better] if better else ()
        rows.append(
            measured(
                f"{name}.iops{end}", speeds[side], "1/s", "higher",
                peer=better, peer_values=peer_speeds,
            )
        )  # fmt: skip
        rows.append(
            measured(
                f"{name}.p50_us{end}", [one.p50_us for one in results[side]], "us", "lower",
                peer=better,
                peer_values=[one.p50_us for one in results[better]] if better else (),
            )
        )  # fmt: skip
        rows.append(
            measured(
                f"{name}.cpu_s_per_gb{end}", cpu_per_gb(results[side]), "s/GB", "lower",
                peer=better, peer_values=cpu_per_gb(results[better]) if better else (),
            )
        )  # fmt: skip
        if side != "nbd_file" and case.writes:
            lags = [one.lag_ms for one in results[side]]
            rows.append(measured(f"{name}.lag_end_ms{end}", lags, "ms", "lower"))
    rows.extend(
        missing(f"{name}.iops_{peer}{suffix}", "1/s", "higher", absent[peer], peer)
        for peer in PEERS
        if peer not in speeds
    )
    return rows


def cpu_per_gb(outcomes: list[Outcome]) -> list[float]:
    """Processor seconds of the serving side for 10^9 bytes."""
    return [one.cpu_s / max(one.bytes / 1e9, 1e-9) for one in outcomes]


# Lag


def lag(bench: Bench) -> list[Row]:
    """Write answered to durable at the target, beside a bare fdatasync loop on the same disk."""
    pages = data.database_pages(bench.cache, bench.scale.pages)
    syncs: list[float] = []

    def fdatasync() -> list[float]:
        os.sync()
        took = disk.fdatasync_ms(bench.work, bench.scale.lag_seconds / 3)
        syncs.extend(took)
        return took

    rows: list[Row] = []
    for suite in SUITES:
        names = {p: f"capture.lag_p{p}_ms{suite.suffix}" for p in (50, 99)}
        try:
            with Product.run(bench.work) as product:
                image = bench.image("lag", pages)
                with protected(product, "lag", image, suite):
                    sides = {
                        "ours": lambda: lags_ms(bench, product, suite, pages),  # noqa: B023
                        "fdatasync": fdatasync,
                    }
                    results = take_turns(sides, bench.scale.runs)
        except NOT_MEASURED as error:
            why = reason_of(error)
            rows += [missing(name, "ms", "lower", why, "fdatasync") for name in names.values()]
            continue
        for percent, name in names.items():
            ours = [disk.percentile(run, percent) for run in results["ours"]]
            bare = [disk.percentile(run, percent) for run in results["fdatasync"]]
            peer = "fdatasync"
            rows.append(measured(name, ours, "ms", "lower", peer=peer, peer_values=bare))
    if not syncs:
        for _ in range(bench.scale.runs):
            fdatasync()
    share = max(1, len(syncs) // bench.scale.runs)
    parts = [syncs[at : at + share] for at in range(0, len(syncs) - share + 1, share)]
    for percent in (50, 99):
        values = [disk.percentile(part, percent) for part in parts]
        rows.append(measured(f"capture.fdatasync_p{percent}_ms", values, "ms", "lower"))
    return rows


def lags_ms(bench: Bench, product: Product, suite: Suite, pages: data.Pages) -> list[float]:
    """Lag of every write of one run at a fixed rate, in milliseconds."""
    group = group_name("lag", suite)
    product.settle(group)
    first = product.last_seq(group) + 1
    answers = bench.work / "answers.bin"
    case = Case(
        name="lag",
        rw="randwrite",
        block=4096,
        depth=1,
        seconds=bench.scale.lag_seconds,
        bytes_max=0,
        size=bench.scale.image,
    )
    # What earlier parts left to be written out is not what is measured here, on either side.
    os.sync()
    with DurableWatch(product.journal(group)) as watch:
        generator(product.export(group), case, pages.path, rate=LAG_WRITES_PER_S, answers=answers)
        product.settle(group)
        time.sleep(0.05)
    raw = answers.read_bytes()
    answered = [value for (value,) in struct.iter_unpack("<q", raw)]
    found = []
    # One connection at depth 1: the k-th answer is that of the k-th record.
    for index, answered_ns in enumerate(answered):
        durable_ns = watch.durable_at_ns(first + index)
        if durable_ns is None:
            raise UnavailableError("writes are missing at the target")
        found.append(max(0.0, (durable_ns - answered_ns) / 1e6))
    return found


# First copy


def initial_copy(bench: Bench) -> list[Row]:
    """Protect a volume that holds data: how fast its content becomes history at the target."""
    size = bench.scale.copy
    pages = data.database_pages(bench.cache, bench.scale.pages)
    runs = min(3, bench.scale.runs)
    rates = take_turns(
        {
            "disk": lambda: disk.write_mb_s(bench.work, min(size, 1 << 30)),
            "grpc": lambda: grpc_rate.rate_mb_s(min(size, 1 << 30)),
        },
        runs,
    )
    rows: list[Row] = []
    for suite in SUITES:
        name = f"capture.initial_copy.mb_s{suite.suffix}"
        try:
            turn = functools.partial(copy_mb_s, bench, pages, suite)
            ours = take_turns({"ours": turn}, runs)["ours"]
        except NOT_MEASURED as error:
            why = reason_of(error)
            rows.append(missing(name, "MB/s", "higher", why))
            continue
        rows.append(measured(name, ours, "MB/s", "higher"))
        for peer, theirs in rates.items():
            share = f"capture.initial_copy.share_{peer}{suite.suffix}"
            rows.append(ratio(share, ours, theirs, peer))
    rows.append(measured("capture.disk_write.mb_s", rates["disk"], "MB/s", "higher"))
    rows.append(measured("capture.grpc.mb_s", rates["grpc"], "MB/s", "higher"))
    return rows


def copy_mb_s(bench: Bench, pages: data.Pages, suite: Suite) -> float:
    image = bench.work / "copy.img"
    data.fill_image(image, pages, bench.scale.copy)
    with Product.run(bench.work) as product:
        group = group_name("copy", suite)
        begun = time.monotonic()
        product.protect(group, image, suite, wait=False)
        product.wait_copied(group)
        product.settle(group)
        took = time.monotonic() - begun
        product.drop(group)
    image.unlink()
    return bench.scale.copy / 1e6 / took


# Opening a view


def view_open(bench: Bench) -> list[Row]:
    """Control request to first 4 KiB read, with many records in the journal."""
    name = "capture.view_open_1m_s"
    pages = data.database_pages(bench.cache, bench.scale.pages)
    try:
        with Product.run(bench.work) as product:
            image = bench.image("view", pages)
            with protected(product, "view", image, AES_256_GCM):
                group = group_name("view", AES_256_GCM)
                case = Case(
                    name="view",
                    rw="randwrite",
                    block=4096,
                    depth=32,
                    seconds=600,
                    bytes_max=bench.scale.records * 4096,
                    size=bench.scale.image,
                )
                generator(product.export(group), case, pages.path)
                product.settle(group, within_s=600)
                records, last = product.records(group), product.last_seq(group)
                rng = random.Random(1)
                took = [
                    product.read_view(
                        group,
                        last - rng.randrange(bench.scale.records),
                        rng.randrange(bench.scale.image // 4096) * 4096,
                    )
                    / 1000
                    for _ in range(max(5, bench.scale.runs))
                ]
    except NOT_MEASURED as error:
        return [missing(name, "s", "lower", reason_of(error))]
    return [
        measured(name, took, "s", "lower"),
        measured("capture.view_open_records", [float(records)], "records", "higher"),
    ]
