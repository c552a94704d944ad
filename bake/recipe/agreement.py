"""Whether edits are those that a recipe asks for, as far as its text alone can tell."""

from collections.abc import Sequence

from bake.edits import Edit
from bake.families import Layout
from bake.recipe.aliases import aliases, sites_at
from bake.recipe.spec import EditTable, Recipe
from bake.sites import Site


def disagreement(recipe: Recipe, edits: Sequence[Edit], layout: Layout) -> str | None:
    """Return how edits differ from what a recipe says, in one clause, or None.

    Kinds, directions and sites are compared, in their order. Values are not: they come from the
    directions' files, which an artifact does not carry.

    Raises:
        UsageError: the recipe names a site that the model does not have.
    """
    known = aliases(layout)
    rest = list(edits)
    for number, spec in enumerate(recipe.edits, 1):
        # Without `at` the direction's file names the sites.
        wanted = set(sites_at(spec.at, layout, known)) if spec.at else None
        taken = _take(spec, wanted, rest)
        told = f"edit {number} of the recipe ({spec.kind} {' + '.join(spec.directions)})"
        if not taken:
            return f"{told} is not among them" if not rest else f"{told} is {_told(rest[0])}"
        found = {site for edit in taken for site in edit.sites}
        if wanted is not None and found != wanted:
            odd = sorted(map(str, found ^ wanted))
            return f"{told} acts at other sites, first {odd[0]}"
    return f"the recipe has no {_told(rest[0])}" if rest else None


def _told(edit: Edit) -> str:
    return f"{edit.kind} {edit.concept} at {edit.sites[0]}"


def _take(spec: EditTable, wanted: set[Site] | None, rest: list[Edit]) -> list[Edit]:
    """Remove the edits that one entry of the recipe made from the front of ``rest``.

    An entry makes several where its direction has an item for each layer, each at sites of its own.
    """
    taken: list[Edit] = []
    seen: set[Site] = set()
    while rest and rest[0].kind is spec.kind and rest[0].concept == " + ".join(spec.directions):
        sites = set(rest[0].sites)
        if taken and (sites & seen or (wanted is not None and not sites <= wanted)):
            break
        seen |= sites
        taken.append(rest.pop(0))
        if wanted is not None and seen >= wanted:
            break
    return taken
