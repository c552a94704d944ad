"""Recipes: TOML → ``Recipe`` → edits. Strict: what a recipe says is known, or it is an error.

``load_recipe`` reads the text, ``read_artifacts`` the directions that it names, and ``build_edits``
makes the edits for one model. ``docs/recipes.md`` documents every key.
"""

from bake.recipe.agreement import disagreement
from bake.recipe.aliases import aliases
from bake.recipe.amounts import amount_of
from bake.recipe.artifacts import fetch_artifact, read_artifacts
from bake.recipe.build import build_edits
from bake.recipe.export import override
from bake.recipe.first import first_recipe, possible_kinds
from bake.recipe.limits import limits_beside, limits_differ
from bake.recipe.own import condition_words, said_of
from bake.recipe.parse import load_recipe, parse_recipe
from bake.recipe.remarks import remarks
from bake.recipe.spec import (
    ALLOWANCES,
    REDECLARING,
    Base,
    CalibrateSpec,
    CardTable,
    DirectionSpec,
    EditTable,
    ExportTable,
    Recipe,
)

__all__ = [
    "ALLOWANCES",
    "REDECLARING",
    "Base",
    "CalibrateSpec",
    "CardTable",
    "DirectionSpec",
    "EditTable",
    "ExportTable",
    "Recipe",
    "aliases",
    "amount_of",
    "build_edits",
    "condition_words",
    "disagreement",
    "fetch_artifact",
    "first_recipe",
    "limits_beside",
    "limits_differ",
    "load_recipe",
    "override",
    "parse_recipe",
    "possible_kinds",
    "read_artifacts",
    "remarks",
    "said_of",
]
