"""Where results are printed: a terminal of its own width, or a pipe without colours.

In a pipe lines are ``COLUMNS`` wide or else ``PIPE_WIDTH``. Nothing is ever cut off.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import (
    Progress as Bars,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from bake.errors import BakeError
from bake.progress import Progress, Stages

PIPE_WIDTH = 120
# What moves the cursor, changes the title or turns the reading direction: a title or a note of
# somebody else's artifact could write over what bake says of it.
_CONTROLS = {
    code: None
    for code in (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    if chr(code) not in "\n\t"
}


class Screen(Console):
    """A console that prints no control character of the text that it is given."""

    @override
    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else text.translate(_CONTROLS), style, control)


def console(*, stderr: bool = False) -> Console:
    """Return a console on the stream as it is now."""
    found = Screen(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = PIPE_WIDTH
    return found


def show(parts: Iterable[RenderableType], *, stderr: bool = False) -> None:
    """Print the parts of a result, one below the other."""
    target = console(stderr=stderr)
    if target.is_terminal:
        target.print(*parts, sep="\n")
        return
    with target.capture() as captured:
        target.print(*parts, sep="\n")
    # Cells are padded to their column: nobody wants that at the end of a line of a file.
    lines = captured.get().splitlines()
    click.echo("\n".join(line.rstrip() for line in lines), err=stderr)


def failure(error: "BakeError") -> None:
    """Print an error on stderr: what, then where, why and fix, each on lines of its own."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text("error:", style="bold red"), error.what)
    for label in ("where", "why", "fix"):
        text = getattr(error, label)
        if text is not None:
            grid.add_row(Text(f"{label}:", justify="right"), text)
    show([grid], stderr=True)


@contextmanager
def progress(
    label: str, *, visible: bool = True, unit: str | None = None
) -> Iterator[Progress | None]:
    """Show a bar on stderr, on terminals only; yield the function that moves it.

    Args:
        label: what is being done.
        visible: whether there is to be a bar.
        unit: what is counted; bytes when None.
    """
    target = console(stderr=True)
    if not visible or not target.is_terminal:
        yield None
        return
    counts: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn())
    if unit is not None:
        counts = (MofNCompleteColumn(), TextColumn(unit))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *counts,
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=target) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Prints a line for every stage, and for every part of one."""

    def __init__(self, *, visible: bool) -> None:
        self.visible = visible

    def begin(self, text: str) -> None:
        if self.visible:
            click.echo(text, err=True)

    def expect(self, count: int) -> None:
        pass


class _Bar:
    """Moves a bar by a stage when the next one begins."""

    def __init__(self, bar: Bars) -> None:
        self.bar, self.stage = bar, ""
        self.task = bar.add_task("", total=None)
        self.begun = 0

    def begin(self, text: str) -> None:
        if text.startswith(" "):
            self.bar.update(self.task, description=f"{self.stage}, {text.strip()}")
            return
        self.stage = text
        self.bar.update(self.task, description=text, completed=self.begun)
        self.begun += 1

    def expect(self, count: int) -> None:
        self.bar.update(self.task, total=count)


@contextmanager
def stages(*, visible: bool = True) -> Iterator[Stages]:
    """Show how far long work is, on stderr: a bar on a terminal, elsewhere lines.

    Args:
        visible: whether anything is to be shown.
    """
    target = console(stderr=True)
    if not visible or not target.is_terminal:
        yield _Lines(visible=visible)
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Bars(*columns, console=target, transient=True) as bar:
        yield _Bar(bar)
