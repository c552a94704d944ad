"""``Recipe``: what a recipe says, as checked values with the defaults filled in.

Every table of the file is a class of its keys. The reader takes their types and ranges from it, and
``docs/recipe.schema.json`` is made of it, for editors: there words with several spellings, such as
``vLLM``, stand as the record spells them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from bake import section
from bake.artifact import CARRIERS
from bake.checkpoints.gguf.storage import AUTO, PARTS
from bake.directions import Shape
from bake.edits import EditKind
from bake.errors import UsageError
from bake.families import RUNTIMES
from bake.nonlinear import Measure
from bake.recipe.amounts import Written
from bake.rounding import Rounding

ALLOWANCES = ("recast", "relocate", "widen", "nulling", "approximate")
REDECLARING = ("recast", "widen")
"""Those with which a model is declared as another one, which an adapter cannot."""

# That a text is not empty is for editors: whoever uses it says better what is wrong.
Text = Annotated[str, Meta(extra_json_schema={"minLength": 1})]
Texts = Annotated[
    tuple[Text, ...],
    Meta(
        min_length=1,
        extra_json_schema={"minLength": 1},
        extra={"several": True, "meant": "no text or list of texts"},
    ),
]


class Table(section.Table, frozen=True, kw_only=True):
    """A table of a recipe."""

    error = UsageError


def _one_of(*words: str) -> Meta:
    return Meta(extra_json_schema={"enum": list(words)}, extra={"known": words})


def _at_least(least: int) -> Meta:
    return Meta(ge=least, extra={"range": f"is below {least}"})


class BaseTable(Table, frozen=True, kw_only=True):
    """The model that is edited."""

    model: Annotated[Text, Meta(description="a folder, or owner/name[@revision] on the Hub")]
    revision: Annotated[str | None, Meta(description="branch, tag or commit")] = None


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


_NEGATIVE = {"range": "is negative", "fix": "blocks count from 0"}
_NEGATIVE_ROW = {"range": "is negative", "fix": "features count from 0"}
_NO_SIGN = {
    "range": "is neither 1 nor -1",
    "fix": "a factor belongs to the edit: coefficient, alpha or strength",
}


class ConditionTable(Table, frozen=True, kw_only=True):
    """A condition on a token's activation: its component along a direction, above or below."""

    direction: Annotated[Text, Meta(description="a name of [directions], a vector")]
    above: float | None = None
    below: float | None = None
    measure: Annotated[str, _one_of(*Measure)] = Measure.PROJECTION.value


class DirectionTable(Table, frozen=True, kw_only=True):
    """A fitted artifact, under a name of your choice."""

    file: Annotated[Text, Meta(description="a file or folder, or hf://owner/name/path[@revision]")]
    reader: Annotated[
        str | None, Meta(description="the format, where the file does not say it")
    ] = None
    key: Annotated[str | None, Meta(description="the name of one tensor or eraser of several")] = (
        None
    )
    shape: Annotated[str | None, _one_of(*Shape)] = None
    minus: Annotated[Text | None, Meta(description="the other class's activations, as `file`")] = (
        None
    )
    feature: Annotated[
        Annotated[int, Meta(ge=0, extra=_NEGATIVE_ROW)] | None,
        Meta(description="one row of a matrix of features"),
    ] = None
    index: Annotated[
        float | None, Meta(description="a block of hidden states; between two, their blend")
    ] = None
    method: Annotated[str | None, Meta(description="which of the system's methods")] = None
    quantiles: Annotated[str | None, Meta(description="within which the system's map acts")] = None
    source: Annotated[int | None, Meta(description="the label that all tokens are taken for")] = (
        None
    )
    target: Annotated[int | None, Meta(description="the label that all tokens are given")] = None
    heads: Annotated[int | None, Meta(description="how many heads activations of ITI are of")] = (
        None
    )
    layer: Annotated[
        Annotated[int, Meta(ge=0, extra=_NEGATIVE)] | None,
        Meta(description="use this block's item everywhere"),
    ] = None
    """None leaves one item per layer."""
    site: Annotated[
        Text | None, Meta(description="use everywhere the item that the artifact places here")
    ] = None
    """As ``layer``, of an artifact with several sites of one block."""
    sign: Annotated[Literal[1, -1], Meta(extra=_NO_SIGN)] = 1
    """−1 for the opposite direction."""
    positions: Annotated[
        str | None,
        Meta(
            description="where the system itself acts: all, prompt, last, after-instruction or "
            "first:4; weights act everywhere"
        ),
    ] = None
    """The artifact's own where it is absent."""
    normalize: Annotated[
        bool, Meta(description="whether the system scales back to the norm before; weights do not")
    ] = False
    gate: Annotated[
        ConditionTable | None,
        Meta(description="on which condition the system acts; weights always do"),
    ] = None


