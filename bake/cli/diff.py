"""``bake diff``: what differs between two models, from their bytes."""

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bake.cli.options import PATH
from bake.cli.output import Output
from bake.cli.output import command as bake_command
from bake.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import Tensor

    from bake.diff.change import Change
    from bake.diff.report import Diff
    from bake.diff.subspace import Subspace

_FORMS = (".png", ".svg")


@bake_command("diff")
@click.argument("models", nargs=-1, required=True, metavar="[BASE] OUT")
@click.option(
    "--direction",
    "directions",
    multiple=True,
    type=PATH,
    metavar="FILE",
    help="Compare what the changes share with this artifact; may be given again.",
)
@click.option(
    "--most-rank",
    type=click.IntRange(1, 256),
    default=16,
    show_default=True,
    metavar="N",
    help="Tell ranks apart up to this one.",
)
@click.option("--rank/--no-rank", "ranks", default=True, help="Leave ranks and subspaces out.")
@click.option("--plot", type=PATH, metavar="FILE", help="Draw it: a .png or .svg file.")
@click.option("--family", type=PATH, metavar="FILE", help="Your own family table.")
def command(
    output: Output,
    models: tuple[str, ...],
    *,
    directions: tuple[Path, ...],
    most_rank: int,
    ranks: bool,
    plot: Path | None,
    family: Path | None,
) -> None:
    """Say byte by byte what differs between BASE and OUT.

    Both are folders, Hub ids or GGUF files. Without BASE it is the one that OUT's record names.
    Models that bake did not make are reported on: how much every tensor changed, in which rank,
    and whether the changes share a direction of the residual stream.

    The exit code is 1 when OUT was made by bake and differs in anything that its plan does not
    name; 0 otherwise, whatever differs.
    """
    if len(models) > 2:
        raise UsageError(f"{len(models)} models are named", fix="name one, or two: BASE OUT")
    if plot is not None:
        _check_plot(plot)
    from bake.diff import diff
    from bake.families import read_family

    given = _given(directions)
    with output.bar("comparing") as move:
        found = diff(
            models[-1],
            models[0] if len(models) == 2 else None,
            family=None if family is None else read_family(family),
            most_rank=most_rank,
            ranks=ranks,
            given=given,
            progress=move,
        )
    if plot is not None and not found.drawable:
        output.remark("nothing is drawn: no tensor with a norm has changed")
        plot = None
    if plot is not None:
        from bake.diff.plot import draw

        plot.write_bytes(draw(found, plot.suffix.lower().removeprefix(".")))
    output.present(
        data=lambda: {**found.to_json(), "plot": None if plot is None else str(plot)},
        view=lambda: _view(found, plot, verbose=output.verbose),
        error=found.failure(),
    )


def _check_plot(plot: Path) -> None:
    """Raise before a long comparison when its picture could not be drawn."""
    if plot.suffix.lower() not in _FORMS:
        raise UsageError(f"{plot} is no picture that can be drawn", fix="name a .png or .svg file")
    if not plot.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {plot.parent} for the plot", fix="make it first")
    if find_spec("matplotlib") is None:
        raise UsageError(
            "the plot needs matplotlib, which is not installed",
            fix="install bake-directions[plots], or leave --plot out",
        )


def _given(files: Sequence[Path]) -> "dict[str, Tensor]":
    """Return the directions of some artifacts as rows in float64, by what to call them."""
    from bake.directions import Role, read_directions

    rows: dict[str, Tensor] = {}
    for path in files:
        for item in read_directions(path).items:
            for role, tensor in item.tensors.items():
                if role in (Role.VECTOR, Role.OFFSET, Role.SUBSPACE, Role.LEFT, Role.RIGHT):
                    wide = tensor.double()
                    wide = wide.T if role is Role.LEFT else wide.reshape(-1, wide.shape[-1])
                    rows[f"{path.name}: {role} of {item.place}"] = wide
        if not any(label.startswith(f"{path.name}: ") for label in rows):
            raise UsageError(f"{path} holds no direction to compare with")
    return rows


