"""Results as tables for a reader. What a table says is in the objects; nothing is computed here.

On a terminal tables fit its width, and words wrap. In a pipe there are no colours, and lines are
``COLUMNS`` wide or else ``PIPE_WIDTH``. Nothing is ever cut off.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from bake.cli.request import Request
    from bake.directions import Directions
    from bake.errors import BakeError
    from bake.families import Family, Layout
    from bake.outputs import Artifact
    from bake.plan import Finding, Plan
    from bake.sites import Site
    from bake.verify.report import Report

PIPE_WIDTH = 120
STYLES = {
    "exact": "green",
    "nulling": "yellow",
    "approximate": "yellow",
    "impossible": "red",
    "refused": "red",
    "not tested": "yellow",
}


def console(*, stderr: bool = False) -> Console:
    """Return a console on the stream as it is now."""
    found = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
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
) -> Iterator[Callable[[int, int], None] | None]:
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
    with Progress(*columns, console=target) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# --- pieces ------------------------------------------------------------------------------------


def facts(rows: Iterable[tuple[str, str] | tuple[str, str | Text]]) -> Table:
    """Return names and values in two columns."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value)
    return grid


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


def size(count: int) -> str:
    """Return a number of bytes in a few characters: ``1.2 GB``."""
    return decimal(count).replace(" bytes", " B").replace(" byte", " B")


def span(numbers: Iterable[int]) -> str:
    """Return whole numbers in a few words: ``0,3-7``."""
    ordered = sorted(set(numbers))
    runs = []
    for _, group in groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        runs.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return ",".join(runs)


def site_list(sites: Sequence["Site"], layout: "Layout | None" = None) -> str:
    """Return sites in a few words: ``resid_post.0-31, z.3.h5``; ``resid`` for the whole stream."""
    if layout is not None and set(sites) == set(layout.stream):
        return f"resid (all {len(sites)} sites)"
    layers: dict[tuple[str, int | None], list[int]] = {}
    for site in sites:
        found = layers.setdefault((site.kind, site.head), [])
        if site.layer is not None:
            found.append(site.layer)
    return ", ".join(
        kind + (f".{span(found)}" if found else "") + ("" if head is None else f".h{head}")
        for (kind, head), found in layers.items()
    )


