"""`python -m ebbtide.cli` is `ebb`."""

from ebbtide.cli import main

main()