class DirectionSpec(DirectionTable, frozen=True, kw_only=True):
    """Where a direction comes from, and what its artifact cannot say itself."""

    name: str
    path: Path | None
    """The file or folder, from the recipe's own; None for one on the Hub."""
    minus_path: Path | None = None
    """That of ``minus``, likewise."""

    @property
    def pinned(self) -> bool:
        """Whether the recipe picks one item of the artifact for every site."""
        return self.layer is not None or self.site is not None


def _by_site(description: str) -> Meta:
    return Meta(
        description=f"{description}; one number, or by block: a list, a table such as "
        '{ "8-20" = 0.9, 21 = 0.4 }, or a kernel { peak, max, min, width }; or by kind of site',
        extra={"meant": "no number, and no list or table of numbers"},
    )


class EditTable(Table, frozen=True, kw_only=True):
    """An edit: a map of activations, and the sites where it acts."""

    kind: EditKind
    map: Annotated[
        EditKind | None, Meta(description="what norm-preserving and gate do to an activation")
    ] = None
    directions: Annotated[Texts, Meta(description="a name of [directions], or several")] = (
        msgspec.field(name="direction")
    )
    at: Annotated[Texts, Meta(description="the sites: resid, resid_post.14, mlp_out.8-20")] = ()
    """Empty stands for the sites that the artifact itself names."""
    strength: Annotated[Written, _by_site("1 is the whole edit, 0 none")] = 1.0
    alpha: float = 0.0
    mean: Annotated[
        bool | str | None,
        Meta(extra={"meant": "neither true, false nor the name of a direction"}),
    ] = None
    """Whether to use the artifact's mean (None: where it has one), or the direction that is it."""
    coefficient: Annotated[Written, _by_site("what an offset's vector is multiplied by")] = 1.0
    keep: Annotated[float, Meta(description="what an offset keeps of the activation")] = 1.0
    repeat: Annotated[
        bool, Meta(description="whether one vector may be added at several sites of the stream")
    ] = False
    degrees: float | None = None
    reflect: bool = False
    angle: Annotated[
        float | None, Meta(description="degrees from the first vector that a rotation turns to")
    ] = None
    low: Annotated[float | None, Meta(description="the least that a clamp leaves")] = None
    high: Annotated[float | None, Meta(description="the most that a clamp leaves")] = None
    rectified: Annotated[
        bool, Meta(description="whether what is clamped is an encoder's, behind its ReLU")
    ] = False
    gate: Annotated[ConditionTable | None, Meta(description="where a gate acts")] = None

    @property
    def inner(self) -> EditKind:
        """The kind of the map, without what is around it."""
        return self.map or self.kind


_NONE_NEW = {"range": "adds no dimension", "fix": "leave widen out, and none is added"}


class ExportTable(Table, frozen=True, kw_only=True):
    """What is written, and what the plan may do for it."""

    to: Annotated[tuple[Annotated[str, _one_of(*CARRIERS)], ...], Meta(min_length=1)] = (
        "checkpoint",
    )
    allow: tuple[Annotated[str, _one_of(*ALLOWANCES)], ...] = ()
    target: Annotated[tuple[Annotated[str, _one_of(*RUNTIMES)], ...], Meta(min_length=1)] = (
        "transformers",
    )
    gguf_type: Annotated[
        str | dict[str, str],
        Meta(
            description="auto, keep, or a type of ggml such as Q8_0; of all edited tensors, or of "
            + ", ".join(PARTS),
            extra={"meant": "no text or table of texts"},
        ),
    ] = AUTO
    rounding: Rounding | None = None
    """None: what each carrier does by itself."""
    widen: Annotated[int, Meta(ge=1, extra=_NONE_NEW)] | None = None
    """How many dimensions a model that is widened gets; None: as few as runtimes take."""
    dequantize: bool = False
    """Whether the checkpoint of a quantised base is written in floating point."""


class CardTable(Table, frozen=True, kw_only=True):
    """What the model card says beyond what is measured."""

    notice: Annotated[str | None, _one_of("safety")] = None
    """``safety`` for an edit that concerns refusals or safety."""
    summary: str | None = None
    intended: str | None = None
    side_effects: str | None = None
    not_for: str | None = None
    licence: Annotated[str | None, Meta(description="its id as the Hub spells it")] = None
    """The base's own where it is absent."""
    licence_name: Annotated[str | None, Meta(description='with licence = "other"')] = None
    language: Texts = ()
    datasets: Texts = ()
    """Data sets on the Hub that the directions were fitted on."""


_NO_LIMIT = {
    "range": "is not above zero",
    "why": "it is what KL(hooked ‖ baked) may be of KL(hooked ‖ base), and no plan that is not "
    "exact reaches 0",
}


