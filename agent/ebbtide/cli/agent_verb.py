"""`ebb agent`: run the agent in the foreground (systemd and `ebb demo` start it like this)."""

from __future__ import annotations

import typer  # noqa: TC002 - the signature is read at run time

from ebbtide.cli.session import Ended, Session, verb


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    verb(app, "agent")(agent)


def agent(session: Session) -> None:
    """Run the agent until SIGTERM or Ctrl-C. Servers of taps and views outlive it."""
    from ebbtide.agent import run  # the agent's modules are not needed by any other verb

    code = run(session.find_config())
    if code:
        raise Ended(code)
