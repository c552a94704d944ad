"""The pieces of which results are made: facts, sections, tables, verdicts, lists of sites."""

import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bake.sites import summary

if TYPE_CHECKING:
    from bake.families import Layout
    from bake.sites import Site

Fact = tuple[str | Text, str | Text]
"""A name and a value."""
STYLES = {
    "exact": "green",
    "relocated": "yellow",
    "nulling": "yellow",
    "approximate": "yellow",
    "impossible": "red",
    "refused": "red",
    "not tested": "yellow",
}


def facts(rows: Iterable[Fact]) -> Table:
    """Return names and values in two columns."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value)
    return grid


def next_step(*words: object) -> Fact:
    """Return the command that comes next, as a shell takes it; words in capitals are to choose."""
    spelled = (word if word.isupper() else shlex.quote(word) for word in map(str, words))
    return "next", " ".join(spelled)


def section(title: str, body: RenderableType) -> Group:
    """Return a part of a result under its title."""
    return Group(Text(f"\n{title}", style="bold"), body)


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """Return an empty table; the columns named in ``right`` hold numbers."""
    made = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold"
    )
    for name in columns:
        made.add_column(
            name,
            overflow="fold",
            justify="right" if name in right else "left",
            no_wrap=name in right,
        )
    return made


def word(text: str) -> Text:
    """Return a verdict in its colour."""
    return Text(text, style=STYLES.get(text, ""))


def indented(lines: Iterable[str]) -> Group:
    """Return lines with a dash before each, wrapped under their own beginning."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for line in lines:
        grid.add_row("-", line)
    return Group(Padding(grid, (0, 0, 0, 1)))


def listed(title: str, lines: Sequence[str]) -> list[RenderableType]:
    """Return lines as a part under its title, or nothing where there are none."""
    return [section(title, indented(lines))] if lines else []


def size(count: int) -> str:
    """Return a number of bytes in a few characters: ``1.2 GB``."""
    return decimal(count).replace(" bytes", " B").replace(" byte", " B")


def site_list(sites: Sequence["Site"], layout: "Layout | None" = None) -> str:
    """Return sites in a few words: ``resid_post.0-31, z.3.h5``; ``resid`` for the whole stream."""
    if layout is not None and set(sites) == set(layout.stream):
        return f"resid (all {len(sites)} sites)"
    return summary(sites)
