"""The command line `ebb`. It talks to an agent; it never touches a log or a volume itself."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the program `ebb`."""
    try:
        from ebbtide.cli.app import run  # takes a while: Ctrl-C may come here too
    except KeyboardInterrupt:
        sys.exit(130)
    except ImportError as error:
        sys.stderr.write(f"error: {error}\nhint: build and install the package: make build\n")
        sys.exit(1)
    sys.exit(run(sys.argv[1:]))
