"""``Recipe``: the text of a recipe as checked values. Nothing here opens a model or a direction.

Every key is taken once, with its type; a key that is left over is an error that names the nearest
known one. ``docs/recipes.md`` documents the keys.
"""

import difflib
import hashlib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from bake.directions import Shape
from bake.edits import EditKind
from bake.errors import InputError, UsageError
from bake.families import CARRIERS, READS, RUNTIMES

T = TypeVar("T")
Toml = Any  # a value of the recipe: the one place where the type is the file's, not ours

OUTPUTS = CARRIERS
ALLOWANCES = ("recast", "nulling", "approximate")
TOKENS, RANK = 128, 8  # of a calibration, where the recipe does not say
NOTICES = ("safety",)

HUB_PREFIX = "hf://"
LOCAL_PREFIXES = ("/", "./", "../", "~")

# The keys of [[edits]] that belong to some kinds only; an offset's strength is its coefficient, a
# rotation's its angle.
KINDS_OF_KEY: Mapping[str, tuple[EditKind, ...]] = {
    "strength": (
        EditKind.ABLATE,
        EditKind.AFFINE,
        EditKind.ERASE,
        EditKind.SCALE,
        EditKind.LINEAR,
        EditKind.UPDATE,
    ),
    "alpha": (EditKind.AFFINE,),
    "mean": (EditKind.AFFINE, EditKind.ERASE),
    "coefficient": (EditKind.OFFSET,),
    "degrees": (EditKind.ROTATE,),
    "reflect": (EditKind.ROTATE,),
}
# The kinds that take several directions at once: as the span of all of them, or as a plane.
JOINT_KINDS = (EditKind.ABLATE, EditKind.AFFINE, EditKind.ROTATE)


@dataclass(frozen=True, slots=True)
class Base:
    """The model that the recipe edits."""

    model: str
    """As the recipe names it: a path or a Hub id."""
    revision: str | None
    path: Path | None
    """The folder, from the recipe's own; None for a model on the Hub."""

    @property
    def source(self) -> str | Path:
        """The model as ``open_checkpoint`` takes it: a ``Path`` is never looked up on the Hub."""
        return self.model if self.path is None else self.path


@dataclass(frozen=True, slots=True)
class DirectionSpec:
    """Where a direction comes from, and what its artifact cannot say itself."""

    name: str
    file: str
    """As the recipe names it: a path, or ``hf://owner/name/path@revision``."""
    path: Path | None
    """The file or folder, from the recipe's own; None for one on the Hub."""
    reader: str | None
    key: str | None
    shape: Shape | None
    layer: int | None
    """The one layer of the artifact that is used everywhere; None leaves one item per layer."""
    sign: int
    """1, or −1 for the opposite direction."""


@dataclass(frozen=True, slots=True)
class EditSpec:
    """One edit as the recipe states it, with the defaults filled in."""

    place: str
    """The recipe and the number of the edit in it, for messages."""
    kind: EditKind
    directions: tuple[str, ...]
    at: tuple[str, ...]
    """Patterns of sites; empty stands for the sites that the artifact itself names."""
    strength: float
    alpha: float
    mean: bool | str | None
    """Whether to use the artifact's mean (None: where it has one), or the direction that is it."""
    coefficient: float
    degrees: float | None
    reflect: bool


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """What is written, and what the plan may do for it."""

    to: tuple[str, ...]
    allow: tuple[str, ...]
    target: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CardSpec:
    """What the model card says beyond what the record shows: the words of whoever publishes it."""

    notice: str | None = None
    """``safety`` for an edit that concerns refusals or safety."""
    summary: str | None = None
    intended: str | None = None
    side_effects: str | None = None
    not_for: str | None = None
    licence: str | None = None
    """The licence's id as the Hub spells it; the base's own where it is absent."""
    licence_name: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    """Data sets on the Hub that the directions were fitted on."""


@dataclass(frozen=True, slots=True)
class VerifySpec:
    """What the result is held to where it is not exact."""

    most_kl: float | None = None
    """Limit of mean KL(hooked ‖ baked) over mean KL(hooked ‖ base)."""


