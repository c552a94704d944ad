"""Recipe × layout × directions → edits, in the recipe's order."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bake import edits
from bake.affine import AffineMap
from bake.directions import Direction, Directions, Role, read_directions
from bake.edits import Edit, EditKind, WeightUpdate
from bake.errors import BakeError, DirectionError, HubError, UsageError
from bake.families import Layout
from bake.recipe.aliases import aliases, translate
from bake.recipe.parse import HUB_PREFIX, DirectionSpec, EditSpec, Recipe
from bake.sites import Site, expand, parse_site

# Which kinds of edit a tensor of each role is for: the advice when a role is missing.
KINDS_OF_ROLE: Mapping[Role, tuple[EditKind, ...]] = {
    Role.VECTOR: (EditKind.ABLATE, EditKind.AFFINE, EditKind.OFFSET),
    Role.SUBSPACE: (EditKind.ABLATE, EditKind.AFFINE),
    Role.LEFT: (EditKind.ERASE, EditKind.UPDATE),
    Role.SCALE: (EditKind.SCALE,),
    Role.MATRIX: (EditKind.LINEAR, EditKind.ROTATE),
    Role.OFFSET: (EditKind.OFFSET,),
}
SIGNED_ROLES = (Role.VECTOR, Role.SUBSPACE, Role.OFFSET)


@dataclass(frozen=True, slots=True, eq=False)
class _Named:
    """One item of an artifact, under the name that the recipe gives it."""

    name: str
    item: Direction
    sign: int

    def tensor(self, kind: EditKind, *roles: Role) -> Tensor:
        """Return the tensor of the first of ``roles`` that the item has, with its sign.

        Raises:
            DirectionError: it has none of them.
        """
        for role in roles:
            if role in self.item.tensors:
                tensor = self.item.tensors[role].to(torch.float64)
                return self.sign * tensor if role in SIGNED_ROLES else tensor
        held = tuple(self.item.tensors)
        others = [other for role in held for other in KINDS_OF_ROLE.get(role, ())]
        raise DirectionError(
            f"kind = {str(kind)!r} needs {' or '.join(roles)}, "
            f"but direction {self.name!r} holds {', '.join(held)}",
            fix=f"what it holds is for {', '.join(dict.fromkeys(others))}" if others else None,
        )

    def get(self, role: Role) -> Tensor | None:
        """Return the tensor of a role, or None."""
        return self.item.tensors.get(role)


def read_artifacts(recipe: Recipe) -> dict[str, Directions]:
    """Return the directions that the recipe's edits use, by name.

    Raises:
        DirectionError: an artifact is missing, malformed or hostile.
        HubError: an artifact on the Hub cannot be fetched.
        UsageError: a Hub address that is none.
    """
    used: dict[str, None] = {}
    for edit in recipe.edits:
        used.update(dict.fromkeys(edit.directions))
        if isinstance(edit.mean, str):
            used[edit.mean] = None
    found = {}
    for name in used:
        spec = recipe.directions[name]
        with _located(f"{recipe.path} [directions.{name}]"):
            path = spec.path or fetch_artifact(spec.file)
            found[name] = read_directions(path, reader=spec.reader, key=spec.key, shape=spec.shape)
            _check_sign(spec, found[name])
    return found


def _check_sign(spec: DirectionSpec, found: Directions) -> None:
    if spec.sign == 1 or any(role in item.tensors for item in found.items for role in SIGNED_ROLES):
        return
    raise UsageError(
        f"sign = -1 is given, but the artifact holds {', '.join(found.items[0].tensors)}",
        why="only a vector, a subspace or an offset has an opposite",
        fix="leave sign out",
    )


def fetch_artifact(file: str) -> Path:
    """Return the path of an artifact on the Hub once it is in the cache.

    Args:
        file: ``hf://owner/name/path`` or ``hf://owner/name/path@revision``.

    Raises:
        HubError: the Hub or the network refuses.
        UsageError: an address that names no file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    address, _, revision = file.removeprefix(HUB_PREFIX).partition("@")
    owner, _, rest = address.partition("/")
    name, _, inside = rest.partition("/")
    if not (owner and name and inside):
        raise UsageError(
            f"{file!r} is no address of a file on the Hub",
            fix="write hf://owner/name/path or hf://owner/name/path@revision",
        )
    try:
        return Path(hf_hub_download(f"{owner}/{name}", inside, revision=revision or None))
    except HFValidationError as error:
        raise UsageError(f"{file!r} is no address of a file on the Hub: {error}") from error
    except (OSError, EntryNotFoundError) as error:  # the Hub's and the network's own errors
        first = str(error).strip().partition("\n")[0]
        raise HubError(
            f"{file} cannot be fetched: {first}",
            fix="check the address and the connection, or name a local file",
        ) from error


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
    for spec in recipe.edits:
        with _located(spec.place):
            for sites, items in _selections(spec, recipe, layout, directions, known):
                mean = _mean(spec, recipe, directions, items, sites[0])
                edit_map = _map(spec, items, mean)
                for site in sites:
                    _check_width(spec, edit_map, site, layout)
                found.append(Edit(spec.kind, " + ".join(spec.directions), sites, edit_map))
    return tuple(found)


