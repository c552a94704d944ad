"""The edits and the directions of an artifact, as rows of a card."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bake.artifact.record import RECORD
from bake.artifact.schema import DirectionRecord, FindingRecord
from bake.cards.facts import Facts
from bake.cards.methods import METHODS, Method
from bake.cards.text import Markdown, code, count, escape, merged, number
from bake.checkpoints.hub_names import HUB_PREFIX, is_repository
from bake.directions import Options
from bake.errors import InputError, UsageError
from bake.recipe import DirectionSpec, EditTable, amount_of, condition_words, said_of
from bake.sites import Site, parse_site, summary

LEVELS = ("exact", "relocated", "nulling", "approximate", "impossible")
"""The classes of exactness, the best first."""
_STANDS_FOR = re.compile(r"(\w+) '(.*)' at (.+)")
_STRONG = ("ablate", "affine", "erase", "scale", "linear", "update", "masked-scale")


@dataclass(frozen=True, slots=True)
class AskedEdit:
    """An edit as the recipe asks for it.

    Attributes:
        kind: a key of ``METHODS``.
        concept: the direction's name.
        places: the sites in a few words.
        amounts: strength, alpha and the like, as Markdown; empty where they are not recorded.
    """

    kind: str
    concept: str
    places: Markdown
    amounts: tuple[Markdown, ...]

    @property
    def method(self) -> Method:
        """What the kind is."""
        return METHODS[self.kind]


@dataclass(frozen=True, slots=True)
class EditRow(AskedEdit):
    """One edit of the recipe, or all edits of one kind and concept where no recipe is recorded.

    Attributes:
        sites: all of them, in the order of a forward pass.
        exactness: the worst of the findings.
        reasons: what the findings say, those of many layers as one.
        stand_in: whether they were fitted, to stand in for an edit that no fold reaches.
    """

    sites: tuple[Site, ...]
    exactness: str
    reasons: tuple[str, ...]
    stand_in: bool


def edit_rows(facts: Facts) -> tuple[EditRow, ...]:
    """Return the edits in the recipe's order.

    Raises:
        InputError: the record names a kind of edit or a site that is none.
    """
    calibration = facts.record.calibration
    groups: dict[tuple[str, str, bool], list[FindingRecord]] = {}
    for place, finding in enumerate(facts.record.plan.findings):
        if finding.kind not in METHODS:
            raise InputError(f"the kind of edit {finding.kind!r} is unknown", where=RECORD)
        stand_in = calibration is not None and place >= calibration.kept
        groups.setdefault((finding.kind, finding.concept, stand_in), []).append(finding)
    return tuple(
        EditRow(
            kind,
            concept,
            code(summary(sites)),
            () if stand_in else amounts(facts, kind, concept),
            sites,
            max((finding.exactness for finding in findings), key=LEVELS.index),
            tuple(reason for reason, _ in merged(list(dict.fromkeys(f.reason for f in findings)))),
            stand_in,
        )
        for (kind, concept, stand_in), findings in groups.items()
        for sites in [_sites(findings)]
    )


def asked_edits(facts: Facts) -> tuple[AskedEdit, ...]:
    """Return the edits that no fold reaches, which an approximate plan's stand-ins stand in for.

    Raises:
        InputError: the record names an edit that is none.
    """
    calibration = facts.record.calibration
    rows = []
    for text in () if calibration is None else calibration.stands_for:
        match = _STANDS_FOR.fullmatch(text)
        if match is None or match[1] not in METHODS:
            what = f"stands_for names {text!r}, which is no edit"
            raise InputError(what, where=f"{RECORD}: calibration")
        kind, concept, places = match.groups()
        rows.append(AskedEdit(kind, concept, code(places), amounts(facts, kind, concept)))
    return tuple(rows)


def _sites(findings: list[FindingRecord]) -> tuple[Site, ...]:
    try:
        found = {parse_site(name) for finding in findings for name in finding.sites}
    except UsageError as error:
        what = f"the plan names a site that is none: {error.what}"
        raise InputError(what, where=RECORD) from error
    return tuple(sorted(found, key=lambda site: site.order))


def amounts(facts: Facts, kind: str, concept: str) -> tuple[Markdown, ...]:
    """Return strength, alpha and the like of the recipe's edits of a kind and a concept."""
    edits = () if facts.recipe is None else facts.recipe.edits
    return tuple(
        dict.fromkeys(
            _amounts(edit)
            for edit in edits
            if edit.kind == kind and " + ".join(edit.directions) == concept
        )
    )


