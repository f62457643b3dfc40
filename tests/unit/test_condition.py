"""The word of a group: every state has one, the worst comes first, nothing bad reads as healthy."""

from __future__ import annotations

from collections import deque

import pytest

from ebbtide.cli.condition import Level, of_source, of_target, of_view, worst
from ebbtide.cli.picture import curve
from ebbtide.rpc.agent_pb2 import Shipping, SourceGroup, TargetGroup, View
from tests.unit.fake_agent import NOW, full_status


def source() -> SourceGroup:
    return full_status().sources[0]


def words(group: SourceGroup) -> list[str]:
    return [condition.word for condition in of_source(group, NOW)]


def test_health() -> None:
    assert words(source()) == ["protected"]
    local = source()
    local.ClearField("shipping")
    assert words(local) == ["local"]
    assert worst(full_status()) is Level.OK


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (SourceGroup.STATE_STARTING, "starting"),
        (SourceGroup.STATE_EXTENTS_ONLY, "extents-only"),
        (SourceGroup.STATE_RESTARTING, "restarting"),
        (SourceGroup.STATE_FAILED, "failed"),
        (SourceGroup.STATE_UNSPECIFIED, "unknown"),
    ],
)
def test_state_of_the_tap(state: SourceGroup.State.ValueType, word: str) -> None:
    group = source()
    group.state = state
    assert words(group) == [word]


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (Shipping.STATE_CONNECTING, "link-down"),
        (Shipping.STATE_DISCONNECTED, "link-down"),
        (Shipping.STATE_CATCHING_UP, "catching-up"),
        (Shipping.STATE_PAUSED, "paused"),
        (Shipping.STATE_REFUSED, "refused"),
        (Shipping.STATE_UNSPECIFIED, "unknown"),
    ],
)
def test_state_of_the_link(state: Shipping.State.ValueType, word: str) -> None:
    group = source()
    group.shipping.state = state
    group.shipping.detail = "paused: no space"
    assert words(group) == [word]
    assert worst(full_status()) is Level.OK


def test_link_down_tells_how_long_and_what_is_safe() -> None:
    group = source()
    group.shipping.state = Shipping.STATE_DISCONNECTED
    group.shipping.lag_us = 65_000_000
    text = of_source(group, NOW)[0].text
    assert "for 1m 05s" in text
    assert "refuge holds all up to" in text


def test_extents_only_reported_by_the_tap_alone() -> None:
    group = source()
    group.tap.mode = "extents-only"
    group.tap.gap_cause = "spool-full"
    assert words(group) == ["extents-only"]
    assert "spool-full" in of_source(group, NOW)[0].text


def test_copy_with_the_link_down_tells_both_the_worse_first() -> None:
    group = source()
    group.copying.bytes_left, group.copying.bytes_total, group.copying.eta_s = 25, 100, 12.0
    assert words(group) == ["copying"]
    assert "copying 75 %, 12.0 s left" in of_source(group, NOW)[0].text
    group.shipping.state = Shipping.STATE_DISCONNECTED
    assert words(group) == ["link-down", "copying"]
    group.copying.bytes_total, group.copying.eta_s = 0, -1.0
    assert "left" not in of_source(group, NOW)[1].text


def test_a_filling_spool_warns() -> None:
    group = source()
    group.tap.spool_bytes = group.spool_bytes_max * 9 // 10
    assert words(group) == ["spool-filling"]


@pytest.mark.parametrize("state", TargetGroup.State.values())
def test_every_state_of_a_target(state: TargetGroup.State.ValueType) -> None:
    (condition,) = of_target(TargetGroup(state=state, source_peer="his"))
    assert (condition.level is Level.OK) == (state == TargetGroup.STATE_RECEIVING)


def test_history_of_a_group_that_was_protected_here_waits_for_nobody() -> None:
    (condition,) = of_target(TargetGroup(state=TargetGroup.STATE_WAITING))
    assert (condition.word, condition.level) == ("kept", Level.OK)


@pytest.mark.parametrize("state", View.State.values())
def test_every_state_of_a_view(state: View.State.ValueType) -> None:
    (condition,) = of_view(View(state=state))
    assert (condition.level is Level.OK) == (state == View.STATE_SERVING)


def test_the_worst_of_all_counts() -> None:
    status = full_status()
    status.views[0].state = View.STATE_STARTING
    assert worst(status) is Level.WARN
    status.targets[0].state = TargetGroup.STATE_PAUSED
    assert worst(status) is Level.FAIL


def test_curve() -> None:
    assert curve(deque([0.0, 0.0]), 5) == "__"
    assert curve(deque([0.0, 1.0, 7.0]), 5) == "_.#"
    assert len(curve(deque([1.0] * 40), 10)) == 10
