"""How results and failures leave: as tables, as JSON, or not at all."""

import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from bake.errors import BakeError, InputError
from bake.progress import Progress, Stages

KEPT = "bake.kept"
"""Key of ``Context.meta``: a function that says, after an interruption, what is left on disk."""
NOTHING_KEPT = "nothing was written"
_BEGUN = "bake.begun"
"""Key of ``Context.meta``: whether a line stands on the terminal that what follows replaces."""

# What says more of the call than of the disk.
_NOT_THE_MACHINE = {
    None,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOTEMPTY,
    errno.EBADF,
    errno.EINVAL,
    errno.EPIPE,
}


@dataclass(frozen=True, slots=True)
class Output:
    """What the user wants to see of a result."""

    as_json: bool
    verbose: int
    """0 for what matters, 1 for details, 2 for every tensor."""
    quiet: bool

    def begins(self, text: str) -> None:
        """Say on a terminal what is begun, at once: torch alone is a second to import."""
        if not self.quiet and not self.as_json and sys.stderr.isatty():
            click.echo(f"{text} …\r", err=True, nl=False)
            click.get_current_context().meta[_BEGUN] = True

    def present(
        self,
        *,
        data: Callable[[], Mapping[str, Any]],
        view: Callable[[], Iterable[Any]],
        brief: Callable[[], Iterable[Any]] | None = None,
        error: BakeError | None = None,
    ) -> None:
        """Print a result: ``data`` with ``--json``, the renderables of ``view`` otherwise.

        Args:
            data: the result as JSON values.
            view: the result as renderables.
            brief: the same in a few lines, which are printed unless details are asked for; none
                of them where the error says it all.
            error: what the result means, where that is a failure: raised once it is printed.
        """
        _clear()
        if self.as_json:
            content = dict(data()) if error is None else {**data(), **_failure(error)}
            click.echo(json.dumps(content, indent=2, ensure_ascii=False))
            if error is not None:
                click.get_current_context().exit(error.exit_code)
            return
        parts = [] if self.quiet else [*(brief if brief and not self.verbose else view)()]
        if parts:
            from bake.cli.render.screen import show

            show(parts)
        if error is not None:
            raise error

    def bar(
        self, label: str, *, unit: str | None = None
    ) -> AbstractContextManager[Progress | None]:
        """Open a bar for one piece of work, where somebody looks."""
        from bake.cli.render.screen import progress

        _clear()
        return progress(label, visible=not self.quiet, unit=unit)

    def stages(self) -> AbstractContextManager[Stages]:
        """Show stages: a bar with an estimate on a terminal, and elsewhere a line for each."""
        from bake.cli.render.screen import stages

        _clear()
        return stages(visible=not self.quiet and not self.as_json)

    def keeps(self, out: Path) -> None:
        """Say after an interrupt what of an output is kept."""
        click.get_current_context().meta[KEPT] = partial(_kept, out)

    def remark(self, text: str) -> None:
        """Print a line for whoever waits, beside the result."""
        if not self.as_json and not self.quiet:
            _clear()
            click.echo(text, err=True)


def _clear() -> None:
    """Take away the line that ``begins`` has left."""
    context = click.get_current_context(silent=True)
    if context is not None and context.meta.pop(_BEGUN, False):
        click.echo("\x1b[2K\r", err=True, nl=False)


def bake_command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """Return a decorator that makes a function a command; it is called with an ``Output`` first."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(*args: Any, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
            if verbose and quiet:
                raise click.UsageError("-v and -q exclude each other")
            if quiet or as_json or not sys.stderr.isatty():
                # The Hub client's own bars, and transformers'; both read it when they are imported.
                os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            output = Output(as_json, verbose, quiet)
            output.begins(f"bake {name}")
            function(output, *args, **options)

        for option in (
            click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
            click.option(
                "-v", "--verbose", count=True, help="Print the details; -vv every tensor."
            ),
            click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else."),
        ):
            run = option(run)
        return click.command(name)(run)

    return decorate


def report_failure(error: BakeError, *, as_json: bool) -> None:
    """Print an error: what, where, why and fix; as an object on stdout with ``--json``."""
    _clear()
    try:
        if as_json:
            click.echo(json.dumps(_failure(error), indent=2, ensure_ascii=False))
            return
        sys.stdout.flush()
    except OSError:  # nobody can write there, so what is left of it is dropped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    from bake.cli.render.screen import failure

    failure(error)


def refused(error: OSError) -> InputError:
    """Return in words what the machine refuses: a disk, a file, a folder.

    Raises:
        OSError: it is none of these: a path that bake got wrong, a pipe that nobody reads, or a
            library's own.
    """
    if error.errno in _NOT_THE_MACHINE:
        raise error
    return InputError(
        f"the machine refuses: {error.strerror}",
        where=None if error.filename is None else os.fsdecode(error.filename),
        fix="see to the disk and its permissions, then run the same command again",
    )


def _failure(error: BakeError) -> dict[str, Any]:
    content = {
        "type": type(error).__name__,
        "what": error.what,
        "where": error.where,
        "why": error.why,
        "fix": error.fix,
        "exit_code": error.exit_code,
    }
    return {"error": content}


def _kept(out: Path) -> str:
    from bake.artifact.staged import partial_of

    unfinished = partial_of(out)
    if not unfinished.exists():
        return NOTHING_KEPT
    return (
        f"{out} was not written; finished files are in {unfinished}; the same command takes them up"
    )
