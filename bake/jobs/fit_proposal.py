"""The file of fitted directions, and a recipe of it whose plan goes ahead."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bake.jobs.fit_directions import FittedDirections

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


def propose(found: FittedDirections, out: Path) -> Proposal:
    """Return the file and a recipe whose plan goes ahead on this model, where one does.

    Of what a recipe may allow the least is taken with which the plan is not refused.

    Args:
        found: what was fitted.
        out: where the file is to go; the recipe is meant to stand beside it.

    Raises:
        BakeError: the recipe does not fit the model.
    """
    from bake.directions import write_directions
    from bake.fit import METHODS
    from bake.fit.proposal import allowances, recipe_text
    from bake.jobs.request import plan_recipe
    from bake.recipe import load_recipe, read_artifacts

    asked, checkpoint = found.asked, found.model.checkpoint
    name, revision = out.name, checkpoint.revision
    model = checkpoint.repo if revision else named_beside(checkpoint.path.resolve(), out)
    with tempfile.TemporaryDirectory(prefix="bake-") as folder:
        file = Path(folder) / name
        write_directions(found.directions, file)
        tried: list[tuple[str, Request]] = []
        for allow in allowances():
            text = recipe_text(
                asked.concept,
                name,
                model,
                revision,
                method=METHODS[asked.method],
                found=found.sweep,
                allow=allow,
                every_site=asked.every_site,
            )
            path = file.with_suffix(".toml")
            path.write_text(text, encoding="utf-8")
            recipe = load_recipe(path)
            tried.append((text, plan_recipe(recipe, read_artifacts(recipe), found.model)))
            if tried[-1][1].refusal() is None:
                break
        else:
            tried = tried[:1]  # what it asks for by itself is refused, and the plan says why
        return Proposal(file.read_bytes(), *tried[-1])


def named_beside(model: Path, out: Path) -> str:
    """Return a folder as a recipe at ``out`` names it, from its own place where they are near.

    The text of a recipe travels, and what of it is a home folder is refused by ``bake push``.
    """
    here = out.absolute().parent.resolve()
    if os.path.commonpath([model, here]) == model.anchor:
        return str(model)
    relative = os.path.relpath(model, here)
    return relative if relative.startswith("..") else f"./{relative}"
