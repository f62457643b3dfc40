"""Rates from counters, and quantiles of recent times."""

from __future__ import annotations

import time
from collections import deque

#: A rate is taken over about this long.
SPAN_S = 2.0
#: Recent samples that quantiles are taken from.
SAMPLES_MAX = 2048


class Rates:
    """Rates a second of counters that only grow, except that they may begin anew."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, tuple[float, ...]]] = deque()

    def sample(self, *counters: float) -> None:
        """Note the counters as they are now."""
        now = time.monotonic()
        if self._samples and any(
            new < old for new, old in zip(counters, self._samples[-1][1], strict=True)
        ):
            self._samples.clear()
        self._samples.append((now, counters))
        while len(self._samples) > 2 and now - self._samples[1][0] >= SPAN_S:
            self._samples.popleft()

    def rate(self, index: int = 0) -> float:
        """Of the counter at `index`; 0 if there are no two samples."""
        if len(self._samples) < 2:
            return 0.0
        (began, first), (ended, last) = self._samples[0], self._samples[-1]
        return (last[index] - first[index]) / max(ended - began, 1e-3)


class Quantiles:
    """Median and high quantile of the last values."""

    def __init__(self) -> None:
        self._values: deque[int] = deque(maxlen=SAMPLES_MAX)

    def add(self, value: int) -> None:
        self._values.append(value)

    def at(self, share: float) -> int:
        """The value that `share` of the recent ones do not exceed; 0 without values."""
        if not self._values:
            return 0
        ordered = sorted(self._values)
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)]