def _view(found: "Diff", plot: Path | None, *, verbose: bool) -> "Iterator[RenderableType]":
    from rich.text import Text

    from bake.cli import render
    from bake.diff.files import plain

    yield render.facts(_facts(found))
    if found.changes:
        yield render.section("Changes", _changes(found, verbose=verbose))
    for title, names in (
        ("New tensors", [_new(name, found) for name in found.created]),
        ("Tensors that only the base has", found.missing),
        ("Tensors of another name", [f"{new}, once {old}" for new, old in found.renamed.items()]),
        ("Tensors of another storage type", found.retyped),
        ("Writers of the residual stream that are as they were", _untouched(found)),
        ("Tensors that cannot be compared", [_unlike(row) for row in found.reshaped]),
    ):
        if names:
            yield render.section(title, render.indented(_folded(names, verbose=verbose)))
    if found.subspaces:
        lines = [line for space in found.subspaces for line in _shares(space, found)]
        yield render.section("What the changes share", render.indented(lines))
    for title, keys in (("config.json", found.config), ("Metadata", found.metadata)):
        if keys:
            made = render.table("key", "base", "model")
            for key in keys:
                made.add_row(key.key, key.old, key.new)
            yield render.section(title, made)
    if found.files:
        made = render.table("file", "", "base", "model")
        for file in found.files:
            made.add_row(plain(file.name), file.status, _brief(file.old), _brief(file.new))
        yield render.section("Other files", made)
    yield Text()
    yield render.facts(_verdict(found, plot))


def _facts(found: "Diff") -> "Iterator[tuple[str, str]]":
    from bake.cli import render

    yield "base", found.base
    yield "adapter" if found.adapter else "model", found.out
    changed = len({change.tensor for change in found.changes} - set(found.created))
    counts = [
        (len(set(found.by_bytes) - set(found.created)), "the same to the last byte"),
        (len(found.by_hash), "the same by the hash of their file"),
        (changed, "changed"),
        (len(set(found.retyped) - {change.tensor for change in found.changes}), "stored otherwise"),
        (len(found.reshaped), "not comparable"),
        (len(found.created), "new"),
        (len(found.missing), "missing"),
    ]
    told = ", ".join(f"{count} {what}" for count, what in counts if count)
    if found.adapter:
        told = f"the adapter adds to {changed} and leaves the others"
    yield "tensors", f"{found.tensors} with {render.size(found.nbytes)}: {told}"
    if found.fetched:
        yield "fetched", f"{found.fetched:,} bytes of weights from the Hub"
    yield "family", found.family or f"none: {found.no_family}"


def _changes(found: "Diff", *, verbose: bool) -> Any:
    from bake.cli import render
    from bake.diff.roles import kind_of

    columns = ["n", "values", "‖ΔW‖/‖W‖", *["largest"] * verbose, "rank", "shared", "left"]
    made = render.table("tensor", *columns, "stream", right=columns)
    shares = {
        name: share
        for space in reversed(found.subspaces)
        if space.shared
        for name, share in zip(space.tensors, space.shares, strict=True)
    }
    leaks = {leak.name: leak.ratio for space in found.subspaces for leak in space.leaks}
    groups: dict[Any, list[Change]] = {}
    for change in found.changes:
        kind = change.name if verbose else kind_of(change.tensor)
        groups.setdefault((kind, change.dtypes, change.shape, change.note), []).append(change)
    for (kind, dtypes, _, note), group in groups.items():
        names = list(dict.fromkeys(change.name for change in group))
        name = (render.merged(names) if len(names) > 1 else names[0]) or kind
        if dtypes[0] != dtypes[1]:
            name += f" ({dtypes[0]} became {dtypes[1]})"
        if note is not None:
            name += f"\n({note})"
        made.add_row(
            name,
            str(len(group)),
            _percents([_touched(change) for change in group]),
            _range([change.relative for change in group], lambda v: f"{100 * v:.3g}", " %"),
            *[_range([change.largest for change in group], _small)] * verbose,
            _ranks(group),
            _percents([shares.get(change.name) for change in group]),
            _range([leaks.get(change.name) for change in group], _small),
            found.sides.get(group[0].tensor, ""),
        )
    return made


def _touched(change: "Change") -> float:
    count = 1
    for size in change.matrix:
        count *= size
    return change.elements / max(1, count)


def _range(values: "Sequence[float | None]", form: Callable[[float], str], unit: str = "") -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = form(min(known)), form(max(known))
    return (low if low == high else f"{low}–{high}") + unit


def _small(value: float) -> str:
    return f"{value:.1e}"


def _percents(values: "Sequence[float | None]") -> str:
    return _range(values, lambda value: _percent(value).removesuffix(" %"), " %")