def _selections(
    spec: EditSpec,
    recipe: Recipe,
    layout: Layout,
    directions: Mapping[str, Directions],
    known: Mapping[str, Site],
) -> list[tuple[tuple[Site, ...], tuple[_Named, ...]]]:
    """Return the items that act together, each group with all of its sites."""
    specs = [recipe.directions[name] for name in spec.directions]
    if spec.at:
        patterns = [word for text in spec.at for word in translate(text, dict(known))]
        sites = expand(patterns, layers=layout.layers, stream=layout.stream)
    else:
        sites = _own_sites(specs[0], directions[specs[0].name], layout)
    groups: dict[tuple[int, ...], tuple[list[Site], tuple[_Named, ...]]] = {}
    for site in sites:
        layout.width(site)  # raises where the model has no such site
        items = tuple(_Named(s.name, _item(s, directions[s.name], site), s.sign) for s in specs)
        key = tuple(id(named.item) for named in items)
        groups.setdefault(key, ([], items))[0].append(site)
    return [(tuple(group), items) for group, items in groups.values()]


def _own_sites(spec: DirectionSpec, found: Directions, layout: Layout) -> tuple[Site, ...]:
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
    return expand(names, layers=layout.layers, stream=layout.stream)


def _item(spec: DirectionSpec, found: Directions, site: Site) -> Direction:
    """Return the item of an artifact that acts at a site."""
    if spec.layer is not None:
        return found.at_layer(spec.layer)
    # A stack whose other layers are zero is still one item per layer.
    if len(found.items) == 1 and "zero_layers" not in found.metadata:
        return found.items[0]
    if any(item.site == str(site) for item in found.items):
        return found.at_site(str(site))
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
    spec: EditSpec,
    recipe: Recipe,
    directions: Mapping[str, Directions],
    items: tuple[_Named, ...],
    site: Site,
) -> Tensor | None:
    """Return the mean that an affine or erase edit takes its constant from, or None for zero."""
    if spec.kind not in (EditKind.AFFINE, EditKind.ERASE) or spec.mean is False:
        return None
    if isinstance(spec.mean, str):
        other = recipe.directions[spec.mean]
        named = _Named(other.name, _item(other, directions[other.name], site), other.sign)
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


def _map(
    spec: EditSpec, items: tuple[_Named, ...], mean: Tensor | None
) -> AffineMap | WeightUpdate:
    """Return the map of an edit. ``strength`` s blends any map with the identity."""
    kind, first, strength = spec.kind, items[0], spec.strength
    match kind:
        case EditKind.ABLATE:
            return edits.ablate(_rows(kind, items), strength=strength)
        case EditKind.AFFINE:
            rows = _rows(kind, items)
            return edits.affine(rows, mean=mean, alpha=spec.alpha, strength=strength)
        case EditKind.ERASE:
            left, right = first.tensor(kind, Role.LEFT), first.tensor(kind, Role.RIGHT)
            return edits.erase(left, right, mean=mean, strength=strength)
        case EditKind.OFFSET:
            vector = first.tensor(kind, Role.VECTOR, Role.OFFSET)
            return edits.offset(vector, coefficient=spec.coefficient)
        case EditKind.SCALE:
            factor = first.tensor(kind, Role.SCALE)
            return edits.scale((1 - strength) + strength * factor, shift=_shift(first, strength))
        case EditKind.ROTATE:
            return _rotation(spec, items)
        case EditKind.LINEAR:
            matrix = first.tensor(kind, Role.MATRIX)
            unit = torch.eye(matrix.shape[0], dtype=matrix.dtype)
            return edits.linear(
                (1 - strength) * unit + strength * matrix, shift=_shift(first, strength)
            )
        case EditKind.UPDATE:
            left, right = first.tensor(kind, Role.LEFT), first.tensor(kind, Role.RIGHT)
            return edits.update(strength * left.T, right)


def _rotation(spec: EditSpec, items: tuple[_Named, ...]) -> AffineMap:
    if spec.degrees is not None:
        plane = _rows(spec.kind, items)
        if plane.dim() != 2 or plane.shape[0] != 2:
            raise DirectionError(
                f"degrees turns in the plane of two vectors, not {max(1, plane.shape[0])}"
                if plane.dim() == 2
                else "degrees turns in the plane of two vectors, not one",
                fix='give direction = ["first", "second"], or reflect = true',
            )
        return edits.rotate_plane(plane, degrees=spec.degrees)
    if len(items) > 1:
        raise UsageError(
            "a rotation in the plane of two directions needs degrees",
            fix="add degrees = 30, for example",
        )
    if spec.reflect:
        return edits.reflect(items[0].tensor(spec.kind, Role.VECTOR))
    return edits.rotate(items[0].tensor(spec.kind, Role.MATRIX))


def _rows(kind: EditKind, items: tuple[_Named, ...]) -> Tensor:
    """Return the one vector [d], or the rows [k, d] of all vectors and subspaces together."""
    tensors = [named.tensor(kind, Role.VECTOR, Role.SUBSPACE) for named in items]
    if len(tensors) == 1:
        return tensors[0]
    widths = {named.name: tensor.shape[-1] for named, tensor in zip(items, tensors, strict=True)}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{name!r} has {width}" for name, width in widths.items())
        raise DirectionError(f"the widths of a joint subspace differ: {listed}")
    return torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])


def _shift(named: _Named, strength: float) -> Tensor | None:
    for role in (Role.OFFSET, Role.BIAS):
        found = named.get(role)
        if found is not None:
            return strength * found.to(torch.float64)
    return None


def _check_width(
    spec: EditSpec, edit_map: AffineMap | WeightUpdate, site: Site, layout: Layout
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


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Say where in the recipe an error belongs that does not say it itself."""
    try:
        yield
    except BakeError as error:
        if error.where is not None:
            raise
        raise type(error)(error.what, where=where, why=error.why, fix=error.fix) from error