_NO_DIFFERENCE = {
    "range": "is not above zero",
    "why": "no number of texts shows that two models are equal",
}
_NO_SHARE = {
    "range": "is not between 0 and 1",
    "why": "it is the share of refused prompts that stay refused, and no number of prompts shows "
    "that all do",
}
_NO_RATIO = {
    "range": "is below 1",
    "why": "it is what the baked model's may be over the base's",
    "fix": "write 1.05 for 5 % more",
}
_Difference = Annotated[float, Meta(gt=0, extra=_NO_DIFFERENCE)]


class BoundsTable(Table, frozen=True, kw_only=True):
    """What a mean of the baked model is held to; one key at least."""

    least: float | None = None
    most: float | None = None
    drop: Annotated[_Difference | None, Meta(description="below the base's")] = None
    rise: Annotated[_Difference | None, Meta(description="above the base's")] = None


class RefusalsTable(Table, frozen=True, kw_only=True):
    """Prompts that the base refuses, and which share of them has to stay refused."""

    prompts: Annotated[Text, Meta(description="a file, as bake verify --prompts takes it")]
    least: Annotated[float, Meta(gt=0, lt=1, extra=_NO_SHARE)]
    phrases: Annotated[Texts, Meta(description="what a refusal begins with")] = ()
    """bake's own where there are none."""


class GateTable(Table, frozen=True, kw_only=True):
    """What the edit may cost elsewhere: limits of the baked model against its base."""

    perplexity: Annotated[
        Annotated[float, Meta(ge=1, extra=_NO_RATIO)] | None,
        Meta(description="what it may be over the base's, on [verify] text"),
    ] = None
    scores: Mapping[str, BoundsTable] = msgspec.field(default_factory=dict)
    refusals: RefusalsTable | None = None
    tasks: Annotated[
        Mapping[str, BoundsTable], Meta(description="of lm-evaluation-harness, by name")
    ] = msgspec.field(default_factory=dict)


class VerifyTable(Table, frozen=True, kw_only=True):
    """What the result is held to, and on which text its side effects are measured."""

    most_kl: Annotated[
        Annotated[float, Meta(gt=0, extra=_NO_LIMIT)] | None,
        Meta(description="the share of the effect's KL"),
    ] = None
    """Limit of mean KL(hooked ‖ baked) over mean KL(hooked ‖ base)."""
    text: Annotated[str | None, Meta(description="held-out text, one passage a line")] = None
    """The file, as the recipe names it."""
    gate: GateTable | None = None


class CalibrateTable(Table, frozen=True, kw_only=True):
    """How stand-ins are fitted for edits that have no exact fold."""

    prompts: Annotated[Text, Meta(description="a file of texts, one a line")]
    tokens: Annotated[int, _at_least(1)] = 128
    """The most that are used of every text."""
    rank: Annotated[int, _at_least(1)] = 8
    corrections: Annotated[int, _at_least(0)] | None = None
    constant: bool = True


class CalibrateSpec(CalibrateTable, frozen=True, kw_only=True):
    """How stand-ins are fitted, with the place of the texts."""

    path: Path
    """The file of ``prompts``, from the recipe's own folder."""


class RecipeFile(Table, frozen=True, kw_only=True):
    """A recipe: which model is edited, with which directions, where, and what is written."""

    title: str | None = None
    base: BaseTable
    directions: dict[str, DirectionTable] = msgspec.field(default_factory=dict)
    edits: Annotated[tuple[EditTable, ...], Meta(min_length=1)]
    export: ExportTable = ExportTable()
    card: CardTable = CardTable()
    verify: VerifyTable = VerifyTable()
    calibrate: CalibrateTable | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe, read and checked."""

    title: str
    path: Path
    base: Base
    export: ExportTable
    text: str = ""
    """The whole text of the file, comments included: it travels inside every output."""
    settings: tuple[str, ...] = ()
    """``KEY=VALUE``, which are read instead of values of the text."""
    digest: str = ""
    """``sha256:…`` of the file."""
    directions: Mapping[str, DirectionSpec] = field(default_factory=dict)
    edits: tuple[EditTable, ...] = ()
    card: CardTable = field(default_factory=CardTable)
    verify: VerifyTable = field(default_factory=VerifyTable)
    calibrate: CalibrateSpec | None = None

    def beside(self, edit: EditTable) -> tuple[str, ...]:
        """Return the directions that an edit takes its mean and its conditions from, by name."""
        gates = (edit.gate, *(self.directions[name].gate for name in edit.directions))
        named = [gate.direction for gate in gates if gate is not None]
        return (*named, edit.mean) if isinstance(edit.mean, str) else tuple(named)
