"""What differs between two models: how much, in which rank, and whether a record names it."""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bake.cli.render.pieces import facts, indented, section, size, table
from bake.cli.render.tensors import merged

if TYPE_CHECKING:
    from bake.diff.change import Change
    from bake.diff.report import Diff
    from bake.diff.subspace import Subspace


def comparison(diff: "Diff", plot: Path | None, *, verbose: bool) -> Iterator[RenderableType]:
    """Yield what differs: counts, changes, names, subspaces, keys, files, and the verdict."""
    from bake.diff.files import plain

    yield facts(_facts(diff))
    if diff.changes:
        yield section("Changes", _changes(diff, verbose=verbose))
    for title, names in (
        ("New tensors", [_new(name, diff) for name in diff.created]),
        ("Tensors that only the base has", diff.missing),
        ("Tensors of another name", [f"{new}, once {old}" for new, old in diff.renamed.items()]),
        ("Tensors of another storage type", diff.retyped),
        ("Writers of the residual stream that are as they were", _untouched(diff)),
        ("Tensors that cannot be compared", [_unlike(row) for row in diff.reshaped]),
    ):
        if names:
            yield section(title, indented(_folded(names, verbose=verbose)))
    if diff.subspaces:
        lines = [line for space in diff.subspaces for line in _shares(space, diff)]
        yield section("What the changes share", indented(lines))
    for title, keys in (("config.json", diff.config), ("Metadata", diff.metadata)):
        if keys:
            rows = table("key", "base", "model")
            for key in keys:
                rows.add_row(key.key, key.old, key.new)
            yield section(title, rows)
    if diff.files:
        rows = table("file", "", "base", "model")
        for file in diff.files:
            rows.add_row(plain(file.name), file.status, _brief(file.old), _brief(file.new))
        yield section("Other files", rows)
    yield Text()
    yield facts(_verdict(diff, plot))


def _facts(diff: "Diff") -> Iterator[tuple[str, str]]:
    yield "base", diff.base
    yield "adapter" if diff.adapter else "model", diff.out
    changed = len({change.tensor for change in diff.changes} - set(diff.created))
    counts = [
        (len(set(diff.by_bytes) - set(diff.created)), "the same to the last byte"),
        (len(diff.by_hash), "the same by the hash of their file"),
        (changed, "changed"),
        (len(set(diff.retyped) - {change.tensor for change in diff.changes}), "stored otherwise"),
        (len(diff.reshaped), "not comparable"),
        (len(diff.created), "new"),
        (len(diff.missing), "missing"),
    ]
    tensors = ", ".join(f"{count} {what}" for count, what in counts if count)
    if diff.adapter:
        tensors = f"the adapter adds to {changed} and leaves the others"
    yield "tensors", f"{diff.tensors} with {size(diff.nbytes)}: {tensors}"
    if diff.fetched:
        yield "fetched", f"{diff.fetched:,} bytes of weights from the Hub"
    yield "family", diff.family or f"none: {diff.no_family}"


def _changes(diff: "Diff", *, verbose: bool) -> Table:
    from bake.diff.roles import kind_of

    columns = ["n", "values", "‖ΔW‖/‖W‖", *["largest"] * verbose, "rank", "shared", "left"]
    rows = table("tensor", *columns, "stream", right=columns)
    shares = {
        name: share
        for space in reversed(diff.subspaces)
        if space.shared
        for name, share in zip(space.tensors, space.shares, strict=True)
    }
    leaks = {leak.name: leak.ratio for space in diff.subspaces for leak in space.leaks}
    groups: dict[Any, list[Change]] = {}
    for change in diff.changes:
        kind = change.name if verbose else kind_of(change.tensor)
        groups.setdefault((kind, change.dtypes, change.shape, change.note), []).append(change)
    for (kind, dtypes, _, note), group in groups.items():
        names = list(dict.fromkeys(change.name for change in group))
        name = (merged(names) if len(names) > 1 else names[0]) or kind
        if dtypes[0] != dtypes[1]:
            name += f" ({dtypes[0]} became {dtypes[1]})"
        if note is not None:
            name += f"\n({note})"
        rows.add_row(
            name,
            str(len(group)),
            _percents([_touched(change) for change in group]),
            _range([change.relative for change in group], lambda v: f"{100 * v:.3g}", " %"),
            *[_range([change.largest for change in group], _small)] * verbose,
            _ranks(group),
            _percents([shares.get(change.name) for change in group]),
            _range([leaks.get(change.name) for change in group], _small),
            diff.sides.get(group[0].tensor, ""),
        )
    return rows


def _touched(change: "Change") -> float:
    return change.elements / max(1, prod(change.matrix))


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


def _untouched(diff: "Diff") -> tuple[str, ...]:
    """Return the writers that are as they were, where others of them share a direction."""
    shared = any(space.shared and space.side == "written" for space in diff.subspaces)
    return diff.untouched_writers if shared else ()


def _new(name: str, diff: "Diff") -> str:
    """Return a new tensor's name, and whether it is a copy: a head that was untied is one."""
    return f"{name}, a copy of the base's embedding" if name in diff.by_bytes else name


def _unlike(row: Any) -> str:
    forms = (f"{dtype} {list(shape)}" for dtype, shape in (row.old, row.new))
    return f"{row.name}: {' became '.join(forms)}"


def _folded(names: Sequence[str], *, verbose: bool) -> Iterator[str]:
    """Yield names, those that differ in numbers only in one line."""
    from bake.diff.roles import kind_of

    if verbose:
        yield from names
        return
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(kind_of(name), []).append(name)
    for kind, group in groups.items():
        count = f" ({len(group)})" if len(group) > 1 else ""
        yield (merged(group) or kind) + count


_SIDES = {
    "written": "of what writers add to the residual stream",
    "read": "of what readers take from the residual stream",
    "axis 0": "along the first axis of matrices",
    "axis 1": "along the second axis of matrices",
}


def _shares(space: "Subspace", diff: "Diff") -> Iterator[str]:
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
        part = f"{diff.writers - len(diff.untouched_writers)} of {diff.writers}"
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


def _verdict(diff: "Diff", plot: Path | None) -> Iterator[tuple[str, str | Text]]:
    if diff.adapter:
        yield "record", "an adapter stores no weights: what it adds was measured, not compared"
    elif diff.violations is None:
        why = diff.no_plan or "it has no record of bake"
        yield "record", f"none to hold the bytes against: {why}"
    else:
        yield "plan", str(diff.plan)
        good = Text("yes: nothing differs but what the plan names", "green")
        count = len(diff.violations)
        bad = Text(f"NO: {count} difference{'s' * (count != 1)} from the record", "bold red")
        yield "as recorded", bad if diff.violations else good
    if diff.identical:
        yield "identical", "every tensor, and the config"
    if plot is not None:
        yield "plot", str(plot)
