"""Where words go: data on standard output, everything else on standard error."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from ebbtide.errors import EbbError, RefusedError

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(slots=True)
class Output:
    """Prints for people, or with `json` for programs."""

    json: bool = False
    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))
    err: Console = field(
        default_factory=lambda: Console(stderr=True, highlight=False, soft_wrap=True)
    )

    def data(self, value: object) -> None:
        """With `--json`: one line of JSON, written at once. Otherwise nothing."""
        if self.json:
            sys.stdout.write(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")
            sys.stdout.flush()

    def say(self, *text: RenderableType) -> None:
        """Without `--json`: a line for people. Markup of rich is understood."""
        if not self.json:
            for line in text or ("",):
                self.console.print(line)

    def note(self, text: str) -> None:
        """A line on standard error, for people only."""
        if not self.json:
            self.err.print(text)

    def error(self, error: EbbError) -> None:
        """The error as `--json` and the page on exit codes promise it."""
        if self.json:
            sys.stderr.write(json.dumps({"error": error.as_dict()}, ensure_ascii=False) + "\n")
        else:
            self.err.print(f"[bold red]error:[/] {escape(error.message)}")
            if error.hint:
                self.err.print(f"[bold]hint:[/] {escape(error.hint)}")
        sys.stderr.flush()

    def confirm(self, question: str, *, yes: bool) -> None:
        """Ask before something that cannot be undone. Raises `RefusedError` unless agreed."""
        if yes:
            return
        if self.json or not sys.stdin.isatty():
            raise RefusedError(
                f"not confirmed: {question}", code="unconfirmed", hint="add --yes to agree"
            )
        self.err.print(f"{escape(question)} [bold]Type yes to go on:[/] ", end="")
        if sys.stdin.readline().strip().lower() != "yes":
            raise RefusedError("not confirmed, nothing was done", code="unconfirmed")


def silence(stream: Any) -> None:
    """Send what is still buffered nowhere: the reader of our output has gone away."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def plural(count: int, noun: str, ending: str = "s") -> str:
    """`1 write`, `2 writes`, `12,345 flushes`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{ending}"
