"""The command line: every command parses, calls into the library and prints one object.

Commands are modules that are imported when they are asked for, and import torch and everything
above it inside their functions, so that ``bake --help`` answers at once.
"""

import difflib
import importlib

import click
from typing_extensions import override

from bake import __version__
from bake.cli.output import KEPT, NOTHING_KEPT, report_failure
from bake.errors import BakeError, UsageError

COMMANDS = (
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
INTERRUPTED = 130  # as a shell counts it: 128 + SIGINT


class Commands(click.Group):
    """The commands by name, loaded when asked for, with bake's exit codes."""

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    @override
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"bake.cli.{cmd_name}").command
        return command

    @override
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            raise UsageError(
                f"there is no command {args[0]!r}",
                fix=f"did you mean {near[0]!r}?" if near else f"they are {', '.join(COMMANDS)}",
            )
        return super().resolve_command(ctx, args)

    @override
    def invoke(self, ctx: click.Context) -> object:
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except BakeError as error:
            report_failure(error, as_json=as_json)
            ctx.exit(error.exit_code)
        except click.UsageError as error:
            if not as_json:
                raise
            report_failure(UsageError(error.format_message()), as_json=True)
            ctx.exit(UsageError.exit_code)
        except KeyboardInterrupt:
            click.echo("\ninterrupted: " + ctx.meta.get(KEPT, lambda: NOTHING_KEPT)(), err=True)
            ctx.exit(INTERRUPTED)


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
