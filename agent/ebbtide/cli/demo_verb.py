"""`ebb demo`: the main job on this machine, from protection through an accident to the proof."""

import os
import shutil
import signal
from pathlib import Path
from typing import Annotated

import typer

from ebbtide.cli.output import Output
from ebbtide.cli.session import Session, verb
from ebbtide.errors import UsageError

#: What a mounted demo needs beyond root.
DEVICES = ("/dev/fuse", "/dev/loop-control")
TOOLS = ("mkfs.ext4", "mount", "umount", "blkid")


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    verb(app)(demo)


def demo(
    session: Session,
    seconds: Annotated[
        float, typer.Option("--seconds", min=1, max=60, help="How long the hospital works.")
    ] = 8.0,
    use_socket: Annotated[
        bool, typer.Option("--socket", help="NBD socket instead of a block device.")
    ] = False,
) -> None:
    """Protect a volume, have an accident, find the last good microsecond, and prove it."""
    from ebbtide.cli.demo.story import Story  # its modules are not needed by any other verb

    if session.remote:
        raise UsageError("the demo brings its own agents", hint="leave out --agent")
    if not use_socket and (reason := why_no_block_device()):
        session.out.say(f"{reason}: the demo goes over the NBD socket")
        use_socket = True
    story = Story(session.out, work_s=seconds, use_socket=use_socket)
    _interrupt_on_end(session.out)
    story.run()
    session.out.data(story.numbers.values)


def why_no_block_device() -> str:
    """What this machine lacks to mount, in words; empty if nothing."""
    if os.geteuid() != 0:
        return "not root"
    for path in DEVICES:
        if not Path(path).exists():
            return f"no {path}"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    for tool in TOOLS:
        if shutil.which(tool, path=path) is None:
            return f"no {tool}"
    return ""


def _interrupt_on_end(out: Output) -> None:
    """SIGTERM and SIGHUP are as Ctrl-C: the demo cleans up first."""

    def interrupt(number: int, frame: object) -> None:
        del frame
        out.note(f"got {signal.Signals(number).name}: taking everything down")
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
