"""Bad input ends in a clear error with a hint and a documented exit code, and nothing is lost.

One test per way to go wrong that the main job can meet. Frames and formats have theirs in Rust
(`log`, `codec`, `format`) and in `test_wire.py`; here it is what a person at the prompt does, and
what disks and hosts do to them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from ebbtide.errors import ExitCode
from ebbtide.rpc import agent_pb2
from tests.support.nbd import Client
from tests.support.stack import Host, Stack, eventually, is_alive

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.needs("root"),
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("leak_check"),
]
SIZE = 16 << 20


def refused(host: Host, code: int, *arguments: str, word: str = "") -> dict[str, Any]:
    """Run `ebb`, expect this exit code, an error and a hint; returns the error object."""
    done = host.ebb(*arguments, "--json", check=False)
    assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
    error: dict[str, Any] = json.loads(done.stderr.splitlines()[-1])["error"]
    assert error["exit_code"] == code
    assert error["message"]
    assert error["hint"], error
    if word:
        assert error["code"] == word, error
    plain = host.ebb(*arguments, check=False).stderr
    assert "hint:" in plain
    return error


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with Stack.run(tmp_path) as stack:
        yield stack


@contextlib.contextmanager
def small_disk(directory: Path, size: int) -> Iterator[Path]:
    """A disk of its own of `size` bytes: ext4 on a loop device, where "full" is real."""
    image, where = directory / "small.img", directory / "small"
    with image.open("wb") as file:
        file.truncate(size)
    where.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(where)], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def fill(stack: Stack, rng: random.Random, megabytes: int, offset: int = 0) -> None:
    with Client(stack.uri("ward", "disk")) as client:
        for number in range(megabytes):
            client.pwrite(rng.randbytes(1 << 20), offset + (number << 20))
        client.flush()


def equal_to_source(stack: Stack) -> bool:
    with (
        Client(stack.uri("ward", "disk")) as source,
        stack.view("ward") as view,
        Client(view.volumes[0].nbd_uri) as newest,
    ):
        return source.read_all() == newest.read_all()


def test_misspelt_key_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    host = Host("lone", tmp_path / "lone", 1)
    host.lay_out(extra="[source]\nspol_dir = 'x'")
    error = refused(host, ExitCode.CONFIG, "agent")
    assert "spool_dir" in error["hint"]


def test_unknown_names(stack: Stack) -> None:
    stack.protect("ward", {"disk": SIZE})
    for arguments in (
        ("status", "nowhere"),
        ("bookmark", "nowhere", "label"),
        ("points", "nowhere"),
        ("attach", "nowhere"),
        ("unprotect", "nowhere", "--yes"),
    ):
        refused(stack.source, ExitCode.NOT_FOUND, *arguments)
    refused(stack.target, ExitCode.NOT_FOUND, "view", "open", "nowhere")
    refused(stack.target, ExitCode.NOT_FOUND, "view", "close", "nowhere")
    image = stack.directory / "new.img"
    image.write_bytes(bytes(SIZE))
    refused(stack.source, ExitCode.NOT_FOUND, "protect", "other", f"a={image}", "--to", "nobody")
    refused(stack.source, ExitCode.NOT_FOUND, "protect", "other", "a=/nonexistent/image")


def test_points_that_are_not_there(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": SIZE})
    fill(stack, rng, 1)
    stack.wait_durable("ward")
    for point, word in (
        (("--at", "1999-01-01T00:00:00.000000+00:00"), "before-horizon"),
        (("--at", "2999-01-01T00:00:00.000000+00:00"), "in-future"),
        (("--seq", "999999999"), "in-future"),
        (("--bookmark", "never placed"), "no-bookmark"),
    ):
        refused(stack.target, ExitCode.POINT, "view", "open", "ward", *point, word=word)
    assert not stack.target.status().views


def test_point_inside_an_inconsistent_span(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": SIZE})
    fill(stack, rng, 4)
    pid = stack.source.source("ward").tap.pid
    with Client(stack.uri("ward", "disk")) as client:
        client.pwrite(rng.randbytes(4096), 0)
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_alive(pid))

    def recovered() -> bool:
        tap = stack.source.source("ward").tap
        return tap.pid not in {0, pid} and not tap.in_span

    eventually(recovered, what="the tap recovers")
    stack.wait_durable("ward")
    points = stack.target.stub.Points(agent_pb2.PointsRequest(group="ward"))
    span = points.spans[-1]
    inside = str(span.first_seq)
    refused(
        stack.target, ExitCode.POINT, "view", "open", "ward", "--seq", inside, "--exact",
        word="inside-span",
    )  # fmt: skip
    with stack.view("ward", at_seq=span.first_seq) as view:
        assert view.seq < span.first_seq


def test_second_tap_on_one_volume(stack: Stack) -> None:
    stack.protect("ward", {"disk": SIZE})
    image = stack.directory / "ward-disk.img"
    refused(stack.source, ExitCode.REFUSED, "protect", "again", f"disk={image}", word="in-use")
    with Stack.run(stack.directory / "second") as other:
        refused(other.source, ExitCode.REFUSED, "protect", "again", f"d={image}", word="in-use")
    assert stack.source.source("ward").state == agent_pb2.SourceGroup.STATE_SERVING


def stop_tap(stack: Stack) -> None:
    """End agent and tap in order, as before maintenance of the host."""
    pid = stack.source.source("ward").tap.pid
    stack.source.kill(signal.SIGTERM)
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: not is_alive(pid), what="the tap ends")


def test_volume_that_shrank(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": SIZE})
    fill(stack, rng, 2)
    stack.wait_durable("ward")
    stop_tap(stack)
    os.truncate(stack.directory / "ward-disk.img", SIZE // 2)
    stack.source.start()

    def failed() -> bool:
        group = stack.source.source("ward")
        return group.state == agent_pb2.SourceGroup.STATE_FAILED

    eventually(failed, what="the tap refuses")
    failure = stack.source.source("ward").failure
    assert failure.code == "volume-shrank"
    assert failure.hint
    os.truncate(stack.directory / "ward-disk.img", SIZE)
    with stack.view("ward") as view, Client(view.volumes[0].nbd_uri) as client:
        assert client.size == SIZE
        assert client.pread(4096, 0) != bytes(4096)


def test_backing_changed_behind_the_tap(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": SIZE})
    fill(stack, rng, 2)
    stack.wait_durable("ward")
    stop_tap(stack)
    foreign = rng.randbytes(4096)
    with (stack.directory / "ward-disk.img").open("r+b") as file:
        file.seek(8 << 20)
        file.write(foreign)
    stack.source.start()

    def copied() -> bool:
        tap = stack.source.source("ward").tap
        return is_alive(tap.pid) and not tap.in_span and tap.copy_regions_left == 0

    eventually(copied, what="the volume is copied again")
    notices = " ".join(stack.source.source("ward").tap.notices)
    assert "changed" in notices
    stack.wait_durable("ward")
    assert equal_to_source(stack)
    points = stack.target.stub.Points(agent_pb2.PointsRequest(group="ward"))
    assert points.spans[-1].cause == "backing-changed"


@pytest.mark.needs("mkfs.ext4", "loop")
def test_spool_on_a_protected_volume_is_refused(stack: Stack) -> None:
    with small_disk(stack.directory, 64 << 20) as disk:
        device = subprocess.run(
            ["findmnt", "-no", "SOURCE", str(disk)], check=True, capture_output=True, text=True
        ).stdout.strip()
        image = stack.directory / "small.img"
        for backing in (device, str(image)):
            refused(
                stack.source, ExitCode.REFUSED, "protect", "ward", f"disk={backing}",
                "--spool-dir", str(disk / "spool"), word="on-protected-volume",
            )  # fmt: skip


def test_target_away_at_the_start(tmp_path: Path, rng: random.Random) -> None:
    with Stack.run(tmp_path) as stack:
        stack.target.kill(signal.SIGTERM)
        image = tmp_path / "ward-disk.img"
        image.write_bytes(bytes(SIZE))
        error = refused(
            stack.source, ExitCode.UNREACHABLE, "protect", "ward", f"disk={image}", "--to",
            "target",
        )  # fmt: skip
        assert "target" in error["message"]
        stack.target.start()
        stack.protect("ward", {"disk": SIZE})
        stack.target.kill()
        fill(stack, rng, 2)
        stack.source.kill()
        stack.source.start()
        fill(stack, rng, 2, offset=4 << 20)
        stack.target.start()
        stack.wait_durable("ward")
        assert equal_to_source(stack)


@pytest.mark.needs("mkfs.ext4", "loop")
def test_disk_full_at_the_spool_costs_history_never_writes(
    tmp_path: Path, rng: random.Random
) -> None:
    with small_disk(tmp_path, 48 << 20) as disk, Stack.run(tmp_path) as stack:
        stack.protect("ward", {"disk": 128 << 20}, spool_dir=str(disk / "spool"))
        fill(stack, rng, 4)
        stack.wait_durable("ward")
        before = stack.source.source("ward").tap.last_time_us
        stack.target.kill()
        fill(stack, rng, 80)
        assert stack.source.source("ward").tap.mode == "extents-only"
        said = stack.source.ebb("status", "ward").stdout
        assert "gap" in said
        stack.target.start()

        def mended() -> bool:
            tap = stack.source.source("ward").tap
            return tap.mode == "recording" and not tap.in_span and equal_to_source(stack)

        # So small a spool may run full again while the missed regions are recorded: again a gap.
        eventually(mended, 120, "recording goes on and mends history by itself")
        points = stack.target.stub.Points(agent_pb2.PointsRequest(group="ward"))
        assert {gap.cause for gap in points.gaps} == {"spool-full"}
        assert points.gaps[0].bytes > 0
        with stack.view("ward", at_time_us=before, exact=True) as view:
            assert view.time_us <= before


@pytest.mark.needs("mkfs.ext4", "loop")
def test_disk_full_at_the_journal_pauses_and_goes_on(tmp_path: Path, rng: random.Random) -> None:
    with small_disk(tmp_path, 64 << 20) as disk:
        target = f'[target]\njournal_dir = "{disk}/journal"\njournal_free_min = "1MiB"'
        with Stack.run(tmp_path, target=target) as stack:
            ballast = disk / "ballast"
            ballast.write_bytes(bytes(32 << 20))
            stack.protect("ward", {"disk": 64 << 20})
            fill(stack, rng, 40)

            def paused() -> bool:
                group = stack.target.target("ward")
                return group.state == agent_pb2.TargetGroup.STATE_PAUSED

            eventually(paused, what="the target pauses")
            assert "space" in stack.target.target("ward").detail
            assert "space" in stack.source.ebb("status", "ward").stdout
            ballast.unlink()
            stack.wait_durable("ward")
            assert equal_to_source(stack)


def test_history_is_never_dropped_silently(stack: Stack, rng: random.Random) -> None:
    stack.protect("ward", {"disk": SIZE})
    fill(stack, rng, 1)
    stack.wait_durable("ward")
    kept = stack.source.ebb("unprotect", "ward", "--yes", "--json")
    assert json.loads(kept.stdout)["kept"]
    with stack.view("ward") as view, Client(view.volumes[0].nbd_uri) as client:
        assert client.pread(4096, 0) != bytes(4096)


def test_agent_that_is_not_there(tmp_path: Path) -> None:
    host = Host("lone", tmp_path / "lone", 1)
    host.lay_out()
    for verb in (("status",), ("points", "ward"), ("bookmark", "ward", "x")):
        refused(host, ExitCode.UNREACHABLE, *verb)
