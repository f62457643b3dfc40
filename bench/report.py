"""`python -m bench.report SUITE...`: the newest results as Markdown, for `bench/RESULTS.md`.

Numbers come from `bench/out/` alone; what they mean, a person adds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.rows import number

OUT = Path(__file__).parent / "out"


def section(suite: str) -> str:
    """Heading, machine and table of one suite's last run."""
    rows: list[dict[str, Any]] = json.loads((OUT / f"{suite}.json").read_text())
    on: dict[str, str] = json.loads((OUT / f"{suite}.machine.json").read_text())
    form = "short form, not for quoting" if on["quick"] == "True" else "full form"
    machine = (
        f"{on['cpu']}, {on['cpus']} cores, {on['memory']}, kernel {on['kernel']}, {on['disk']}; "
        f"load before {on['load_before']}; pinning: {on['pinning']}. {on['fio']}, "
        f"{on['nbdkit']}, {on['qemu-nbd']}, {on['rustc']}, commit {on['git']}. "
        f"Took {on['took_s']} s."
    )
    lines = [
        f"## {on['date']}, suite `{suite}`, {form}",
        "",
        machine,
        "",
        "| row | median | spread | unit | peer | runs |",
        "|---|---|---|---|---|---|",
    ]
    lines.extend(_line(row) for row in rows)
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    spread = f"{number(row['min'])} .. {number(row['max'])}"
    peer = row["peer"] or ""
    if peer and row["unit"] != "ratio" and row["peer_value"] is not None:
        peer += f" {number(row['peer_value'])}"
    if row["value"] is None:
        spread, peer = row["reason"], row["peer"] or ""
    cells = (f"`{row['name']}`", number(row["value"]), spread, row["unit"], peer, row["runs"])
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    print("\n".join(map(section, sys.argv[1:])))
