"""What is worth knowing of a recipe's edits beside their maps, one sentence each, for the plan."""

from collections.abc import Mapping

from bake.directions import Directions, Role
from bake.edits import EditKind
from bake.recipe.amounts import amount_of
from bake.recipe.edits import AMOUNTS
from bake.recipe.own import said_of
from bake.recipe.spec import Recipe


def remarks(recipe: Recipe, directions: Mapping[str, Directions]) -> tuple[str, ...]:
    """Return what the plan, the record and the card say of the recipe's edits.

    Amounts that differ from site to site; what an artifact's own system does and weights cannot,
    which is always on and at every position; and an affine edit whose constant comes from no mean.
    """
    found: dict[str, None] = {}
    for edit in recipe.edits:
        for key in AMOUNTS:
            if isinstance(written := getattr(edit, key), tuple | dict):
                amount = amount_of(written, key).words()
                found[f"{edit.kind} {' + '.join(edit.directions)}: {key} {amount}"] = None
        for name in edit.directions:
            if said := said_of(recipe.directions[name], directions[name].metadata):
                found[f"direction {name!r}: {said}"] = None
        means = (Role.MEAN in item.tensors for n in edit.directions for item in directions[n].items)
        absent = edit.mean is False or (edit.mean is None and not any(means))
        if edit.inner is EditKind.AFFINE and absent:
            found[
                f"affine {' + '.join(edit.directions)}: there is no mean, so that the component is "
                f"set to {edit.alpha:g} times the direction's"
            ] = None
    return tuple(found)
