"""`ebb demo`: the main job on this machine, from protection through an accident to the proof."""

from __future__ import annotations

import typer  # noqa: TC002 - the signature is read at run time


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
