"""The command line `ebb`. It talks to an agent; it never touches a log or a volume itself."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the program `ebb`."""
    from ebbtide.cli.app import run

    sys.exit(run(sys.argv[1:]))
