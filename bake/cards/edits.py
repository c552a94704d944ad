"""The edits and the directions of an artifact, as rows of a card."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.artifact.record import RECORD
from bake.cards import stored
from bake.cards.facts import Facts
from bake.cards.fitted import stand_ins_from
from bake.cards.methods import METHODS, Method
from bake.cards.text import Markdown, code, count, escape, merged, number
from bake.errors import InputError, UsageError
from bake.sites import Site, parse_site, summary

_RECIPE = f"{RECORD}: recipe"
_SYMBOLS = {
    "strength": "*s* = {}",
    "alpha": "*α* = {}",
    "coefficient": "*c* = {}",
    "degrees": "turned by {}°",
}
_STRONG = ("ablate", "affine", "erase", "scale", "linear", "update")


@dataclass(frozen=True, slots=True)
class EditRow:
    """One edit of the recipe, or all edits of one kind and concept where no recipe is recorded.

    Attributes:
        kind: a key of ``METHODS``.
        concept: the direction's name.
        sites: all of them, in the order of a forward pass.
        amounts: strength, alpha and the like, as Markdown; empty where they are not recorded.
        exactness: the worst of the findings.
        reasons: what the findings say, those of many layers as one.
        stand_in: whether they were fitted, to stand in for an edit that no fold reaches.
    """

    kind: str
    concept: str
    sites: tuple[Site, ...]
    amounts: tuple[Markdown, ...]
    exactness: str
    reasons: tuple[str, ...]
    stand_in: bool = False

    @property
    def method(self) -> Method:
        """What the kind is."""
        return METHODS[self.kind]

    @property
    def places(self) -> Markdown:
        """The sites in a few words."""
        return code(summary(self.sites))


def edit_rows(facts: Facts) -> tuple[EditRow, ...]:
    """Return the edits in the recipe's order.

    Raises:
        InputError: the record is malformed.
    """
    findings = stored.objects(facts.plan, "findings", RECORD)
    first = stand_ins_from(facts)
    groups: dict[tuple[str, str, bool], list[Mapping[str, Any]]] = {}
    for place, finding in enumerate(findings):
        kind = stored.text(finding, "kind", RECORD)
        if kind not in METHODS:
            raise InputError(f"the kind of edit {kind!r} is unknown", where=RECORD)
        stand_in = first is not None and place >= first
        concept = stored.text(finding, "concept", RECORD)
        groups.setdefault((kind, concept, stand_in), []).append(finding)
    specs = _specs(facts)
    return tuple(
        _row(kind, concept, found, [] if stand_in else specs.get((kind, concept), []), stand_in)
        for (kind, concept, stand_in), found in groups.items()
    )


def _specs(facts: Facts) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Return the recipe's edits by kind and concept, as the plan names them."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for edit in stored.objects(facts.recipe, "edits", _RECIPE):
        concept = " + ".join(stored.words(edit, "direction", _RECIPE))
        found.setdefault((stored.text(edit, "kind", _RECIPE), concept), []).append(edit)
    return found


def _row(
    kind: str,
    concept: str,
    findings: list[Mapping[str, Any]],
    specs: list[Mapping[str, Any]],
    stand_in: bool,
) -> EditRow:
    names = [name for finding in findings for name in stored.words(finding, "sites", RECORD)]
    try:
        sites = sorted({parse_site(name) for name in names}, key=lambda site: site.order)
    except UsageError as error:
        raise InputError(
            f"the plan names a site that is none: {error.what}", where=RECORD
        ) from error
    classes = [stored.text(finding, "exactness", RECORD) for finding in findings]
    amounts = dict.fromkeys(_together(kind, spec) for spec in specs)
    reasons = dict.fromkeys(stored.text(finding, "reason", RECORD) for finding in findings)
    return EditRow(
        kind=kind,
        concept=concept,
        sites=tuple(sites),
        amounts=tuple(amounts),
        exactness=max(classes, key=exactness_rank, default=""),
        reasons=tuple(reason for reason, _ in merged(list(reasons))),
        stand_in=stand_in,
    )


def exactness_rank(word: str) -> int:
    """Return how far a class of exactness is from exact.

    Raises:
        InputError: it is none.
    """
    known = ("exact", "nulling", "approximate", "impossible")
    if word not in known:
        raise InputError(f"{word!r} is no class of exactness", where=RECORD)
    return known.index(word)


def _together(kind: str, spec: Mapping[str, Any]) -> Markdown:
    """Return the numbers of one edit of a recipe, with the defaults where they are left out."""
    values = {key: stored.number(spec, key, _RECIPE) for key in _SYMBOLS}
    if kind in _STRONG and values["strength"] is None:
        values["strength"] = 1.0
    if kind == "affine" and values["alpha"] is None:
        values["alpha"] = 0.0
    if kind == "offset" and values["coefficient"] is None:
        values["coefficient"] = 1.0
    parts = [_SYMBOLS[key].format(number(v)) for key, v in values.items() if v is not None]
    mean = spec.get("mean")
    if isinstance(mean, str):
        parts.append(f"*μ* from {escape(mean)}")
    elif mean is False:
        parts.append("*μ* = 0")
    if stored.flag(spec, "reflect", _RECIPE):
        parts.append("mirrored")
    return Markdown(", ".join(parts))


def asked_amounts(facts: Facts, kind: str, concept: str) -> tuple[Markdown, ...]:
    """Return strength, alpha and the like of the recipe's edits of a kind and a concept."""
    return tuple(dict.fromkeys(_together(kind, s) for s in _specs(facts).get((kind, concept), [])))


