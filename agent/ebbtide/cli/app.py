"""Puts the verbs together and turns whatever happens into a documented exit code."""

import os
import sys
import traceback

import typer

# Before grpc is loaded: its C core would write its own lines between ours.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from ebbtide.cli import (
    agent_verb,
    demo_verb,
    doctor,
    init,
    points,
    protect,
    restore,
    status,
    view,
)
from ebbtide.cli.output import Output, silence
from ebbtide.cli.session import (
    AgentOption,
    Before,
    ConfigOption,
    Ended,
    JsonOption,
)
from ebbtide.errors import ExitCode, InternalError, UsageError

app = typer.Typer(
    name="ebb",
    help="Continuous data protection: every write of a volume, and any microsecond of it back.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for module in (demo_verb, init, doctor, agent_verb, protect, status, points, view, restore):
    module.register(app)


@app.callback()
def _root(
    context: typer.Context,
    config_path: ConfigOption = None,
    agent_name: AgentOption = "",
    json: JsonOption = False,
) -> None:
    """Continuous data protection: every write of a volume, and any microsecond of it back."""
    context.obj = Before(config_path, agent_name, json)


def run(arguments: list[str]) -> int:
    """Run `ebb` with these arguments; returns the exit code. Never raises, never a traceback."""
    out = Output(json="--json" in arguments)
    try:
        result = app(arguments or ["--help"], prog_name="ebb", standalone_mode=False)
        sys.stdout.flush()
    except Ended as ended:
        return ended.code
    except (typer.Abort, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        silence(sys.stdout)
        return ExitCode.CLOSED_PIPE
    except SystemExit as ended:  # typer's answer to a closed pipe while it prints help
        silence(sys.stdout)
        return ExitCode.CLOSED_PIPE if ended.code == 1 else ExitCode.INTERNAL
    except Exception as error:  # noqa: BLE001 - the one place where nothing may get through
        # Typer before 0.26 raises click's exceptions, later ones their own copies: go by shape.
        if (usage := getattr(error, "format_message", None)) is not None:
            words = [] if "No such command" in usage() else arguments
            out.error(UsageError(usage(), hint=f"see 'ebb {_verbs(words)}--help'"))
            return ExitCode.USAGE
        if os.environ.get("EBB_DEBUG"):
            traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        hint = "this is a defect; run again with EBB_DEBUG=1 and report what it prints"
        out.error(InternalError(message, hint=hint))
        return ExitCode.INTERNAL
    return result if isinstance(result, int) else ExitCode.OK


def _verbs(arguments: list[str]) -> str:
    """The leading words of a command line, for a hint."""
    words = []
    for argument in arguments[:2]:
        if argument.startswith("-"):
            break
        words.append(argument)
    if words and words[0] != "view":
        words = words[:1]
    return "".join(f"{word} " for word in words)