def _percent(value: float) -> str:
    """Return a share in percent; what is not all of it is never rounded to all."""
    if value >= 1 - 1e-9:
        return "100 %"
    return "<0.01 %" if 0 < value < 1e-4 else f"{int(value * 10000) / 100:g} %"


def _ranks(group: "Sequence[Change]") -> str:
    texts = []
    for change in group:
        spectrum = change.spectrum
        if spectrum is None or change.matrix[1] == 1:
            continue
        if spectrum.threshold is None:
            texts.append("?")
        else:
            texts.append(f">{spectrum.most}" if spectrum.rank is None else str(spectrum.rank))
    order = sorted(set(texts), key=lambda text: (not text.isdigit(), int(text.lstrip(">?") or 0)))
    return order[0] if len(order) == 1 else f"{order[0]}–{order[-1]}" if order else ""


def _untouched(found: "Diff") -> tuple[str, ...]:
    """Return the writers that are as they were, where others of them share a direction."""
    shared = any(space.shared and space.side == "written" for space in found.subspaces)
    return found.untouched_writers if shared else ()


def _new(name: str, found: "Diff") -> str:
    """Return a new tensor's name, and whether it is a copy: a head that was untied is one."""
    return f"{name}, a copy of the base's embedding" if name in found.by_bytes else name


def _unlike(row: Any) -> str:
    forms = (f"{dtype} {list(shape)}" for dtype, shape in (row.old, row.new))
    return f"{row.name}: {' became '.join(forms)}"


def _folded(names: Sequence[str], *, verbose: bool) -> Iterator[str]:
    """Yield names, those that differ in numbers only in one line."""
    from bake.cli import render
    from bake.diff.roles import kind_of

    if verbose:
        yield from names
        return
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(kind_of(name), []).append(name)
    for kind, group in groups.items():
        count = f" ({len(group)})" if len(group) > 1 else ""
        yield (render.merged(group) or kind) + count


_SIDES = {
    "written": "of what writers add to the residual stream",
    "read": "of what readers take from the residual stream",
    "axis 0": "along the first axis of matrices",
    "axis 1": "along the second axis of matrices",
}


def _shares(space: "Subspace", found: "Diff") -> Iterator[str]:
    where = f"{_SIDES[space.side]} (width {space.width})"
    count = "1 direction" if space.dimension == 1 else f"{space.dimension} directions"
    verb = "holds" if space.dimension == 1 else "hold"
    name, least = space.lowest
    if not space.shared:
        yield (
            f"nothing {where}: it takes {count} to hold {_percent(space.share)} of the change of "
            f"{len(space.tensors)} tensors"
        )
        return
    yield (
        f"{count} {where} {verb} {_percent(space.share)} of the change of {len(space.tensors)} "
        f"tensors, and of none less than {_percent(least)} ({name}); the largest angle to a "
        f"tensor's own directions is {space.angle:.2g}°"
    )
    ratios = sorted(leak.ratio for leak in space.leaks if leak.ratio is not None)
    if ratios:
        middle = ratios[len(ratios) // 2]
        part = f"{found.writers - len(found.untouched_writers)} of {found.writers}"
        sense = "taken out of" if ratios[-1] < 0.1 else "not, or not wholly, taken out of"
        yield (
            f"it is {sense} what {part} writers add: |Rᵀ W′| / |Rᵀ W| is {middle:.1e} in the "
            f"middle and {ratios[-1]:.1e} at most"
        )
    for label, cosine in space.cosines:
        yield f"cosine with {label}: {cosine:.6f}"


def _brief(digest: str | None) -> str:
    if digest is None:
        return ""
    kind, _, value = digest.partition(":")
    return f"{kind}:{value[:12]}…"


def _verdict(found: "Diff", plot: Path | None) -> "Iterator[tuple[str, Any]]":
    from rich.text import Text

    if found.adapter:
        yield "record", "an adapter stores no weights: what it adds was measured, not compared"
    elif found.violations is None:
        why = found.no_plan or "it has no record of bake"
        yield "record", f"none to hold the bytes against: {why}"
    else:
        yield "plan", str(found.plan)
        good = Text("yes: nothing differs but what the plan names", "green")
        count = len(found.violations)
        bad = Text(f"NO: {count} difference{'s' * (count != 1)} from the record", "bold red")
        yield "as recorded", bad if found.violations else good
    if found.identical:
        yield "identical", "every tensor, and the config"
    if plot is not None:
        yield "plot", str(plot)