@dataclass(frozen=True, slots=True)
class DirectionRow:
    """One fitted artifact.

    Attributes:
        name: the recipe's.
        file: where it was read from.
        link: the same on the Hub, or None.
        reader: its format.
        digest: of its bytes.
        used: which item, and with which sign.
        tensors: shapes, dtypes and norms.
        notes: what the artifact says of itself.
    """

    name: str
    file: str
    link: str | None
    reader: str
    digest: str
    used: tuple[Markdown, ...]
    tensors: tuple[Markdown, ...]
    notes: tuple[tuple[str, str], ...]


def direction_rows(facts: Facts) -> tuple[DirectionRow, ...]:
    """Return the directions by name.

    Raises:
        InputError: the record is malformed.
    """
    specs = stored.mapping(facts.recipe, "directions", _RECIPE)
    rows = []
    for name, found in stored.mapping(facts.content, "directions", RECORD).items():
        spec = specs.get(name, {})
        if not isinstance(found, dict) or not isinstance(spec, dict):
            raise InputError(f"directions.{name} is no object", where=RECORD)
        file = stored.text(found, "file", RECORD)
        metadata = stored.mapping(found, "metadata", RECORD)
        rows.append(
            DirectionRow(
                name=name,
                file=file,
                link=_link(file),
                reader=stored.text(found, "format", RECORD),
                digest=stored.text(found, "digest", RECORD),
                used=tuple(_used(spec)),
                tensors=tuple(_tensors(found, stored.whole(spec, "layer", _RECIPE))),
                notes=tuple((k, v) for k, v in metadata.items() if isinstance(v, str) and v),
            )
        )
    return tuple(rows)


def _link(file: str) -> str | None:
    """Return the page of an artifact on the Hub: ``hf://owner/name/path@revision``."""
    match = re.fullmatch(
        r"hf://([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/([\w./-]+)(?:@([\w.-]+))?", file, re.ASCII
    )
    if match is None or ".." in file:
        return None
    view = "blob" if Path(match[2]).suffix else "tree"  # a folder, as some systems save a direction
    return f"https://huggingface.co/{match[1]}/{view}/{match[3] or 'main'}/{match[2]}"


def _used(spec: Mapping[str, Any]) -> Iterable[Markdown]:
    layer, sign = stored.whole(spec, "layer", _RECIPE), stored.whole(spec, "sign", _RECIPE)
    if layer is not None:
        yield Markdown(f"the item of block {layer} at every site")
    if sign == -1:
        yield Markdown("with the opposite sign")
    if key := stored.text(spec, "key", _RECIPE):
        yield Markdown(f"the tensor {code(key)}")


def _tensors(found: Mapping[str, Any], layer: int | None) -> Iterable[Markdown]:
    """Yield shape, dtype and norm of the fitted tensors that are used, or their range."""
    rows = stored.objects(found, "tensors", RECORD)
    if layer is not None:
        rows = tuple(row for row in rows if row.get("layer") == layer)
    by_role: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        key = (
            stored.text(row, "role", RECORD),
            stored.size(row, "shape", RECORD),
            stored.text(row, "dtype", RECORD),
        )
        norm = stored.number(row, "norm", RECORD)
        if norm is not None:
            by_role.setdefault(key, []).append(norm)
    for (role, size, dtype), norms in by_role.items():
        low, high = number(float(min(norms))), number(float(max(norms)))
        text = f"norm {low}" if low == high else f"norms {low} to {high}"
        many = "" if len(norms) == 1 else f"{count(len(norms), 'item')} of "
        yield Markdown(f"{escape(role)}: {many}{size} in {escape(dtype)}, {text}")
