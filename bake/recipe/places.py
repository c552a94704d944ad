"""Which item of an artifact acts at which site of one model, and what is refused of that."""

from collections.abc import Mapping, Sequence

from bake.affine import AffineMap
from bake.directions import (
    MODULE,
    ROWS,
    ZERO,
    ZERO_SITES,
    Direction,
    Directions,
    Shape,
    shortened,
)
from bake.edits import EditKind, WeightUpdate
from bake.errors import DirectionError, UsageError
from bake.families import Layout
from bake.nonlinear import Nonlinear
from bake.recipe.examples import example, spelled
from bake.recipe.spec import DirectionSpec, EditTable
from bake.sites import STREAM_KINDS, Site, SiteKind, expand, parse_site, patterns, span


def own_sites(
    kind: EditKind,
    spec: DirectionSpec,
    found: Directions,
    layout: Layout,
    known: Mapping[str, Site],
) -> tuple[Site, ...]:
    """Return the sites that an artifact itself names.

    Raises:
        UsageError: it names none.
        DirectionError: it names a module that is another site in this model.
    """
    items = (_pinned(spec, found),) if spec.pinned else found.items
    if any(item.site is None for item in items):
        sites, what = example(kind, items, layout)
        raise UsageError(
            "the key 'at' is missing",
            why=f"the artifact of direction {spec.name!r} names no site",
            fix=f"name the sites, for example at = {sites}, {what}",
        )
    # expand checks the layers against the model.
    names = [str(parse_site(item.site)) for item in items if item.site is not None]
    own = expand(names, layers=layout.layers, stream=layout.stream, having=layout.sites)
    check_modules(spec, found, own, known)
    return own


def check_modules(
    spec: DirectionSpec, found: Directions, sites: Sequence[Site], known: Mapping[str, Site]
) -> None:
    """Refuse sites that were read from modules' names, where a module is another site here.

    Llama calls the norm before the MLP ``post_attention_layernorm``, Gemma 2 that behind attention.

    Raises:
        DirectionError: a module is another site in this model.
    """
    meant = {site: _meant(found, site, known) for site in sites}
    wrong = next((site for site, own in meant.items() if own != site), None)
    if wrong is None:
        return
    raise DirectionError(
        f"direction {spec.name!r} was fitted at {found.metadata[f'{MODULE}{wrong}']}, which was "
        f"read as {wrong}, and in this model is {meant[wrong]}",
        why="families call different norms by one name, and the artifact names no family",
        fix=f"name the sites: at = {spelled(patterns(meant.values()))}",
    )


def _meant(found: Directions, site: Site, known: Mapping[str, Site]) -> Site:
    """Return the site that the model has the module at by which an artifact's site was named."""
    path = found.metadata.get(f"{MODULE}{site}")
    if path is None:
        return site
    # A path may begin at the inner model, without the prefix that the whole one has.
    return next((own for full, own in known.items() if f".{full}".endswith(f".{path}")), site)


def item_at(spec: DirectionSpec, found: Directions, site: Site) -> Direction:
    """Return the item of an artifact that acts at a site.

    Raises:
        UsageError: the site is in no layer, and the artifact has an item for each.
        DirectionError: there is none for the site, or it is zero.
    """
    if spec.pinned:
        return _pinned(spec, found)
    # A stack whose other layers are zero is still one item per layer.
    if len(found.items) == 1 and not {ZERO, ZERO_SITES} & found.metadata.keys():
        return found.items[0]
    own = found.at_site(str(site))
    if own is not None:
        return own
    if str(site) in found.metadata.get(ZERO_SITES, "").split(","):
        # The layer may hold another site's, which is not the one that is meant.
        raise DirectionError(
            f"direction {spec.name!r} is zero at {site}",
            fix="narrow `at` to what it holds",
        )
    if site.layer is None:
        raise UsageError(
            f"direction {spec.name!r} has {len(found.items)} items, one per "
            f"{'site' if found.items[0].site else 'layer'}, and {site} is in no layer",
            fix=f"give {_pin(found, 0)} in [directions.{spec.name}] to use one of them everywhere",
        )
    try:
        return found.at_layer(site.layer)
    except DirectionError as error:
        raise DirectionError(
            f"direction {spec.name!r} has no item for {site}: {error.what}",
            why=error.fix,
            fix="narrow `at` to what it holds, or give "
            f"{_pin(found, site.layer)} in [directions.{spec.name}]",
        ) from error


