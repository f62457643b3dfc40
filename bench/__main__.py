"""`python -m bench [SUITE] [--quick]`: measure, print a table, write bench/out/<suite>.json."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from bench import boundary, capture, hotpath, machine, rows

ROOT = Path(__file__).parents[1]
SUITES = {"boundary": boundary.run, "capture": capture.run, "hotpath": hotpath.run}


def main() -> int:
    """Run the suites that were asked for; 2 for an unknown one."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("suite", nargs="?", default="all", choices=["all", *SUITES])
    parser.add_argument("--quick", action="store_true", help="small and short; not for quoting")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out")
    arguments = parser.parse_args()
    # Ends as an interrupt does: what was started is stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Debian puts mkfs and losetup where users' PATH does not look.
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    described = machine.describe(Path("/var/tmp"))  # noqa: S108
    for key, value in described.items():
        print(f"{key:12} {value}")
    for name in SUITES if arguments.suite == "all" else [arguments.suite]:
        begun = time.monotonic()
        found: list[rows.Row] = []

        def keep(part: list[rows.Row], found: list[rows.Row] = found, name: str = name) -> None:
            """Write what there is, so that a long run that is cut short leaves something."""
            found.extend(part)
            rows.write(found, arguments.out / f"{name}.json")
            print(f"{part[0].name.rpartition('.')[0]}: {len(part)} rows", file=sys.stderr)

        SUITES[name](ROOT / ".cache" / "bench", keep, quick=arguments.quick)
        note = {
            **described,
            "date": time.strftime("%Y-%m-%d"),
            "quick": str(arguments.quick),
            "took_s": f"{time.monotonic() - begun:.0f}",
        }
        (arguments.out / f"{name}.machine.json").write_text(json.dumps(note, indent=1) + "\n")
        rows.show(f"{name}{' (quick)' if arguments.quick else ''}", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