@dataclass(frozen=True, slots=True)
class Named:
    """A tensor as a row of a table."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    note: str

    @property
    def new(self) -> bool:
        """Whether the base has no such tensor."""
        return self.note.startswith("new")


_NUMBER = re.compile(r"\d+")


def merged(texts: Sequence[str]) -> str | None:
    """Return texts that differ only in numbers as one: ``model.layers.0-31.mlp.weight``.

    None where the numbers are no full grid (every layer with every expert, say), so that one text
    would say more than the many.
    """
    columns = zip(*(map(int, _NUMBER.findall(text)) for text in texts), strict=True)
    axes = list(columns)
    if prod(len(set(axis)) for axis in set(axes)) != len(set(texts)):
        return None
    spans = iter([span(axis) for axis in axes])
    return _NUMBER.sub(lambda _: next(spans), texts[0])


def tensor_table(rows: Sequence[Named], *, verbose: bool) -> Table:
    """Return tensors with their sizes, those of all layers in one row unless ``verbose``."""
    made = table("tensor", "n", "shape", "bytes", "change", right=("n", "bytes"))
    groups: dict[tuple[str, tuple[int, ...], str], list[Named]] = {}
    for row in rows:
        key = (row.name if verbose else _NUMBER.sub("#", row.name), row.shape, row.note)
        groups.setdefault(key, []).append(row)
    for (_, shape, note), group in groups.items():
        pattern = merged([row.name for row in group])
        shown = [group] if pattern is not None else [[row] for row in group]
        for part in shown:
            name = pattern if pattern is not None else part[0].name
            total = size(sum(row.nbytes for row in part))
            made.add_row(name, str(len(part)), "×".join(map(str, shape)), total, note)
    return made


# --- plan --------------------------------------------------------------------------------------


def plan(request: "Request", *, verbose: bool) -> list[RenderableType]:
    """Return a plan: model, findings, changes, runtimes, notes and digest."""
    from bake.cli import matrix

    made, checkpoint = request.plan, request.checkpoint
    parts: list[RenderableType] = [facts(_header(request))]
    parts.append(section("Findings", _findings(made)))
    rows = changed_tensors(request)
    if rows:
        parts.append(section(_changes_title(rows), tensor_table(rows, verbose=verbose)))
    if made.config:
        parts.append(section("config.json", _config(made)))
    chosen = request.recipe.export.to
    parts.append(section(f"Runtimes: {', '.join(chosen)}", Group(*matrix.runtimes(made, chosen))))
    parts.append(section("Carriers", matrix.carriers(made)))
    if made.notes:
        parts.append(section("Notes", indented(made.notes)))
    if checkpoint.left_out and verbose:
        parts.append(section("Files of the base that do not travel", indented(checkpoint.left_out)))
    parts.append(Text())
    parts.append(facts([("plan", word(str(made.exactness))), ("digest", made.digest)]))
    return parts


def _header(request: "Request") -> list[tuple[str, str | Text]]:
    recipe, checkpoint, layout = request.recipe, request.checkpoint, request.layout
    revision = "" if checkpoint.revision is None else f" @ {checkpoint.revision}"
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    return [
        ("recipe", f"{recipe.title} ({recipe.path})"),
        ("model", f"{checkpoint.source}{revision}"),
        ("family", f"{layout.family.name}: {layout.family.title}"),
        (
            "size",
            f"{layout.layers} blocks, width {layout.hidden}, {size(total)} in {layout.dtype}",
        ),
        ("head", _head(layout)),
    ]


def _head(layout: "Layout") -> str:
    return "tied to the embedding" if layout.tied else "separate from the embedding"


def _findings(made: "Plan") -> Table:
    """Return the findings; those that differ only in their layers share a row."""
    rows = table("exactness", "edit, where, and why")
    groups: dict[tuple[str, str, str], list[tuple[Finding, str]]] = {}
    for finding in made.findings:
        why = finding.reason + ("" if finding.remedy is None else f"\nfix: {finding.remedy}")
        edit, exactness = f"{finding.kind} {finding.concept}", str(finding.exactness)
        group = groups.setdefault((edit, exactness, _NUMBER.sub("#", why)), [])
        group.append((finding, why))
    for (edit, exactness, _), group in groups.items():
        one = merged([why for _, why in group])
        for part in [group] if one is not None else [[pair] for pair in group]:
            sites = [site for finding, _ in part for site in finding.sites]
            title = f"{edit} at {site_list(sites, made.layout)}"
            why = part[0][1] if one is None else one
            rows.add_row(word(exactness), Text(title, "bold").append(f"\n{why}", "not bold"))
    return rows


def changed_tensors(request: "Request") -> list[Named]:
    """Return every tensor that the plan edits or creates, in the order of the plan."""
    tensors = request.checkpoint.tensors
    per_item = tensors[request.plan.layout.embed].nbytes // prod(
        tensors[request.plan.layout.embed].shape
    )
    rows = []
    for update in request.plan.tensors:
        note = "new" if update.create else "edited"
        rows.append(Named(update.name, update.shape, tensors[update.source].nbytes, note))
    for bias in request.plan.biases:
        known = tensors.get(bias.name)
        size = bias.size * per_item if known is None else known.nbytes
        note = ("new, zeros" if bias.is_zero() else "new") if bias.create else "edited"
        rows.append(Named(bias.name, (bias.size,), size, note))
    return rows


def _changes_title(rows: Sequence[Named]) -> str:
    counts = []
    for what, new in (("edited", False), ("new", True)):
        sizes = [row.nbytes for row in rows if row.new is new]
        if sizes:
            plural = "s" * (len(sizes) != 1)
            counts.append(f"{len(sizes)} tensor{plural} {what} ({size(sum(sizes))})")
    return f"Changes: {', '.join(counts)}"


def _config(made: "Plan") -> Table:
    rows = table("key", "old", "new")
    for change in made.config:
        old = "(absent)" if change.old is None else json.dumps(change.old)
        rows.add_row(change.key, old, "(removed)" if change.new is None else json.dumps(change.new))
    return rows


# --- other results -----------------------------------------------------------------------------


def artifact(made: "Artifact", request: "Request", *, verbose: bool) -> list[RenderableType]:
    """Return what an export wrote."""
    rows = changed_tensors(request)
    edited = sum(row.nbytes for row in rows if not row.new)
    new = sum(row.nbytes for row in rows if row.new)
    total = sum(info.nbytes for info in request.checkpoint.tensors.values())
    listed = [
        ("written", str(made.path)),
        ("size", f"{made.bytes_written:,} bytes in {len(made.files)} files"),
        ("copied", f"{total - edited:,} bytes of tensors, as they were"),
        ("edited", f"{edited:,} bytes of tensors"),
        *([("new", f"{new:,} bytes of tensors")] if new else []),
    ]
    parts: list[RenderableType] = [Text(), facts(listed)]
    if verbose:
        files = table("file", "sha256")
        for name, digest in made.files.items():
            files.add_row(name, digest.removeprefix("sha256:"))
        parts.append(section("Files", files))
    return parts


def directions(found: "Directions", rows: Sequence[Any]) -> list[RenderableType]:
    """Return what an artifact holds."""
    parts: list[RenderableType] = [
        facts(
            [
                ("concept", found.concept),
                ("format", found.format),
                ("file", found.source),
                ("digest", found.digest),
                ("width", str(found.width)),
            ]
        )
    ]
    made = table(
        "layer", "site", "role", "shape", "type", "norm", "cosine",
        right=("layer", "norm", "cosine"),
    )  # fmt: skip
    for row in rows:
        made.add_row(
            "" if row.layer is None else str(row.layer),
            row.site or "",
            str(row.role),
            "×".join(map(str, row.shape)),
            row.dtype,
            f"{row.norm:.4g}",
            "" if row.cosine is None else f"{row.cosine:+.3f}",
        )
    parts.append(section("Directions (cosine: to the one before)", made))
    spectra = [row for row in rows if row.singular_values]
    if spectra:
        made = table("layer", "singular values", right=("layer",))
        for row in spectra:
            values = ", ".join(f"{value:.4g}" for value in row.singular_values)
            made.add_row("" if row.layer is None else str(row.layer), values)
        parts.append(section("Subspaces", made))
    if found.metadata:
        parts.append(
            section("Metadata", facts((str(k), str(v)) for k, v in found.metadata.items()))
        )
    return parts


def families(found: Sequence["Family"]) -> list[RenderableType]:
    """Return the tables that bake knows."""
    made = table("family", "architectures", "models")
    for family in found:
        made.add_row(family.name, ", ".join(family.architectures), family.title)
    return [made]


def model_check(
    layout: "Layout", source: str, slots: Sequence[Mapping[str, Any]], sites: Sequence["Site"]
) -> list[RenderableType]:
    """Return how a model and its table fit."""
    family = layout.family
    claimed = len(layout.shapes) - len(layout.untouched)
    parts: list[RenderableType] = [
        facts(
            [
                ("model", source),
                ("family", f"{family.name}: {family.title}"),
                ("read from", family.source),
                ("tensors", f"{claimed} claimed, {len(layout.untouched)} left as they are"),
                ("head", _head(layout)),
            ]
        ),
        section("Sites", Text(site_list(sites))),
    ]
    made = table("linear layer", "bias", "config flag", "applied by")
    for slot in slots:
        made.add_row(slot["module"], slot["state"], slot["flag"] or "", ", ".join(slot["runtimes"]))
    parts.append(section("Bias slots", made))
    runtimes = table("runtime", "untied head", "other biases", "adapters of", "read from")
    for name, runtime in family.runtimes.items():
        head: str = "loaded" if runtime.untied_head else runtime.extra_head
        biases = runtime.extra_bias if runtime.checkpoint else ""
        adapters = "" if runtime.lora is None else ", ".join(runtime.lora) or "none"
        head = head if runtime.checkpoint else "no checkpoint"
        runtimes.add_row(name, head, biases, adapters, runtime.source)
    parts.append(section("Runtimes", runtimes))
    ran = [(name, ", ".join(carriers)) for name, carriers in family.run.items() if carriers]
    parts.append(section("Carriers that tests have run", facts(ran or [("none", "")])))
    if family.recasts:
        names = [f"as {recast.family}" for recast in family.recasts]
        parts.append(section('Can be declared, with allow = ["recast"]', indented(names)))
    if layout.untouched:
        parts.append(section("Tensors left as they are", indented(layout.untouched)))
    return parts


def report(found: "Report") -> list[RenderableType]:
    """Return what a verification measured."""
    made = table("comparison", "measured", "limit", "", "", right=("measured", "limit"))
    verdicts = {True: Text("pass", "green"), False: Text("FAIL", "bold red"), None: Text("")}
    for row in found.rows:
        limit = "" if row.limit is None else f"{row.limit:.2e}"
        made.add_row(row.name, f"{row.value:.4g}", limit, verdicts[row.passed], row.note)
    outcome = Text("passed", "bold green") if found.passed else Text("failed", "bold red")
    return [
        facts(
            [
                ("artifact", found.artifact),
                ("base", found.base),
                ("plan", f"{found.exactness}, {found.plan_digest}"),
                ("stored in", found.dtype),
            ]
        ),
        section("Comparisons", made),
        Text(),
        facts(
            [
                ("verification", outcome),
                ("run with", ", ".join(f"{k} {v}" for k, v in found.environment.items())),
            ]
        ),
    ]