def _amounts(edit: EditTable) -> Markdown:
    parts = [f"*s* = {_amount(edit, 'strength')}"] if edit.inner in _STRONG else []
    if edit.map is not None:
        parts.insert(0, code(edit.map))
    if edit.inner == "affine":
        parts.append(f"*α* = {number(edit.alpha)}")
    if edit.inner == "offset":
        parts.append(f"*c* = {_amount(edit, 'coefficient')}")
        if edit.keep != 1:
            parts.append(f"*k* = {number(edit.keep)}")
    if edit.degrees is not None:
        parts.append(f"turned by {number(edit.degrees)}°")
    if isinstance(edit.mean, str):
        parts.append(f"*μ* from {escape(edit.mean)}")
    elif edit.mean is False:
        parts.append("*μ* = 0")
    if edit.reflect:
        parts.append("mirrored")
    for word, limit in (("at least", edit.low), ("at most", edit.high)):
        if limit is not None:
            parts.append(f"{word} {number(limit)}")
    if edit.gate is not None:
        parts.append(escape(condition_words(edit.gate)))
    return Markdown(", ".join(parts))


def _amount(edit: EditTable, key: str) -> Markdown:
    return escape(amount_of(getattr(edit, key), key).words())


@dataclass(frozen=True, slots=True)
class DirectionRow:
    """One fitted artifact.

    Attributes:
        name: the recipe's.
        record: where it was read from, and what it says of itself.
        link: the same on the Hub, or None.
        used: which item, with which sign, and what its system does that weights cannot.
        tensors: shapes, dtypes and norms.
    """

    name: str
    record: DirectionRecord
    link: str | None
    used: tuple[Markdown, ...]
    tensors: tuple[Markdown, ...]


def direction_rows(facts: Facts) -> tuple[DirectionRow, ...]:
    """Return the directions by name."""
    specs = {} if facts.recipe is None else facts.recipe.directions
    rows = []
    for name, found in facts.record.directions.items():
        spec = specs.get(name)
        used = () if spec is None else tuple(_used(spec))
        # What its system does and weights cannot: always on, and at every position.
        said = said_of(spec, found.metadata)
        used += () if said is None else (escape(said),)
        rows.append(DirectionRow(name, found, _link(found.file), used, _tensors(found, spec)))
    return tuple(rows)


def _link(file: str) -> str | None:
    """Return the page of an artifact on the Hub: ``hf://owner/name/path@revision``."""
    address, _, revision = file.removeprefix(HUB_PREFIX).partition("@")
    owner, name, inside = (*address.split("/", 2), "", "")[:3]
    plain = f"{inside}{revision}".translate(str.maketrans("", "", "./_-"))
    if not (file.startswith(HUB_PREFIX) and is_repository(f"{owner}/{name}") and inside):
        return None
    if ".." in file or not (plain.isascii() and plain.isalnum()):
        return None
    view = "blob" if Path(inside).suffix else "tree"  # a folder, as some systems save a direction
    return f"https://huggingface.co/{owner}/{name}/{view}/{revision or 'main'}/{inside}"


def _used(spec: DirectionSpec) -> Iterable[Markdown]:
    if spec.layer is not None:
        yield Markdown(f"the item of block {spec.layer} at every site")
    if spec.site is not None:
        yield Markdown(f"the item of {code(spec.site)} at every site")
    if spec.sign == -1:
        yield Markdown("with the opposite sign")
    if spec.key:
        yield Markdown(f"the tensor {code(spec.key)}")
    for key in Options.__annotations__:
        if key not in ("key", "shape") and (value := getattr(spec, key)) is not None:
            yield Markdown(f"{key} {code(str(value))}")


def _tensors(found: DirectionRecord, spec: DirectionSpec | None) -> tuple[Markdown, ...]:
    """Return shape, dtype and norm of the fitted tensors that are used, or their range."""
    layer, site = (None, None) if spec is None else (spec.layer, spec.site)
    norms: dict[tuple[str, str, str], list[float]] = {}
    for row in found.tensors:
        if layer in (None, row.layer) and site in (None, row.site) and math.isfinite(row.norm):
            size = "×".join(map(str, row.shape))
            norms.setdefault((row.role, size, row.dtype), []).append(row.norm)
    texts = []
    for (role, size, dtype), values in norms.items():
        low, high = number(float(min(values))), number(float(max(values)))
        norm = f"norm {low}" if low == high else f"norms {low} to {high}"
        many = "" if len(values) == 1 else f"{count(len(values), 'item')} of "
        texts.append(Markdown(f"{escape(role)}: {many}{size} in {escape(dtype)}, {norm}"))
    return tuple(texts)
