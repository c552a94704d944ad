"""From a recipe and what overrides it to a plan: what ``plan`` and ``export`` share."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.jobs.model import Model, open_model
from bake.progress import Bars, no_bars

if TYPE_CHECKING:
    from bake.directions import Directions
    from bake.edits import Edit
    from bake.errors import InexactPlan
    from bake.outputs.carry import Options
    from bake.plan import Plan
    from bake.recipe import Recipe


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Edits of a model with the plan that they lead to, and the recipe that asks for them."""

    recipe: "Recipe"
    """Without a text where no file was read."""
    model: Model
    plan: "Plan"
    directions: "Mapping[str, Directions]" = field(default_factory=dict)
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

    def record(self, out: Path | None = None) -> dict[str, Any]:
        """Return what ``bake.json`` and ``--json`` keep of the request: recipe, base, directions.

        Args:
            out: the output, from which the path of a local base is told.
        """
        if self.recorded is not None:
            return dict(self.recorded)
        from bake.cards.base import base_facts, direction_facts
        from bake.plan.sketch import sketch

        recipe, base, checkpoint = self.recipe, self.recipe.base, self.model.checkpoint
        path = None
        if base.path is not None and out is not None:
            # Resolved, as the system walks "..": from behind a link it does not lead back.
            path = os.path.relpath(checkpoint.path.resolve(), out.resolve())
        asked = {
            "title": recipe.title,
            "file": recipe.path.name,
            "digest": recipe.digest,
            "text": recipe.text,
        }
        family = self.model.family
        return {
            **({"recipe": asked} if recipe.text else {}),
            "base": {
                "model": base.model,
                "revision": checkpoint.revision,
                "digest": checkpoint.digest(),
                "path": path,
                **base_facts(checkpoint),
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
            **({} if family is None else {"family": table_of(family)}),
            **({} if recipe.verify.most_kl is None else {"verify": asdict(recipe.verify)}),
            **({} if self.calibration is None else {"calibration": dict(self.calibration)}),
        }


def table_of(path: Path) -> dict[str, str]:
    """Return what the record keeps of the user's own table: all of it, to make the plan again."""
    data = path.read_bytes()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    return {"file": path.name, "digest": digest, "text": data.decode("utf-8")}


def plan_edits(
    model: Model,
    edits: "Sequence[Edit]",
    *,
    to: Sequence[str] = ("checkpoint",),
    allow: Sequence[str] = (),
    target: Sequence[str] = ("transformers",),
) -> Request:
    """Return the plan of edits that were made in Python, which no recipe asks for.

    Args:
        model: what is edited.
        edits: in the order in which they apply.
        to: the carriers to write.
        allow: what a recipe may allow as well: recast, nulling.
        target: the runtimes that must load the result.

    Raises:
        BakeError: an edit does not fit the model.
    """
    from bake.recipe import Base, ExportSpec, Recipe

    found = model.checkpoint
    # Of a folder the name alone: a record and a card travel, and the way to it is beside it.
    base = Base(found.path.name, None, found.path)
    if found.revision is not None:
        base = Base(found.source.partition("@")[0], found.revision, None)
    export = ExportSpec(tuple(to), tuple(allow), tuple(target))
    return Request(Recipe("", Path(), base, export), model, model.plan(edits, export))


def compile_request(
    recipe: Path,
    *,
    model: str | None = None,
    family: Path | None = None,
    allow: Sequence[str] = (),
    target: Sequence[str] = (),
    to: Sequence[str] = (),
    bars: Bars = no_bars,
) -> Request:
    """Return the plan of a recipe. Of the model only headers, config and norms are read.

    Where the recipe allows an approximation and an edit needs one, the model is loaded and run.

    Raises:
        BakeError: whatever is wrong with the recipe, the model, the directions or their fit.
    """
    from bake.jobs.fitting import fitted, wanted
    from bake.recipe import build_edits, load_recipe, override, read_artifacts

    loaded = override(load_recipe(recipe), model=model, to=to, allow=allow, target=target)
    directions = read_artifacts(loaded)
    opened = open_model(loaded.base.source, revision=loaded.base.revision, family=family)
    plan, facts = opened.plan(build_edits(loaded, opened.layout, directions), loaded.export), None
    if (spec := wanted(loaded, plan)) is not None:
        plan, facts = fitted(loaded, spec, opened, plan, bars)
    return Request(loaded, opened, plan, directions, facts)
