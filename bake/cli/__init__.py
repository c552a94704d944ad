"""The command line: every command parses, calls into the library and prints one object.

Commands are modules that are imported when they are asked for, and import torch and everything
above it inside their functions, so that ``bake --help`` answers at once.
"""

import importlib
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import click
from typing_extensions import override

from bake import __version__
from bake.cli.output import KEPT, NOTHING_KEPT, refused, report_failure
from bake.errors import BakeError, UsageError
from bake.section import nearest

COMMANDS = (
    "fit",
    "init",
    "try",
    "plan",
    "export",
    "verify",
    "diff",
    "check",
    "card",
    "push",
    "merge",
    "revert",
    "directions",
    "families",
)
_MODULES = {"try": "trying"}
"""Where a command is whose name is a word of Python."""


class Interrupted(KeyboardInterrupt):
    """A signal that asks bake to stop."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP stop the work alike: it cleans up, and its children end.

    What the caller has set to be ignored stays so, as SIGHUP under ``nohup``.
    """

    def stop(number: int, _: object) -> None:
        raise Interrupted(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise refused(error) from error


class Commands(click.Group):
    """The commands by name, loaded when asked for, with bake's exit codes."""

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    @override
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(
            f"bake.cli.{_MODULES.get(cmd_name, cmd_name)}"
        ).command
        return command

    @override
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            fix = nearest(args[0], COMMANDS)
            raise UsageError(f"there is no command {args[0]!r}", fix=fix)
        return super().resolve_command(ctx, args)

    @override
    def invoke(self, ctx: click.Context) -> object:
        as_json = "--json" in ctx.args
        try:
            with interruptible(), _in_words():
                return super().invoke(ctx)
        except BakeError as error:
            report_failure(error, as_json=as_json)
            ctx.exit(error.exit_code)
        except click.UsageError as error:
            command = "bake" if error.ctx is None else error.ctx.command_path
            what, _, near = error.format_message().rstrip(".").partition(". Did you mean ")
            fix = f"did you mean {near}" if near else f"{command} --help says what it takes"
            report_failure(UsageError(what, fix=fix), as_json=as_json)
            ctx.exit(UsageError.exit_code)
        except KeyboardInterrupt as error:
            click.echo("\ninterrupted: " + ctx.meta.get(KEPT, lambda: NOTHING_KEPT)(), err=True)
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            ctx.exit(128 + number)  # as a shell counts it


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bake")
def main() -> None:
    """Fold activation edits into stock model weights, and verify the result.

    A recipe names a model, fitted directions and edits; bake says what would change and whether
    it is exact, writes the edited checkpoint, and measures it against the same edits as hooks.

    Exit codes: 0 done; 1 verification failed; 2 usage; 3 the plan is not exact and the recipe
    does not allow it; 4 an input is missing, malformed or hostile; 5 network or Hub; 6 a plan
    said exact and the measurement disagrees.
    """
