"""Recipe × layout × directions → edits, in the recipe's order."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from bake.affine import AffineMap
from bake.directions import EITHER_WAY, Directions, Role
from bake.edits import Edit, EditKind, WeightUpdate
from bake.errors import DirectionError
from bake.families import Layout
from bake.nonlinear import Nonlinear
from bake.recipe.aliases import aliases, sites_at
from bake.recipe.amounts import amount_of
from bake.recipe.artifacts import located
from bake.recipe.maps import Amounts, Named, map_of
from bake.recipe.own import own_of
from bake.recipe.places import (
    check_layers,
    check_modules,
    check_repeat,
    fitted_to,
    item_at,
    own_sites,
)
from bake.recipe.spec import ConditionTable, EditTable, Recipe
from bake.sites import Site


def build_edits(
    recipe: Recipe, layout: Layout, directions: Mapping[str, Directions]
) -> tuple[Edit, ...]:
    """Return the edits of a recipe for one model, in the recipe's order.

    Sites that get the same item of an artifact make one edit: an artifact with one item, or with
    ``layer`` given, acts as one map at every site; one with an item per layer acts at each site by
    the item of that site or of its layer. Sites that get different amounts of it are edits of their
    own.

    Args:
        recipe: the recipe.
        layout: the model.
        directions: what ``read_artifacts`` read, by name.

    Raises:
        UsageError: an unknown site, a layer out of range, or sites that are not determined.
        DirectionError: a direction of another width, with no item for a layer, of a role that the
            kind cannot use, zero or not finite.
    """
    known = aliases(layout)
    found: list[Edit] = []
    for number, spec in enumerate(recipe.edits, start=1):
        with located(f"{recipe.path} [[edits]] {number}"):
            groups = _selections(spec, recipe, layout, directions, known)
            amounts = _amounts(spec, [site for sites, _ in groups for site in sites])
            for together, items in groups:
                for one in dict.fromkeys(amounts[site] for site in together):
                    sites = tuple(site for site in together if amounts[site] == one)
                    mean = _mean(spec, recipe, directions, items, sites[0])
                    vector_of = partial(_condition, recipe, directions, sites[0])
                    condition = None if spec.gate is None else vector_of(spec.gate)
                    edit_map = map_of(spec, items, mean, one, condition)
                    if EITHER_WAY in directions[spec.directions[0]].metadata:
                        edit_map = fitted_to(edit_map, sites, layout)
                    for site in sites:
                        _check_width(spec, edit_map, site, layout)
                    specs = [recipe.directions[name] for name in spec.directions]
                    said = [directions[name].metadata for name in spec.directions]
                    own = own_of(specs, said, items, edit_map, vector_of)
                    concept = " + ".join(spec.directions)
                    found.append(Edit(spec.kind, concept, sites, edit_map, own, spec.map))
                check_repeat(spec, together, layout)
    return tuple(found)


def _selections(
    spec: EditTable,
    recipe: Recipe,
    layout: Layout,
    directions: Mapping[str, Directions],
    known: Mapping[str, Site],
) -> list[tuple[tuple[Site, ...], tuple[Named, ...]]]:
    """Return the items that act together, each group with all of its sites."""
    specs = [recipe.directions[name] for name in spec.directions]
    # A mean, or what a condition asks of, may differ where the direction itself does not.
    read = [*specs, *(recipe.directions[name] for name in recipe.beside(spec))]
    for one in read:
        check_layers(one, directions[one.name], layout)
    if spec.at:
        sites = sites_at(spec.at, layout, known)
    else:
        sites = own_sites(spec.inner, specs[0], directions[specs[0].name], layout, known)
    for one in read:
        if not one.pinned:  # else the recipe alone says where it acts
            check_modules(one, directions[one.name], sites, known)
    groups: dict[tuple[int, ...], tuple[list[Site], tuple[Named, ...]]] = {}
    for site in sites:
        layout.width(site)  # raises where the model has no such site
        items = tuple(Named(s.name, item_at(s, directions[s.name], site), s.sign) for s in specs)
        key = tuple(id(item_at(one, directions[one.name], site)) for one in read)
        groups.setdefault(key, ([], items))[0].append(site)
    return [(tuple(group), items) for group, items in groups.values()]


def _amounts(spec: EditTable, sites: Sequence[Site]) -> dict[Site, Amounts]:
    """Return how much of an edit there is at each of its sites."""
    strength = amount_of(spec.strength, "strength").at(sites, "strength")
    coefficient = amount_of(spec.coefficient, "coefficient").at(sites, "coefficient")
    return {site: Amounts(strength[site], coefficient[site]) for site in sites}


def _condition(
    recipe: Recipe, directions: Mapping[str, Directions], site: Site, gate: ConditionTable
) -> Tensor:
    """Return the vector of a condition, that of the site or of its block."""
    spec = recipe.directions[gate.direction]
    named = Named(spec.name, item_at(spec, directions[spec.name], site), spec.sign)
    found = named.tensor(EditKind.GATE, Role.VECTOR, Role.SUBSPACE)
    return found if found.dim() == 1 else found[0]  # of a plane, what its angles count from


def _mean(
    spec: EditTable,
    recipe: Recipe,
    directions: Mapping[str, Directions],
    items: tuple[Named, ...],
    site: Site,
) -> Tensor | None:
    """Return the mean that an affine or erase edit takes its constant from, or None for zero."""
    kinds = (EditKind.AFFINE, EditKind.ERASE, EditKind.CLAMP)
    if spec.inner not in kinds or spec.mean is False:
        return None
    if isinstance(spec.mean, str):
        other = recipe.directions[spec.mean]
        named = Named(other.name, item_at(other, directions[other.name], site), other.sign)
        return named.tensor(spec.inner, Role.MEAN, Role.VECTOR)
    means = {named.name: mean for named in items if (mean := named.get(Role.MEAN)) is not None}
    if spec.mean is True and not means:
        raise DirectionError(
            f"mean = true, but {' and '.join(map(repr, spec.directions))} holds no mean",
            fix="name the direction that is the mean, or leave the key out",
        )
    first, *rest = means.values() or (None,)
    if any(first is None or not torch.equal(first, mean) for mean in rest if mean is not None):
        raise DirectionError(
            f"the means of {' and '.join(map(repr, means))} differ",
            why="a joint subspace has one mean",
            fix="name the direction that is the mean, or set mean = false",
        )
    return first


def _check_width(
    spec: EditTable, edit_map: AffineMap | WeightUpdate | Nonlinear, site: Site, layout: Layout
) -> None:
    given = edit_map.left.shape[0] if isinstance(edit_map, WeightUpdate) else edit_map.width
    wanted = layout.width(site)
    if given == wanted:
        return
    names = " + ".join(spec.directions)
    fitting = dict.fromkeys(s.kind for s in layout.sites if layout.width(s) == given)
    raise DirectionError(
        f"direction {names!r} has width {given} but {site} has width {wanted}",
        why="a direction acts on the activations of the model and the site that it was fitted on",
        fix=f"use a direction that was fitted on this model at {site}; or, if it was fitted there, "
        f"name a site of that width: {', '.join(fitting)}"
        if fitting
        else f"no site of this model has width {given}: use a direction that was fitted on it",
    )