def _pinned(spec: DirectionSpec, found: Directions) -> Direction:
    """Return the item that the recipe picks for every site.

    Raises:
        DirectionError: the artifact has none there, or several of the layer.
    """
    if spec.layer is not None:
        return found.at_layer(spec.layer)
    assert spec.site is not None, "a pin is a layer or a site"
    own = found.at_site(str(parse_site(spec.site)))
    if own is None:
        raise DirectionError(
            f"direction {spec.name!r} has no item at {spec.site}",
            fix=f"it holds {shortened([item.place for item in found.items])}",
        )
    return own


def _pin(found: Directions, layer: int) -> str:
    """Return the key that picks one item of an artifact, with one of a layer where it has any."""
    layers = [item.layer for item in found.items]
    sites = {item.site: item.layer for item in found.items if item.site is not None}
    if len({*layers}) == len(layers):
        return "layer = N"
    return f'site = "{next((s for s, own in sites.items() if own == layer), next(iter(sites)))}"'


def check_layers(spec: DirectionSpec, found: Directions, layout: Layout) -> None:
    """Refuse an artifact of another number of layers than the model has.

    Raises:
        DirectionError: a stack with another number of rows than blocks, or an item of a layer that
            the model lacks.
    """
    blocks = layout.layers
    if (rows := found.metadata.get(ROWS)) not in (None, str(blocks)):
        raise DirectionError(
            f"direction {spec.name!r} has rows for {rows} blocks, and the model has {blocks}",
            why="one row for each block is meant, and in hidden_states one more, row 0, for the "
            "embedding",
            fix=_other_shape(spec.shape, str(rows), blocks),
        )
    # One item acts wherever the recipe says, and its layer is where it was fitted.
    layers = [item.layer for item in found.items] if len(found.items) > 1 else [spec.layer]
    beyond = {n for n in layers if n is not None and n >= blocks}
    if beyond:
        raise DirectionError(
            f"direction {spec.name!r} belongs to layer {span(beyond)}, "
            f"and the model has {blocks} blocks, 0 to {blocks - 1}",
            why="it was fitted on another model, or counts layers otherwise than from 0",
            fix="name the model that it was fitted on, or save it under the numbers of its blocks",
        )


def _other_shape(shape: str | None, rows: str, blocks: int) -> str:
    if shape is None:  # the system's own file
        return "name the model that it was fitted on"
    if shape == Shape.LAYERS and rows == str(blocks + 1):
        return f'set shape = "{Shape.HIDDEN_STATES}" if row l + 1 was read behind block l'
    if shape == Shape.HIDDEN_STATES and rows == str(blocks - 1):
        return f'set shape = "{Shape.LAYERS}" if row l was read behind block l'
    return "save the rows under the names of their blocks: {12: vector, 13: vector}"


def check_repeat(spec: EditTable, sites: Sequence[Site], layout: Layout) -> None:
    """Refuse to add one vector to the stream several times unless the recipe says it.

    Raises:
        UsageError: it does not.
    """
    times = [site for site in sites if site.kind in STREAM_KINDS]
    if spec.inner is not EditKind.OFFSET or spec.repeat or len(times) < 2:
        return
    raise UsageError(
        f"one vector is added at {len(times)} sites of the stream, from {times[0]} to {times[-1]}",
        why=f"the stream carries every addition on, so that {len(times)} times the vector arrive "
        "at its end",
        fix=f'name one site, for example at = "{_middle(layout)}", or say repeat = true',
    )


def fitted_to(
    map_: AffineMap | WeightUpdate | Nonlinear, sites: Sequence[Site], layout: Layout
) -> AffineMap | WeightUpdate | Nonlinear:
    """Return an update with its factors the other way round where only so it fits the weight.

    Raises:
        DirectionError: both ways fit.
    """
    if not isinstance(map_, WeightUpdate):
        return map_
    wanted = {layout.width(site) for site in sites}
    outer, inner = map_.left.shape[0], map_.right.shape[1]
    if outer == inner and {outer} == wanted:
        raise DirectionError(
            "the two vectors of the update are of one width, so that it fits both ways",
            fix="save the update as left [d, k] and right [k, i] in bake's own format",
        )
    return WeightUpdate(map_.right.T, map_.left.T) if {inner} == wanted else map_


def _middle(layout: Layout) -> Site:
    """Return a site of the model that stands as an example."""
    return Site(SiteKind.RESID_POST, layout.layers // 2)
