"""`ebb doctor`: what would go wrong on this host, before it does."""

from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from ebbtide.cli import checks
from ebbtide.cli.checks import Finding, Grade
from ebbtide.cli.plain import enum_word
from ebbtide.cli.session import Ended, Session, verb
from ebbtide.errors import ConfigError, EbbError, ExitCode
from ebbtide.rpc import agent_pb2

if TYPE_CHECKING:
    from ebbtide.config import Config

_SHADES = {Grade.OK: "green", Grade.WARN: "yellow", Grade.FAIL: "bold red"}


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    verb(app)(doctor)


def doctor(session: Session) -> None:
    """Check kernel, limits, disks, clock, identity, ports and peers; exit code 5 on a failure."""
    findings = [] if session.remote else checks.of_host()
    config: Config | None = None
    if not session.remote:
        try:
            config = session.load_config()
            findings.append(Finding("config", str(session.find_config()), Grade.OK, "is valid"))
        except ConfigError as error:
            findings.append(Finding("config", "agent.toml", Grade.FAIL, error.message, error.hint))
    running, diagnosed = _ask_agent(session)
    if config is not None:
        findings += checks.of_config(config, agent_runs=running)
        if not running:
            findings += checks.of_peers(config)
    findings += diagnosed
    failed = sum(finding.grade is Grade.FAIL for finding in findings)
    warned = sum(finding.grade is Grade.WARN for finding in findings)
    session.out.data(
        {
            "findings": [finding.as_dict() for finding in findings],
            "failed": failed,
            "warned": warned,
            "agent_running": running,
        }
    )
    for finding in findings:
        shade = _SHADES[finding.grade]
        session.out.say(
            f"[{shade}]{finding.grade:<4}[/]  {finding.check:<18} {escape(finding.subject)} "
            f"{escape(finding.message)}"
        )
        if finding.hint and finding.grade is not Grade.OK:
            session.out.say(f"      [bold]hint:[/] {escape(finding.hint)}")
    session.out.say(f"{len(findings)} checks, {failed} failed, {warned} warnings")
    if failed:
        raise Ended(ExitCode.REFUSED)


def _ask_agent(session: Session) -> tuple[bool, list[Finding]]:
    """Whether the agent runs, and what only it can tell."""
    try:
        with session.connect() as client:
            result = client.call("Diagnose", agent_pb2.DiagnoseRequest(), timeout_s=30.0)
    except ConfigError as error:
        if error.code == "version":
            return True, [Finding("agent", "", Grade.FAIL, error.message, error.hint)]
        return False, []
    except EbbError as error:
        grade = Grade.FAIL if session.remote else Grade.WARN
        return False, [Finding("agent", "", grade, error.message, error.hint)]
    grades = {"ok": Grade.OK, "warning": Grade.WARN, "failure": Grade.FAIL}
    levels = agent_pb2.Finding.Level.DESCRIPTOR
    return True, [
        Finding(
            finding.check,
            finding.subject,
            grades.get(enum_word(levels, finding.level), Grade.WARN),
            finding.message,
            finding.hint,
        )
        for finding in result.findings
    ]
