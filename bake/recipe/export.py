"""``[export]``: what is written, for whom, and what the plan may do; and what overrides it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bake.errors import UsageError
from bake.families import READS, RUNTIMES
from bake.recipe.base import model_of
from bake.recipe.section import Section
from bake.recipe.spec import ALLOWANCES, OUTPUTS, ExportSpec, Recipe


def read_export(table: Section) -> ExportSpec:
    """Return what ``[export]`` asks for.

    Raises:
        UsageError: an unknown key or word, an empty list, or a runtime that reads no output.
    """
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
        base = model_of(model, None, Path(), "--model")
    words = {}
    for key, given, known in (
        ("to", to, OUTPUTS),
        ("allow", allow, ALLOWANCES),
        ("target", target, RUNTIMES),
    ):
        words[key] = Section({key: list(given)}, f"--{key}").choices(key, known, ())
    export = ExportSpec(
        to=words["to"] or recipe.export.to,
        allow=tuple(dict.fromkeys((*recipe.export.allow, *words["allow"]))),
        target=words["target"] or recipe.export.target,
    )
    _check_read(export.to, words["target"], "--target")
    return replace(recipe, base=base, export=export)


def _check_read(to: Sequence[str], targets: Sequence[str], where: str) -> None:
    """Raise when a target that somebody named reads nothing of what is written."""
    for target in targets:
        if not set(READS[target]) & set(to):
            raise UsageError(
                f"{target} is a target, and reads no {' or '.join(to)}",
                where=where,
                fix=f"write {' or '.join(READS[target])} as well, or leave {target} out",
            )
