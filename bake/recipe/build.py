"""Recipe × layout × directions → edits, in the recipe's order."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bake.affine import AffineMap
from bake.directions import MODULE, Direction, Directions, Role
from bake.edits import Edit, EditKind, WeightUpdate
from bake.errors import DirectionError, UsageError
from bake.families import Layout
from bake.recipe.aliases import aliases, sites_at
from bake.recipe.artifacts import located
from bake.recipe.maps import Named, map_of
from bake.recipe.spec import DirectionSpec, EditTable, Recipe
from bake.sites import Site, expand, parse_site


def build_edits(
    recipe: Recipe, layout: Layout, directions: Mapping[str, Directions]
) -> tuple[Edit, ...]:
    """Return the edits of a recipe for one model, in the recipe's order.

    Sites that get the same item of an artifact make one edit: an artifact with one item, or with
    ``layer`` given, acts as one map at every site; one with an item per layer acts at each site by
    the item of that site or of its layer.

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
            for sites, items in _selections(spec, recipe, layout, directions, known):
                mean = _mean(spec, recipe, directions, items, sites[0])
                edit_map = map_of(spec, items, mean)
                for site in sites:
                    _check_width(spec, edit_map, site, layout)
                found.append(Edit(spec.kind, " + ".join(spec.directions), sites, edit_map))
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
    if spec.at:
        sites = sites_at(spec.at, layout, known)
    else:
        sites = _own_sites(specs[0], directions[specs[0].name], layout, known)
    groups: dict[tuple[int, ...], tuple[list[Site], tuple[Named, ...]]] = {}
    for site in sites:
        layout.width(site)  # raises where the model has no such site
        items = tuple(Named(s.name, _item(s, directions[s.name], site), s.sign) for s in specs)
        key = tuple(id(named.item) for named in items)
        groups.setdefault(key, ([], items))[0].append(site)
    return [(tuple(group), items) for group, items in groups.values()]


def _own_sites(
    spec: DirectionSpec, found: Directions, layout: Layout, known: Mapping[str, Site]
) -> tuple[Site, ...]:
    """Return the sites that an artifact itself names."""
    items = found.items if spec.layer is None else (found.at_layer(spec.layer),)
    if any(item.site is None for item in items):
        raise UsageError(
            "the key 'at' is missing",
            why=f"the artifact of direction {spec.name!r} names no site",
            fix='name the sites, for example at = "resid"',
        )
    # expand checks the layers against the model.
    names = [str(parse_site(item.site)) for item in items if item.site is not None]
    for name in names:
        _check_module(spec, found, name, known)
    return expand(names, layers=layout.layers, stream=layout.stream)


def _check_module(
    spec: DirectionSpec, found: Directions, site: str, known: Mapping[str, Site]
) -> None:
    """Refuse a site that was read from a module's name, where that module is another site here.

    Llama calls the norm before the MLP ``post_attention_layernorm``, Gemma 2 that behind attention.
    """
    path = found.metadata.get(f"{MODULE}{site}")
    if path is None:
        return
    # A path may begin at the inner model, without the prefix that the whole one has.
    meant = {str(own) for full, own in known.items() if f".{full}".endswith(f".{path}")}
    if meant and site not in meant:
        raise DirectionError(
            f"direction {spec.name!r} was fitted at {path}, which was read as {site}, "
            f"and in this model is {' or '.join(sorted(meant))}",
            why="families call different norms by one name, and the artifact names no family",
            fix=f'name the site: at = "{min(meant)}"',
        )


def _item(spec: DirectionSpec, found: Directions, site: Site) -> Direction:
    """Return the item of an artifact that acts at a site."""
    if spec.layer is not None:
        return found.at_layer(spec.layer)
    # A stack whose other layers are zero is still one item per layer.
    if len(found.items) == 1 and "zero_layers" not in found.metadata:
        return found.items[0]
    own = found.at_site(str(site))
    if own is not None:
        return own
    if site.layer is None:
        raise UsageError(
            f"direction {spec.name!r} has {len(found.items)} items, one per layer, "
            f"and {site} is in no layer",
            fix=f"give layer = N in [directions.{spec.name}] to use one of them everywhere",
        )
    try:
        return found.at_layer(site.layer)
    except DirectionError as error:
        raise DirectionError(
            f"direction {spec.name!r} has no item for {site}: {error.what}",
            why=error.fix,
            fix=f"narrow `at` to what it holds, or give layer = N in [directions.{spec.name}]",
        ) from error


def _mean(
    spec: EditTable,
    recipe: Recipe,
    directions: Mapping[str, Directions],
    items: tuple[Named, ...],
    site: Site,
) -> Tensor | None:
    """Return the mean that an affine or erase edit takes its constant from, or None for zero."""
    if spec.kind not in (EditKind.AFFINE, EditKind.ERASE) or spec.mean is False:
        return None
    if isinstance(spec.mean, str):
        other = recipe.directions[spec.mean]
        named = Named(other.name, _item(other, directions[other.name], site), other.sign)
        return named.tensor(spec.kind, Role.MEAN, Role.VECTOR)
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
    spec: EditTable, edit_map: AffineMap | WeightUpdate, site: Site, layout: Layout
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
        fix=f"name a site of that width: {', '.join(fitting)}"
        if fitting
        else f"no site of this model has width {given}: use a direction that was fitted on it",
    )
