"""The edits and the directions of an artifact, as rows of a card."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bake.errors import InputError, UsageError
from bake.publish.cards import stored
from bake.publish.cards.facts import Facts
from bake.publish.cards.methods import METHODS, Method
from bake.publish.cards.text import Markdown, code, count, escape, merged, number, span
from bake.publish.record import RECORD
from bake.sites import Site, parse_site

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
    """

    kind: str
    concept: str
    sites: tuple[Site, ...]
    amounts: tuple[Markdown, ...]
    exactness: str
    reasons: tuple[str, ...]

    @property
    def method(self) -> Method:
        """What the kind is."""
        return METHODS[self.kind]

    @property
    def places(self) -> Markdown:
        """The sites in a few words."""
        return code(site_list(self.sites))


def edit_rows(facts: Facts) -> tuple[EditRow, ...]:
    """Return the edits in the recipe's order.

    Raises:
        InputError: the record is malformed.
    """
    findings = stored.objects(facts.plan, "findings", RECORD)
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for finding in findings:
        kind = stored.text(finding, "kind", RECORD)
        if kind not in METHODS:
            raise InputError(f"the kind of edit {kind!r} is unknown", where=RECORD)
        groups.setdefault((kind, stored.text(finding, "concept", RECORD)), []).append(finding)
    specs = _specs(facts)
    return tuple(
        _row(kind, concept, found, specs.get((kind, concept), []))
        for (kind, concept), found in groups.items()
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


def site_list(sites: Iterable[Site]) -> str:
    """Return sites in a few words: ``resid_post.0-31, z.3.h5``."""
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
    for name, found in stored.mapping(facts.record.content, "directions", RECORD).items():
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
    return f"https://huggingface.co/{match[1]}/blob/{match[3] or 'main'}/{match[2]}"


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
