"""The keys of a recipe with their types, for editors: what ``docs/recipe.schema.json`` is made of.

A recipe is read by ``bake.recipe.parse``, whose errors name what was meant and which also checks
what a schema cannot say; a test holds the two to the same keys. Words with several spellings, such
as ``vLLM``, stand here as the record spells them.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from bake.artifact.carrier import CARRIERS
from bake.artifact.schema import json_schema
from bake.directions import Shape
from bake.edits import EditKind
from bake.families import RUNTIMES
from bake.recipe.approximation import RANK, TOKENS
from bake.recipe.card import NOTICES
from bake.recipe.edits import KINDS_OF_KEY
from bake.recipe.spec import ALLOWANCES

Text = Annotated[str, Meta(min_length=1)]
Texts = Text | Annotated[tuple[Text, ...], Meta(min_length=1)]
_ONE_OR_MORE = Meta(min_length=1)


def _one_of(*words: str) -> Meta:
    return Meta(extra_json_schema={"enum": list(words)})


class Table(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A table of a recipe."""


class BaseTable(Table, frozen=True, kw_only=True):
    """The model that is edited."""

    model: Annotated[Text, Meta(description="a folder, or owner/name[@revision] on the Hub")]
    revision: Annotated[str, Meta(description="branch, tag or commit")] | UnsetType = UNSET


class DirectionTable(Table, frozen=True, kw_only=True):
    """A fitted artifact, under a name of your choice."""

    file: Annotated[Text, Meta(description="a file or folder, or hf://owner/name/path[@revision]")]
    reader: Annotated[str, Meta(description="the format, where the file does not say it")] = ""
    key: Annotated[str, Meta(description="the name of one tensor or eraser of several")] = ""
    shape: Annotated[str, _one_of(*Shape)] | UnsetType = UNSET
    layer: (
        Annotated[int, Meta(ge=0, description="use this block's item everywhere")] | UnsetType
    ) = UNSET
    sign: Literal[1, -1] = 1


class EditTable(Table, frozen=True, kw_only=True):
    """An edit: a map of activations, and the sites where it acts."""

    kind: Annotated[str, _one_of(*EditKind)]
    direction: Annotated[Texts, Meta(description="a name of [directions], or several")]
    at: Annotated[Texts, Meta(description="the sites: resid, resid_post.14, mlp_out.8-20")] | (
        UnsetType
    ) = UNSET
    strength: Annotated[float, Meta(description="1 is the whole edit, 0 none")] = 1.0
    alpha: float = 0.0
    mean: bool | str | UnsetType = UNSET
    coefficient: float = 1.0
    degrees: float | UnsetType = UNSET
    reflect: bool = False


class ExportTable(Table, frozen=True, kw_only=True):
    """What is written, and what the plan may do for it."""

    to: Annotated[tuple[Annotated[str, _one_of(*CARRIERS)], ...], _ONE_OR_MORE] = ("checkpoint",)
    allow: tuple[Annotated[str, _one_of(*ALLOWANCES)], ...] = ()
    target: Annotated[tuple[Annotated[str, _one_of(*RUNTIMES)], ...], _ONE_OR_MORE] = (
        "transformers",
    )


class CardTable(Table, frozen=True, kw_only=True):
    """What the model card says beyond what is measured."""

    notice: Annotated[str, _one_of(*NOTICES)] | UnsetType = UNSET
    summary: str = ""
    intended: str = ""
    side_effects: str = ""
    not_for: str = ""
    licence: Annotated[str, Meta(description="its id as the Hub spells it")] | UnsetType = UNSET
    licence_name: Annotated[str, Meta(description='with licence = "other"')] | UnsetType = UNSET
    language: Texts | UnsetType = UNSET
    datasets: Texts | UnsetType = UNSET


class VerifyTable(Table, frozen=True, kw_only=True):
    """What the result is held to where it is not exact."""

    most_kl: (
        Annotated[float, Meta(gt=0, description="the share of the effect's KL")] | UnsetType
    ) = UNSET


class CalibrateTable(Table, frozen=True, kw_only=True):
    """How stand-ins are fitted for edits that have no exact fold."""

    prompts: Annotated[Text, Meta(description="a file of texts, one a line")]
    tokens: Annotated[int, Meta(ge=1)] = TOKENS
    rank: Annotated[int, Meta(ge=1)] = RANK
    corrections: Annotated[int, Meta(ge=0)] | UnsetType = UNSET
    constant: bool = True


class RecipeFile(Table, frozen=True, kw_only=True):
    """A recipe: which model is edited, with which directions, where, and what is written."""

    title: str | UnsetType = UNSET
    base: BaseTable
    directions: dict[str, DirectionTable] = {}
    edits: Annotated[tuple[EditTable, ...], _ONE_OR_MORE]
    export: ExportTable = ExportTable()
    card: CardTable = CardTable()
    verify: VerifyTable = VerifyTable()
    calibrate: CalibrateTable | UnsetType = UNSET


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, with the keys that belong to some kinds of edit only."""
    found = json_schema(RecipeFile)
    found["$defs"]["EditTable"]["dependentSchemas"] = {
        key: {"properties": {"kind": {"enum": [str(kind) for kind in kinds]}}}
        for key, kinds in KINDS_OF_KEY.items()
    }
    return found
