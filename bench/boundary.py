"""Suite `boundary`: what one call from Python into native code costs the agents.

The agents handle batches, never blocks, so these costs are paid some hundred times a second. Timed
by pytest-benchmark, which runs `test_boundary.py`; there is no peer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bench.rows import Row, missing

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = ("append", "sync", "next_batch", "open_history")


def run(cache: Path, keep: Callable[[list[Row]], None], *, quick: bool) -> None:
    """Run pytest-benchmark in a process of its own and take its medians."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as directory:
        report = Path(directory) / "report.json"
        done = subprocess.run(
            [
                sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                str(Path(__file__).with_name("test_boundary.py")),
                f"--benchmark-json={report}", f"--benchmark-max-time={0.2 if quick else 1.0}",
            ],
            check=False,
            capture_output=True,
            text=True,
        )  # fmt: skip
        if not report.exists() or not report.stat().st_size:
            reason = (done.stdout + done.stderr)[-200:]
            keep([missing(f"boundary.{case}_us", "us", "lower", reason) for case in CASES])
            return
        found = {
            entry["name"].removeprefix("test_"): entry["stats"]
            for entry in json.loads(report.read_text())["benchmarks"]
        }
    keep(
        [
            Row(
                name=f"boundary.{case}_us",
                value=found[case]["median"] * 1e6,
                min=found[case]["min"] * 1e6,
                max=found[case]["max"] * 1e6,
                unit="us",
                better="lower",
                runs=found[case]["rounds"],
            )
            for case in CASES
        ]
    )
