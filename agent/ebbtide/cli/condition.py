"""From a status to one word for 3 a.m. Pure: a message in, data out.

A group can be in several conditions at once (a first copy runs while the link is down). All are
told, the worst first; the first one's word is the group's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from ebbtide.rpc.agent_pb2 import AgentStatus, Shipping, SourceGroup, TargetGroup, View
from ebbtide.times import US_PER_S, format_duration, format_time

#: Spool use from which the status warns: history is about to get a gap.
SPOOL_WARN = 0.8


class Level(IntEnum):
    """How bad it is."""

    OK = 0
    WARN = 1
    FAIL = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """`word` is stable and for programs; `text` is what people read."""

    word: str
    level: Level
    text: str

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: the level as its word."""
        return {**asdict(self), "level": self.level.name.lower()}


def _ok(word: str, text: str) -> Condition:
    return Condition(word=word, level=Level.OK, text=text)


def _warn(word: str, text: str) -> Condition:
    return Condition(word=word, level=Level.WARN, text=text)


def _fail(word: str, text: str) -> Condition:
    return Condition(word=word, level=Level.FAIL, text=text)


def of_source(group: SourceGroup, now_us: int) -> list[Condition]:
    """Conditions of a protected group, worst first, never empty."""
    found = [*_of_tap(group), *_of_copy(group), *_of_shipping(group, now_us), *_of_spool(group)]
    if not any(condition.level for condition in found) and not group.HasField("copying"):
        found.insert(0, _healthy(group))
    return sorted(found, key=lambda condition: -condition.level)


def _healthy(group: SourceGroup) -> Condition:
    if group.HasField("shipping"):
        return _ok("protected", f"every write is on its way to {group.shipping.peer}")
    return _ok("local", "recorded on this host only: no target")


def _of_tap(group: SourceGroup) -> list[Condition]:
    match group.state:
        case SourceGroup.STATE_FAILED:
            reason = group.failure.message or "the tap refuses to start"
            return [_fail("failed", f"not served: {reason}")]
        case SourceGroup.STATE_EXTENTS_ONLY:
            cause = group.tap.gap_cause or "unknown cause"
            return [_fail("extents-only", f"gap: volumes serve, history does not grow: {cause}")]
        case SourceGroup.STATE_RESTARTING:
            return [_fail("restarting", "the tap died and is being started again")]
        case SourceGroup.STATE_STARTING:
            return [_warn("starting", "the tap is starting")]
        case SourceGroup.STATE_SERVING:
            if group.tap.mode == "extents-only":
                cause = group.tap.gap_cause or "unknown cause"
                return [_fail("extents-only", f"gap: history does not grow: {cause}")]
            return []
        case _:
            return [_warn("unknown", "the agent reports a state that this version does not know")]


def _of_copy(group: SourceGroup) -> list[Condition]:
    if not group.HasField("copying"):
        return []
    copying = group.copying
    done = 100.0
    if copying.bytes_total:
        done = 100.0 * (copying.bytes_total - copying.bytes_left) / copying.bytes_total
    text = f"copying {done:.0f} %"
    if copying.eta_s >= 0:
        text += f", {format_duration(copying.eta_s)} left"
    return [_warn("copying", f"{text}; no newer point until it is done")]


def _of_shipping(group: SourceGroup, now_us: int) -> list[Condition]:
    if not group.HasField("shipping"):
        return []
    ship = group.shipping
    detail = f": {ship.detail}" if ship.detail else ""
    safe = ""
    if ship.durable_time_us:
        age_s = max(0, now_us - ship.durable_time_us) / US_PER_S
        safe = f"; {ship.peer} holds all up to {format_time(ship.durable_time_us)}"
        safe += f" ({format_duration(age_s)} ago)" if ship.lag_us else ""
    match ship.state:
        case Shipping.STATE_STREAMING:
            return []
        case Shipping.STATE_CATCHING_UP:
            eta = f", {format_duration(ship.eta_s)} left" if ship.eta_s >= 0 else ""
            return [_warn("catching-up", f"catching up{eta}{safe}")]
        case Shipping.STATE_PAUSED:
            return [_fail("paused", f"{ship.peer} takes nothing now{detail}{safe}")]
        case Shipping.STATE_REFUSED:
            return [_fail("refused", f"{ship.peer} refuses this group{detail}{safe}")]
        case Shipping.STATE_CONNECTING | Shipping.STATE_DISCONNECTED:
            since = ""
            if ship.lag_us:
                since = f" for {format_duration(ship.lag_us / US_PER_S)}"
            return [_fail("link-down", f"no link to {ship.peer}{since}{detail}{safe}")]
        case _:
            return [_warn("unknown", "the agent reports a state that this version does not know")]


def _of_spool(group: SourceGroup) -> list[Condition]:
    limit = group.spool_bytes_max
    if not limit or group.tap.spool_bytes < SPOOL_WARN * limit:
        return []
    share = 100.0 * group.tap.spool_bytes / limit
    end = "gets a gap" if group.HasField("shipping") else "ends"
    return [_warn("spool-filling", f"spool {share:.0f} % full; at 100 % history {end}")]


def of_target(group: TargetGroup) -> list[Condition]:
    """Conditions of a group whose history this agent holds."""
    detail = f": {group.detail}" if group.detail else ""
    match group.state:
        case TargetGroup.STATE_RECEIVING:
            return [_ok("receiving", f"receiving from {group.source_peer}")]
        case TargetGroup.STATE_WAITING:
            if not group.source_peer:
                return [_ok("kept", "was protected here; history does not grow")]
            return [_warn("waiting", f"no source is connected{detail}")]
        case TargetGroup.STATE_PAUSED:
            return [_fail("paused", f"takes nothing now{detail}")]
        case TargetGroup.STATE_FAILED:
            return [_fail("failed", f"the journal cannot be used{detail}")]
        case _:
            return [_warn("unknown", "the agent reports a state that this version does not know")]


def of_view(view: View) -> list[Condition]:
    """Conditions of an open view."""
    detail = f": {view.detail}" if view.detail else ""
    match view.state:
        case View.STATE_SERVING:
            return [_ok("serving", "")]
        case View.STATE_STARTING:
            return [_warn("starting", "")]
        case View.STATE_RESTARTING:
            return [_fail("restarting", f"the view server died and is being started again{detail}")]
        case View.STATE_FAILED:
            return [_fail("failed", detail.removeprefix(": "))]
        case _:
            return [_warn("unknown", "")]


def worst(status: AgentStatus) -> Level:
    """The worst level of anything in a status."""
    levels = [of_source(group, status.now_us)[0].level for group in status.sources]
    levels += [of_target(group)[0].level for group in status.targets]
    levels += [of_view(view)[0].level for view in status.views]
    return max(levels, default=Level.OK)