@dataclass(frozen=True, slots=True)
class CalibrateSpec:
    """How stand-ins are fitted for edits that have no exact fold."""

    prompts: str
    """The file with the texts, as the recipe names it."""
    path: Path
    """The same from the recipe's own folder."""
    tokens: int
    """The most that are used of every text."""
    rank: int
    corrections: int | None
    constant: bool


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe, read and checked."""

    title: str
    text: str
    """The whole text of the file, comments included: it travels inside every output."""
    digest: str
    """``sha256:…`` of the file."""
    path: Path
    base: Base
    directions: Mapping[str, DirectionSpec]
    edits: tuple[EditSpec, ...]
    export: ExportSpec
    card: CardSpec = CardSpec()
    verify: VerifySpec = VerifySpec()
    calibrate: CalibrateSpec | None = None


def load_recipe(path: Path) -> Recipe:
    """Return the recipe in a file.

    Raises:
        InputError: the file cannot be read.
        UsageError: it is no TOML, lacks a key, or holds an unknown or contradictory one.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"the recipe cannot be read: {reason}",
            where=str(path),
            fix="check the path: it is taken from the folder that bake runs in",
        ) from error
    return parse_recipe(data, path)


def parse_recipe(data: bytes, path: Path) -> Recipe:
    """Return the recipe that a file holds.

    Args:
        data: the file's bytes.
        path: where it is, which its own paths are taken from and messages name.

    Raises:
        InputError: the file is no UTF-8 text.
        UsageError: it is no TOML, lacks a key, or holds an unknown or contradictory one.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("the recipe is no UTF-8 text", where=str(path)) from error
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"the recipe is not valid TOML: {error}", where=str(path)) from error
    root = _Table(values, str(path))
    title = root.take("title", str, path.stem)
    base = root.table("base")
    artifacts = root.take("directions", dict, {})
    rows = root.take("edits", list, [])
    export = root.table("export", optional=True)
    card = root.table("card", optional=True)
    verify = root.table("verify", optional=True)
    fitting = root.table("calibrate", optional=True)
    root.close()  # first: a table whose name is misspelt explains most of what else is missing
    directions = _directions(artifacts, path)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    return Recipe(
        title=title,
        text=text,
        digest=digest,
        path=path,
        base=_base(base, path.parent),
        directions=directions,
        edits=_edits(rows, path, directions),
        export=_export(export),
        card=_card(card),
        verify=_verify(verify),
        calibrate=_calibrate(fitting, path.parent),
    )


def card_of(text: str, *, where: str) -> CardSpec:
    """Return the ``[card]`` of a recipe's text, as a record keeps it.

    Raises:
        UsageError: the text is no TOML, or its ``[card]`` holds an unknown key or value.
    """
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"the recipe is not valid TOML: {error}", where=where) from error
    return _card(_Table(values.get("card", {}), f"{where} [card]"))


def override(
    recipe: Recipe,
    *,
    model: str | None = None,
    to: Sequence[str] = (),
    allow: Sequence[str] = (),
    target: Sequence[str] = (),
) -> Recipe:
    """Return the recipe with what a command line says instead.

    Args:
        recipe: the recipe.
        model: another model, a path from the working folder or a Hub id.
        to: other outputs.
        allow: what is allowed as well.
        target: other runtimes.

    Raises:
        UsageError: a word that is none of the known ones, or a runtime that reads no output.
    """
    base = recipe.base
    if model is not None:
        base = _model(model, None, Path(), "--model")
    given = _Table({"to": list(to), "allow": list(allow), "target": list(target)}, "--")
    words = {}
    for key, known in (("to", OUTPUTS), ("allow", ALLOWANCES), ("target", RUNTIMES)):
        given.where = f"--{key}"
        words[key] = given.choices(key, known, ())
    export = ExportSpec(
        to=words["to"] or recipe.export.to,
        allow=tuple(dict.fromkeys((*recipe.export.allow, *words["allow"]))),
        target=words["target"] or recipe.export.target,
    )
    _check_read(export.to, words["target"], "--target")
    return replace(recipe, base=base, export=export)


_WORDS: Mapping[type, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "truth value",
    list: "list",
    dict: "table",
}


class _Table:
    """A TOML table that must be emptied: every key is taken once, with its type."""

    def __init__(self, values: Toml, where: str) -> None:
        if not isinstance(values, dict):
            raise UsageError(f"a table is meant, not {values!r}", where=where)
        self._values = dict(values)
        self._known: list[str] = []
        self.where = where

    def take(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Return the value of ``key``; raise when it is missing or of another type."""
        value = self.optional(key, kind, default)
        if value is None:
            raise self.missing(key)
        return value

    def missing(self, key: str) -> UsageError:
        """Return the error for a key that is absent, or written in another way."""
        near = difflib.get_close_matches(key, self._values, n=1)
        if near:
            return UsageError(
                f"unknown key {near[0]!r}", where=self.where, fix=f"did you mean {key!r}?"
            )
        return UsageError(f"the key {key!r} is missing", where=self.where, fix="add it")

    def optional(self, key: str, kind: type[T], default: T | None = None) -> T | None:
        """Return the value of ``key``, or the default when it is absent."""
        self._known.append(key)
        if key not in self._values:
            return default
        value = self._values.pop(key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UsageError(f"{key} = {value!r} is no {_WORDS[kind]}", where=self.where)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{key} = {value!r} is not finite", where=self.where)
        return value

    def raw(self, key: str) -> Toml:
        """Return the value of ``key`` whatever its type, or None."""
        self._known.append(key)
        return self._values.pop(key, None)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def table(self, key: str, *, optional: bool = False) -> "_Table":
        """Return the table below ``key``."""
        values = self.take(key, dict, {} if optional else None)
        return _Table(values, f"{self.where} [{key}]")

    @property
    def empty(self) -> bool:
        """Whether the table holds nothing, or is not there."""
        return not self._values

    def words(self, key: str) -> tuple[str, ...]:
        """Return a text or a list of texts; an absent key gives none."""
        value = self.raw(key)
        values = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise UsageError(f"{key} = {value!r} is no text or list of texts", where=self.where)
        if value is not None and not values:
            raise UsageError(f"{key} is an empty list", where=self.where)
        return tuple(values)

    def choices(self, key: str, known: Sequence[str], default: tuple[str, ...]) -> tuple[str, ...]:
        """Return a list of words, each one of ``known``, without repeats.

        Case, dots, hyphens and underscores do not count: ``vLLM``, ``llama_cpp`` and ``MLX-LM``.
        """
        names = {_plain(word): word for word in known}
        values = self.take(key, list, list(default))
        values = [names.get(_plain(v), v) if isinstance(v, str) else v for v in values]
        for value in values:
            if value not in known:
                raise UsageError(
                    f"{key} holds {value!r}", where=self.where, fix=_nearest(str(value), known)
                )
        return tuple(dict.fromkeys(values))

    def close(self) -> None:
        """Raise when a key is left over, naming the nearest known one."""
        for key in self._values:
            raise UsageError(
                f"unknown key {key!r}", where=self.where, fix=_nearest(key, self._known)
            )


def _plain(word: str) -> str:
    """Return a word without what people spell in several ways."""
    return re.sub(r"[-_. ]", "", word.lower())


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {str(near[0])!r}?" if near else f"known are {', '.join(known)}"


def _base(table: _Table, folder: Path) -> Base:
    model = table.take("model", str)
    revision = table.optional("revision", str)
    table.close()
    return _model(model, revision, folder, table.where)


def _model(model: str, revision: str | None, folder: Path, where: str) -> Base:
    if not model:
        raise UsageError("model is empty", where=where)
    local = _local(folder, model, where)
    # A Hub id is owner/name, its revision may hold more slashes. A folder of that spelling comes
    # first, as it does for transformers.
    on_hub = model.partition("@")[0].count("/") == 1 and not model.startswith(LOCAL_PREFIXES)
    if not on_hub or local.is_dir():
        if revision is not None:
            raise UsageError(
                f"revision = {revision!r} is given for the folder {model}",
                where=where,
                why="a folder has no revisions",
                fix="leave it out, or give the Hub id of the model",
            )
        return Base(model, None, local)
    named = model.partition("@")[2]
    if revision is not None and named not in ("", revision):
        raise UsageError(
            f"model = {model!r} names a revision, and so does revision = {revision!r}",
            where=where,
            fix="give the revision once",
        )
    return Base(model.partition("@")[0], revision or named or None, None)


def _local(folder: Path, text: str, where: str) -> Path:
    try:
        return folder / Path(text).expanduser()
    except RuntimeError as error:  # ~name of a user that does not exist
        raise UsageError(f"{text!r} names no home folder: {error}", where=where) from error


def _directions(values: Mapping[str, Toml], path: Path) -> Mapping[str, DirectionSpec]:
    return {
        name: _direction(name, _Table(value, f"{path} [directions.{name}]"), path.parent)
        for name, value in values.items()
    }


def _direction(name: str, table: _Table, folder: Path) -> DirectionSpec:
    file = table.take("file", str)
    shape = table.optional("shape", str)
    if shape is not None and shape not in tuple(Shape):
        raise UsageError(
            f"shape = {shape!r} is unknown", where=table.where, fix=_nearest(shape, list(Shape))
        )
    layer, sign = table.optional("layer", int), table.take("sign", int, 1)
    if layer is not None and layer < 0:
        raise UsageError(
            f"layer = {layer} is negative", where=table.where, fix="blocks count from 0"
        )
    if sign not in (1, -1):
        raise UsageError(
            f"sign = {sign} is neither 1 nor -1",
            where=table.where,
            fix="a factor belongs to the edit: coefficient, alpha or strength",
        )
    spec = DirectionSpec(
        name=name,
        file=file,
        path=None if file.startswith(HUB_PREFIX) else _local(folder, file, table.where),
        reader=table.optional("reader", str),
        key=table.optional("key", str),
        shape=None if shape is None else Shape(shape),
        layer=layer,
        sign=sign,
    )
    table.close()
    return spec


def _edits(
    rows: list[Toml], path: Path, directions: Mapping[str, DirectionSpec]
) -> tuple[EditSpec, ...]:
    if not rows:
        raise UsageError(
            "the recipe has no edits", where=str(path), fix="add a table [[edits]] with a kind"
        )
    return tuple(
        _edit(_Table(row, f"{path} [[edits]] {number}"), directions)
        for number, row in enumerate(rows, start=1)
    )


def _edit(table: _Table, directions: Mapping[str, DirectionSpec]) -> EditSpec:
    word = table.take("kind", str)
    if word not in tuple(EditKind):
        raise UsageError(
            f"unknown kind {word!r}", where=table.where, fix=_nearest(word, list(EditKind))
        )
    kind = EditKind(word)
    _check_keys(table, kind)
    names = table.words("direction")
    mean = table.raw("mean")
    if mean is not None and not isinstance(mean, bool | str):
        raise UsageError(
            f"mean = {mean!r} is neither true, false nor the name of a direction",
            where=table.where,
        )
    _check_names(table, names, mean if isinstance(mean, str) else None, directions)
    spec = EditSpec(
        place=table.where,
        kind=kind,
        directions=names,
        at=table.words("at"),
        strength=table.take("strength", float, 1.0),
        alpha=table.take("alpha", float, 0.0),
        mean=mean,
        coefficient=table.take("coefficient", float, 1.0),
        degrees=table.optional("degrees", float),
        reflect=table.take("reflect", bool, False),
    )
    table.close()
    _check_directions(spec)
    return spec


def _check_keys(table: _Table, kind: EditKind) -> None:
    """Refuse a key that other kinds take."""
    for key, kinds in KINDS_OF_KEY.items():
        if key in table and kind not in kinds:
            own = [known for known, takers in KINDS_OF_KEY.items() if kind in takers]
            raise UsageError(
                f"{key!r} is no key of kind = {str(kind)!r}",
                where=table.where,
                why=f"it belongs to {', '.join(kinds)}",
                fix=f"{kind} takes {', '.join(own)}" if own else f"{kind} takes none of its own",
            )


def _check_names(
    table: _Table,
    names: tuple[str, ...],
    mean: str | None,
    directions: Mapping[str, DirectionSpec],
) -> None:
    if not names:
        raise table.missing("direction")
    for name in (*names, *(() if mean is None else (mean,))):
        if name not in directions:
            raise UsageError(
                f"there is no direction {name!r}",
                where=table.where,
                fix=_nearest(name, list(directions))
                if directions
                else f"add a table [directions.{name}] with a file",
            )
    if len(set(names)) < len(names):
        raise UsageError(f"direction = {list(names)} repeats a name", where=table.where)


def _check_directions(spec: EditSpec) -> None:
    if len(spec.directions) > 1 and spec.kind not in JOINT_KINDS:
        raise UsageError(
            f"kind = {str(spec.kind)!r} takes one direction, not {len(spec.directions)}",
            where=spec.place,
            why=f"a list is one joint subspace, for {', '.join(JOINT_KINDS)}",
            fix="write one [[edits]] for each direction",
        )
    if len(spec.directions) > 1 and not spec.at:
        raise UsageError(
            "the key 'at' is missing",
            where=spec.place,
            why="several directions have no site of their own in common",
            fix='name the sites, for example at = "resid"',
        )
    if spec.reflect and spec.degrees is not None:
        raise UsageError(
            "degrees and reflect exclude each other",
            where=spec.place,
            fix="degrees turns in the plane of two vectors, reflect mirrors along one",
        )


def _check_read(to: Sequence[str], targets: Sequence[str], where: str) -> None:
    """Raise when a target that somebody named reads nothing of what is written."""
    for target in targets:
        if not set(READS[target]) & set(to):
            raise UsageError(
                f"{target} is a target, and reads no {' or '.join(to)}",
                where=where,
                fix=f"write {' or '.join(READS[target])} as well, or leave {target} out",
            )


def _export(table: _Table) -> ExportSpec:
    named = "target" in table
    export = ExportSpec(
        to=table.choices("to", OUTPUTS, ("checkpoint",)),
        allow=table.choices("allow", ALLOWANCES, ()),
        target=table.choices("target", RUNTIMES, ("transformers",)),
    )
    table.close()
    for key, values in (("to", export.to), ("target", export.target)):
        if not values:
            raise UsageError(f"{key} is an empty list", where=table.where)
    _check_read(export.to, export.target if named else (), table.where)
    return export


_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_DATASET = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def _card(table: _Table) -> CardSpec:
    card = CardSpec(
        notice=table.optional("notice", str),
        summary=table.optional("summary", str),
        intended=table.optional("intended", str),
        side_effects=table.optional("side_effects", str),
        not_for=table.optional("not_for", str),
        licence=table.optional("licence", str),
        licence_name=table.optional("licence_name", str),
        language=table.words("language"),
        datasets=table.words("datasets"),
    )
    table.close()
    for key, values, pattern, meant in (
        ("licence", (card.licence or "other",), _LICENCE, "an id as the Hub spells it: apache-2.0"),
        ("language", card.language, _LANGUAGE, "an ISO 639 code: en"),
        ("datasets", card.datasets, _DATASET, "an id on the Hub: owner/name"),
    ):
        for value in values:
            if pattern.fullmatch(value) is None:
                raise UsageError(f"{key} holds {value!r}", where=table.where, fix=f"give {meant}")
    if card.notice is not None and card.notice not in NOTICES:
        raise UsageError(
            f"notice = {card.notice!r}", where=table.where, fix=_nearest(card.notice, NOTICES)
        )
    if (card.licence == "other") != (card.licence_name is not None):
        raise UsageError(
            'licence_name goes with licence = "other", and licence = "other" with it',
            where=table.where,
            fix="name the licence, or leave both out to inherit the base's",
        )
    return card


def _verify(table: _Table) -> VerifySpec:
    most_kl = table.optional("most_kl", float)
    table.close()
    if most_kl is not None and most_kl <= 0:
        raise UsageError(
            f"most_kl = {most_kl} is not above zero",
            where=table.where,
            why="it is what KL(hooked ‖ baked) may be of KL(hooked ‖ base), and no plan that is "
            "not exact reaches 0",
        )
    return VerifySpec(most_kl)


def _calibrate(table: _Table, folder: Path) -> CalibrateSpec | None:
    if table.empty:
        return None
    prompts = table.take("prompts", str)
    tokens = table.take("tokens", int, TOKENS)
    rank = table.take("rank", int, RANK)
    corrections = table.optional("corrections", int)
    constant = table.take("constant", bool, True)
    table.close()
    for key, value, least in (
        ("tokens", tokens, 1),
        ("rank", rank, 1),
        ("corrections", corrections, 0),
    ):
        if value is not None and value < least:
            raise UsageError(f"{key} = {value} is below {least}", where=table.where)
    path = folder / Path(prompts).expanduser()
    return CalibrateSpec(prompts, path, tokens, rank, corrections, constant)
