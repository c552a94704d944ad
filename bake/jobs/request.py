"""From a recipe and what overrides it to a plan: what ``plan`` and ``export`` share."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.progress import Bars, no_bars

if TYPE_CHECKING:
    from bake.checkpoints import Checkpoint
    from bake.directions import Directions
    from bake.errors import InexactPlan
    from bake.families import Layout
    from bake.outputs.carry import Options
    from bake.plan import Plan
    from bake.recipe import Recipe


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A recipe with the plan that it leads to."""

    recipe: "Recipe"
    checkpoint: "Checkpoint"
    layout: "Layout"
    """Of the base: a recast changes the plan's."""
    directions: "Mapping[str, Directions]"
    plan: "Plan"
    family: Path | None = None
    """The user's own table, which the record then carries."""
    calibration: Mapping[str, Any] | None = None
    """How stand-ins were fitted, where some were."""
    recorded: Mapping[str, Any] | None = None
    """What an artifact's record says of the request, where the plan was made anew from it."""

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

    def complete(self) -> "Checkpoint":
        """Return the base with its weights at hand, which are fetched where a plan needed none."""
        if self.checkpoint.complete:
            return self.checkpoint
        from bake.checkpoints import open_checkpoint

        source, revision = self.recipe.base.source, self.checkpoint.revision
        return open_checkpoint(source, revision=revision, complete=True)

    def record(self, out: Path | None = None) -> dict[str, Any]:
        """Return what ``bake.json`` and ``--json`` keep of the request: recipe, base, directions.

        Args:
            out: the output, from which the path of a local base is told.
        """
        if self.recorded is not None:
            return dict(self.recorded)
        from bake.cards.base import base_facts, direction_facts
        from bake.plan.sketch import sketch

        recipe, base = self.recipe, self.recipe.base
        path = None
        if base.path is not None and out is not None:
            # Resolved, as the system walks "..": from behind a link it does not lead back.
            path = os.path.relpath(self.checkpoint.path.resolve(), out.resolve())
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
                **base_facts(self.checkpoint),
            },
            "directions": {
                name: {
                    "file": recipe.directions[name].file,
                    "concept": found.concept,
                    "format": found.format,
                    "digest": found.digest,
                    "metadata": dict(sorted(found.metadata.items())),
                    "tensors": direction_facts(found),
                }
                for name, found in self.directions.items()
            },
            "allow": list(recipe.export.allow),
            "target": list(recipe.export.target),
            "sketch": sketch(self.plan),
            **({} if self.family is None else {"family": table_of(self.family)}),
            **({} if recipe.verify.most_kl is None else {"verify": asdict(recipe.verify)}),
            **({} if self.calibration is None else {"calibration": dict(self.calibration)}),
        }


def table_of(path: Path) -> dict[str, str]:
    """Return what the record keeps of the user's own table: all of it, to make the plan again."""
    data = path.read_bytes()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    return {"file": path.name, "digest": digest, "text": data.decode("utf-8")}


def compile_request(
    recipe: Path,
    *,
    model: str | None,
    family: Path | None,
    allow: tuple[str, ...],
    target: tuple[str, ...],
    to: tuple[str, ...] = (),
    bars: Bars = no_bars,
) -> Request:
    """Return the plan of a recipe. Of the model only headers, config and norms are read.

    Where the recipe allows an approximation and an edit needs one, the model is loaded and run.

    Raises:
        BakeError: whatever is wrong with the recipe, the model, the directions or their fit.
    """
    import torch

    from bake.checkpoints import open_checkpoint
    from bake.families.fit import layout_of
    from bake.jobs.fitting import fitted, wanted
    from bake.plan.compile import compile_plan
    from bake.recipe import build_edits, load_recipe, override, read_artifacts

    loaded = override(load_recipe(recipe), model=model, to=to, allow=allow, target=target)
    directions = read_artifacts(loaded)
    checkpoint = open_checkpoint(loaded.base.source, revision=loaded.base.revision)
    layout = layout_of(checkpoint, family)
    compile_ = partial(
        compile_plan,
        layout=layout,
        gain=lambda name: checkpoint.read(name).to(torch.float64),
        config=checkpoint.config,
        allow=loaded.export.allow,
        targets=loaded.export.target,
    )
    plan, facts = compile_(build_edits(loaded, layout, directions)), None
    if (spec := wanted(loaded, plan)) is not None:
        plan, facts = fitted(
            loaded, spec, plan, compile_, checkpoint, layout, family=family, bars=bars
        )
    return Request(loaded, checkpoint, layout, directions, plan, family, facts)
