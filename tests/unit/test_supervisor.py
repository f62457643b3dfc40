"""Guards supervision: a killed server is back within a second, a running one is adopted and never
doubled, and a refusal is told in the server's own words."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ebbtide.control.supervisor import REAP_S, ProcessState, Supervisor
from ebbtide.errors import InternalError, RefusedError, UnreachableError
from ebbtide.rpc import control_pb2 as pb
from tests.support.stack import is_alive

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from ebbtide.control.client import ControlClient

ROOT = Path(__file__).parents[2]


class Fake(Supervisor):
    module = "tests.support.fake_server"

    def __init__(self, directory: Path, behaviour: str = "serve") -> None:
        super().__init__(name="fake", socket=directory / "fake.sock", log=directory / "fake.log")
        self.behaviour = behaviour
        self.launches = 0
        #: How often what follows on serving fails before it succeeds.
        self.refusals = 0
        #: What the start, and what follows on serving, raise before they go well.
        self.defects: list[Exception] = []

    async def launch_message(self) -> bytes:
        self.launches += 1
        if self.defects:
            raise self.defects.pop()
        return pb.TapLaunch(
            group_name=self.behaviour, control_socket=str(self.socket)
        ).SerializeToString()

    async def adopted(self, client: ControlClient) -> int:
        response = await client.request(pb.Request(status=pb.StatusRequest()))
        return response.tap_status.pid

    async def serving(self, client: ControlClient) -> None:
        await client.request(pb.Request(status=pb.StatusRequest()))
        if self.defects:
            raise self.defects.pop()
        if self.refusals:
            self.refusals -= 1
            raise RefusedError("what it needs is not there yet")


@pytest.fixture
async def fakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Fake]]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made: list[Fake] = []

    def make(behaviour: str = "serve") -> Fake:
        made.append(Fake(tmp_path, behaviour))
        return made[-1]

    yield make
    for fake in made:
        await fake.abandon()
        if fake.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(fake.pid, signal.SIGKILL)


async def until(predicate: Callable[[], bool], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not predicate():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.005)


async def test_a_killed_server_is_back_within_a_second(fakes: Callable[..., Fake]) -> None:
    fake = fakes()
    fake.begin()
    await fake.until_settled()
    assert fake.state is ProcessState.SERVING
    first = fake.pid
    killed_at = time.monotonic()
    os.kill(first, signal.SIGKILL)
    await until(lambda: fake.state is ProcessState.SERVING and fake.pid != first)
    assert time.monotonic() - killed_at < 1.0
    assert fake.restarts == 1
    assert fake.launches == 2


async def test_a_running_server_is_adopted_and_not_doubled(fakes: Callable[..., Fake]) -> None:
    before = fakes()
    before.begin()
    await before.until_settled()
    await before.abandon()
    assert is_alive(before.pid)
    after = fakes()
    after.begin()
    await after.until_settled()
    assert after.pid == before.pid
    assert after.launches == 0
    # The end of an adopted process, which is nobody's child here, is noticed too.
    os.kill(after.pid, signal.SIGKILL)
    await until(lambda: after.state is ProcessState.SERVING and after.pid != before.pid)
    await after.stop()
    assert not is_alive(after.pid)
    assert after.state is ProcessState.STOPPED


async def test_a_refusal_is_told_and_tried_again(fakes: Callable[..., Fake]) -> None:
    fake = fakes("refuse")
    fake.begin()
    with pytest.raises(RefusedError, match="somebody holds it") as refused:
        await fake.until_settled()
    assert refused.value.code == "in-use"
    assert fake.state is ProcessState.FAILED
    with pytest.raises(UnreachableError):
        await fake.request(pb.Request(status=pb.StatusRequest()))
    fake.behaviour = "serve"
    await until(lambda: fake.state is ProcessState.SERVING)
    assert fake.failure is None


async def test_a_death_before_serving_names_the_last_words(fakes: Callable[..., Fake]) -> None:
    fake = fakes("die")
    fake.begin()
    with pytest.raises(InternalError, match=r"status 3 .*no reason given"):
        await fake.until_settled()


async def test_waiting_requests_fail_when_the_server_dies(fakes: Callable[..., Fake]) -> None:
    fake = fakes()
    fake.begin()
    await fake.until_settled()
    os.kill(fake.pid, signal.SIGSTOP)
    waiting = asyncio.create_task(fake.request(pb.Request(status=pb.StatusRequest())))
    await asyncio.sleep(0.05)
    os.kill(fake.pid, signal.SIGKILL)
    with pytest.raises(UnreachableError):
        await waiting


async def test_a_hanging_server_is_a_timeout(fakes: Callable[..., Fake]) -> None:
    fake = fakes()
    fake.begin()
    await fake.until_settled()
    os.kill(fake.pid, signal.SIGSTOP)
    with pytest.raises(UnreachableError) as hung:
        await fake.request(pb.Request(status=pb.StatusRequest()), timeout_s=0.2)
    assert hung.value.code == "timeout"
    os.kill(fake.pid, signal.SIGCONT)


async def test_what_follows_on_serving_is_repeated_until_it_succeeds(
    fakes: Callable[..., Fake],
) -> None:
    fake = fakes()
    fake.refusals = 2
    fake.begin()
    with pytest.raises(RefusedError, match="not there yet"):
        await fake.until_settled()
    await until(lambda: fake.state is ProcessState.SERVING)
    assert fake.failure is None
    assert fake.launches == 1


async def test_what_nobody_foresaw_does_not_end_supervision(fakes: Callable[..., Fake]) -> None:
    fake = fakes()
    fake.defects = [OSError("no memory for a process")]
    fake.begin()
    with pytest.raises(InternalError, match="no memory"):
        await fake.until_settled()
    await until(lambda: fake.state is ProcessState.SERVING)
    fake.defects = [AssertionError("not this one")]
    os.kill(fake.pid, signal.SIGKILL)
    await until(lambda: not fake.defects)
    fake.defects = [AssertionError("nor that one")]
    await until(lambda: not fake.defects and fake.state is ProcessState.SERVING)
    assert fake.failure is None


async def test_a_stop_ends_the_repeating_also_when_the_connection_is_gone(
    fakes: Callable[..., Fake],
) -> None:
    """A request on a closed connection fails at once: repeated without a pause it would hang us."""
    fake = fakes()
    fake.refusals = 1000
    fake.begin()
    with pytest.raises(RefusedError):
        await fake.until_settled()
    assert fake.client is not None
    fake.client.close()
    await asyncio.wait_for(fake.abandon(), 2 * REAP_S)


async def test_a_death_ends_the_repeating_of_what_follows_on_serving(
    fakes: Callable[..., Fake],
) -> None:
    fake = fakes()
    fake.refusals = 1000
    fake.begin()
    with pytest.raises(RefusedError):
        await fake.until_settled()
    first = fake.pid
    fake.refusals = 0
    os.kill(first, signal.SIGKILL)
    await until(lambda: fake.state is ProcessState.SERVING and fake.pid != first)
    fake.refusals = 1000
    os.kill(fake.pid, signal.SIGKILL)
    await until(lambda: fake.refusals < 1000)
    await asyncio.wait_for(fake.stop(), 5)
    assert fake.state is ProcessState.STOPPED
