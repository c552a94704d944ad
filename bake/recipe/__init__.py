"""Recipes: TOML → ``Recipe`` → edits. Strict: what a recipe says is known, or it is an error.

``load_recipe`` reads the text, ``read_artifacts`` the directions that it names, and ``build_edits``
makes the edits for one model. ``docs/recipes.md`` documents every key.
"""

from bake.families import RUNTIMES
from bake.recipe.agreement import disagreement
from bake.recipe.aliases import aliases
from bake.recipe.build import build_edits, fetch_artifact, read_artifacts
from bake.recipe.parse import (
    ALLOWANCES,
    HUB_PREFIX,
    OUTPUTS,
    Base,
    CalibrateSpec,
    CardSpec,
    DirectionSpec,
    EditSpec,
    ExportSpec,
    Recipe,
    VerifySpec,
    card_of,
    load_recipe,
    override,
    parse_recipe,
)

__all__ = [
    "ALLOWANCES",
    "HUB_PREFIX",
    "OUTPUTS",
    "RUNTIMES",
    "Base",
    "CalibrateSpec",
    "CardSpec",
    "DirectionSpec",
    "EditSpec",
    "ExportSpec",
    "Recipe",
    "VerifySpec",
    "aliases",
    "build_edits",
    "card_of",
    "disagreement",
    "fetch_artifact",
    "load_recipe",
    "override",
    "parse_recipe",
    "read_artifacts",
]
