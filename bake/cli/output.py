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

from bake.errors import BakeError, InputError, UsageError
from bake.progress import Progress

KEPT = "bake.kept"
"""Key of ``Context.meta``: a function that says, after an interruption, what is left on disk."""
NOTHING_KEPT = "nothing was written"

# What the machine refuses, rather than what bake gets wrong.
_REFUSALS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENAMETOOLONG,
}


@dataclass(frozen=True, slots=True)
class Output:
    """What the user wants to see of a result."""

    as_json: bool
    verbose: bool
    quiet: bool

    def present(
        self,
        *,
        data: Callable[[], Mapping[str, Any]],
        view: Callable[[], Iterable[Any]],
        error: BakeError | None = None,
    ) -> None:
        """Print a result: ``data`` with ``--json``, the renderables of ``view`` otherwise.

        Args:
            data: the result as JSON values.
            view: the result as renderables.
            error: what the result means, where that is a failure: raised once it is printed.
        """
        if self.as_json:
            content = dict(data()) if error is None else {**data(), **_failure(error)}
            click.echo(json.dumps(content, indent=2, ensure_ascii=False))
            if error is not None:
                click.get_current_context().exit(error.exit_code)
            return
        if not self.quiet:
            from bake.cli.render import show

            show(view())
        if error is not None:
            raise error

    def bar(
        self, label: str, *, unit: str | None = None
    ) -> AbstractContextManager[Progress | None]:
        """Open a bar for one piece of work, where somebody looks."""
        from bake.cli.render import progress

        return progress(label, visible=not self.quiet, unit=unit)

    def keeps(self, out: Path, kind: str = "partial") -> None:
        """Say after an interrupt what of an output is kept."""
        click.get_current_context().meta[KEPT] = partial(_kept, out, kind)

    def remark(self, text: str) -> None:
        """Print a line for whoever waits, beside the result."""
        if not self.as_json and not self.quiet:
            click.echo(text, err=True)


def command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """Return a decorator that makes a function a command; it is called with an ``Output`` first."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(*args: Any, as_json: bool, verbose: bool, quiet: bool, **options: Any) -> None:
            if verbose and quiet:
                raise click.UsageError("-v and -q exclude each other")
            if quiet or as_json or not sys.stderr.isatty():
                # The Hub client's own bars, and transformers'; both read it when they are imported.
                os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            try:
                function(Output(as_json, verbose, quiet), *args, **options)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                raise InputError(
                    f"the machine refuses: {error.strerror}",
                    where=None if error.filename is None else str(error.filename),
                    fix="see to the disk and its permissions, then run the same command again",
                ) from error

        for option in (
            click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
            click.option("-v", "--verbose", is_flag=True, help="Print every tensor."),
            click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else."),
        ):
            run = option(run)
        return click.command(name)(run)

    return decorate


def report_failure(error: BakeError, *, as_json: bool) -> None:
    """Print an error: what, where, why and fix; as an object on stdout with ``--json``."""
    if as_json:
        click.echo(json.dumps(_failure(error), indent=2, ensure_ascii=False))
        return
    from bake.cli.render import failure

    failure(error)


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


def check_out(out: Path, *, force: bool) -> None:
    """Refuse an output that is in the way before anything is read or downloaded."""
    if out.exists() and not force and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} exists and is not empty", fix="name another output, or use --force"
        )


def _kept(out: Path, kind: str) -> str:
    unfinished = out.absolute().with_name(f".{out.name}.bake-{kind}")
    if not unfinished.exists():
        return NOTHING_KEPT
    return (
        f"{out} was not written; finished files are in {unfinished}; the same command takes them up"
    )
