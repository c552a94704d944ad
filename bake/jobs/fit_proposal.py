"""The file of fitted directions, and a recipe of it whose plan goes ahead."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bake.jobs.fit_directions import FittedDirections
from bake.jobs.model import Model

if TYPE_CHECKING:
    from bake.jobs.request import Request


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """A file of directions and the recipe that uses it, as bytes that are not written yet."""

    directions: bytes
    recipe: str
    request: "Request"
    """What the recipe comes to on this model."""

    @property
    def exactness(self) -> str:
        """What the plan says of itself, in a word."""
        return str(self.request.plan.exactness)


def propose(found: FittedDirections, name: str) -> Proposal:
    """Return the file and a recipe whose plan goes ahead on this model, where one does.

    Of what a recipe may allow the least is taken with which the plan is not refused.

    Args:
        found: what was fitted.
        name: of the file, which the recipe names; the recipe has it too, with ``.toml``.

    Raises:
        BakeError: the recipe does not fit the model.
    """
    from bake.directions import write_directions
    from bake.fit import METHODS
    from bake.fit.proposal import allowances, recipe_text

    asked, checkpoint = found.asked, found.model.checkpoint
    revision = checkpoint.revision
    with tempfile.TemporaryDirectory(prefix="bake-") as folder:
        file = Path(folder) / name
        write_directions(found.directions, file)
        tried: list[tuple[str, Request]] = []
        for allow in allowances():
            text = recipe_text(
                asked.concept,
                name,
                str(checkpoint.path.resolve()) if revision is None else checkpoint.repo,
                revision,
                method=METHODS[asked.method],
                found=found.sweep,
                allow=allow,
                every_site=asked.every_site,
            )
            tried.append((text, _planned(found.model, file.with_suffix(".toml"), text)))
            if tried[-1][1].refusal() is None:
                break
        else:
            tried = tried[:1]  # what it asks for by itself is refused, and the plan says why
        return Proposal(file.read_bytes(), *tried[-1])


def _planned(model: Model, path: Path, text: str) -> "Request":
    """Return what a recipe comes to, on a model that is open."""
    from bake.jobs.request import Request
    from bake.recipe import build_edits, load_recipe, read_artifacts

    path.write_text(text, encoding="utf-8")
    recipe = load_recipe(path)
    directions = read_artifacts(recipe)
    plan = model.plan(build_edits(recipe, model.layout, directions), recipe.export)
    return Request(recipe, model, plan, directions)
