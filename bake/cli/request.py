"""From a recipe and the command line's options to a plan: what ``plan`` and ``export`` share."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from bake.checkpoints import Checkpoint
    from bake.directions import Directions
    from bake.errors import InexactPlan
    from bake.families import Family, Layout
    from bake.outputs.carry import Options
    from bake.plan import Plan
    from bake.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A recipe with the plan that it leads to."""

    recipe: "Recipe"
    checkpoint: "Checkpoint"
    layout: "Layout"
    """Of the base: a recast changes the plan's."""
    directions: "Mapping[str, Directions]"
    plan: "Plan"

    def refusal(self, options: "Options | None" = None) -> "InexactPlan | None":
        """Return why the plan may not be executed, or None when it may.

        Args:
            options: of the export; None for a plan, which needs none of them.
        """
        from bake.errors import InexactPlan
        from bake.outputs.carry import Options, refuse

        allow = frozenset(self.recipe.export.allow)
        planned = Options(allow=allow, gguf=Path("base.gguf"))
        try:
            for carrier in self.recipe.export.to:
                refuse(carrier, self.plan, planned if options is None else options)
        except InexactPlan as error:
            return error
        return None

    def record(self, out: Path | None = None) -> dict[str, Any]:
        """Return what ``bake.json`` and ``--json`` keep of the request: recipe, base, directions.

        Args:
            out: the output, from which the path of a local base is told.
        """
        recipe, base = self.recipe, self.recipe.base
        path = None
        if base.path is not None and out is not None:
            path = os.path.relpath(self.checkpoint.path, out.absolute())
        return {
            "recipe": {
                "title": recipe.title,
                "file": recipe.path.name,
                "digest": recipe.digest,
                "text": recipe.text,
            },
            "base": {
                "model": base.model,
                "revision": self.checkpoint.revision,
                "digest": self.checkpoint.digest(),
                "path": path,
            },
            "directions": {
                name: {
                    "file": recipe.directions[name].file,
                    "concept": found.concept,
                    "format": found.format,
                    "digest": found.digest,
                    "metadata": dict(found.metadata),
                }
                for name, found in self.directions.items()
            },
            "allow": list(recipe.export.allow),
            "target": list(recipe.export.target),
        }


def recipe_options(function: F) -> F:
    """Add the recipe and the options that override it."""
    for option in (
        click.option(
            "--target",
            multiple=True,
            metavar="RUNTIME",
            help="A runtime that must load the result, instead of the recipe's: "
            "transformers, vllm or llama.cpp. May be repeated.",
        ),
        click.option(
            "--allow",
            multiple=True,
            metavar="WHAT",
            help="Allow as well: recast, nulling or approximate. May be repeated.",
        ),
        click.option("--family", type=PATH, metavar="FILE", help="Your own family table."),
        click.option(
            "--model", metavar="MODEL", help="Edit this model instead: a folder or a Hub id."
        ),
        click.argument("recipe", type=PATH),
    ):
        function = option(function)
    return function


def compile_request(
    recipe: Path,
    *,
    model: str | None,
    family: Path | None,
    allow: tuple[str, ...],
    target: tuple[str, ...],
    to: tuple[str, ...] = (),
) -> Request:
    """Return the plan of a recipe. Of the model only headers, config and norms are read.

    Raises:
        BakeError: whatever is wrong with the recipe, the model, the directions or their fit.
    """
    import torch

    from bake.checkpoints import open_checkpoint
    from bake.plan.compile import compile_plan
    from bake.recipe import build_edits, load_recipe, override, read_artifacts

    loaded = override(load_recipe(recipe), model=model, to=to, allow=allow, target=target)
    directions = read_artifacts(loaded)
    checkpoint = open_checkpoint(loaded.base.source, revision=loaded.base.revision)
    layout = layout_of(checkpoint, family)
    plan = compile_plan(
        build_edits(loaded, layout, directions),
        layout,
        gain=lambda name: checkpoint.read(name).to(torch.float64),
        config=checkpoint.config,
        allow=loaded.export.allow,
        targets=loaded.export.target,
    )
    return Request(loaded, checkpoint, layout, directions, plan)


def layout_of(checkpoint: "Checkpoint", family: Path | None) -> "Layout":
    """Return the layout of a model, by the shipped tables or by the user's own.

    Raises:
        FamilyError: no table fits.
        CheckpointError: the tensors are not what the table expects.
    """
    from bake.errors import BakeError
    from bake.families import find_family, resolve

    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    dtypes = {name: info.dtype for name, info in checkpoint.tensors.items()}
    try:
        table = find_family(checkpoint.config) if family is None else _own(checkpoint, family)
        return resolve(table, checkpoint.config, shapes, dtypes)
    except BakeError as error:
        where = checkpoint.source if error.where is None else f"{checkpoint.source}: {error.where}"
        raise type(error)(error.what, where=where, why=error.why, fix=error.fix) from error


def _own(checkpoint: "Checkpoint", path: Path) -> "Family":
    from bake.errors import FamilyError
    from bake.families import find_family, read_family

    table = read_family(path)
    names = checkpoint.config.get("architectures")
    if isinstance(names, list) and not set(names) & set(table.architectures):
        raise FamilyError(
            f"the table {path} is for {', '.join(table.architectures)}, "
            f"and the model is a {', '.join(map(str, names))}",
            where="config.json",
            fix="name the table of this architecture, or leave --family out",
        )
    return find_family(checkpoint.config, (table,))
