"""What plain tensors mean: a vector, a subspace, a stack of layers, a mapping from layer to vector.

The four plain formats (.npy, .npz, .pt, .safetensors) share these rules. None of them guesses: a
two-dimensional array says in the recipe what it is, and names that are no layers are listed.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from bake.directions.direction import ROWS, ZERO, ZERO_SITES, Direction, Role, shortened
from bake.directions.reader import Content, Request, Shape
from bake.errors import DirectionError, UsageError
from bake.sites import Site, SiteKind, parse_site

Place = tuple[int | None, str | None]
"""Layer and site."""

# What a language model's blocks lie in; a vision tower's or an encoder's are no sites.
STACK = r"(?:(?:base_model|model|language_model|text_model|transformer|gpt_neox|decoder)\.)*"
# "12", "layer_12", "vector.12", "transformer.h.12": a block counted from 0. Five digits are more
# layers than any model.
_LAYER_NAME = re.compile(
    rf"(?:(?:layers?|vectors?|directions?|blocks?)[._-]|{STACK}(?:layers|h)\.)?(\d{{1,5}})"
)
_HOOK = re.compile(r"blocks\.(\d{1,5})\.hook_(resid_(?:pre|mid|post))")


def place_of(name: str) -> Place | None:
    """Return the layer and site that a tensor's name stands for, or None when it names none.

    ``"12"``, ``"layer_12"`` and ``"model.layers.12"`` name block 12, ``"resid_post.12"`` and
    TransformerLens's ``"blocks.12.hook_resid_post"`` a site.
    """
    match = _LAYER_NAME.fullmatch(name)
    if match is not None:
        return int(match[1]), None
    try:
        site = parse_site(hooked_site(name) or name)
    except UsageError:
        return None
    return site.layer, str(site)


def hooked_site(name: str) -> str | None:
    """Return the site of a hook of TransformerLens on the stream, or None.

    Its other hooks have no one site: in models that norm what a branch writes,
    ``hook_mlp_out`` is behind that norm.
    """
    match = _HOOK.fullmatch(name)
    return None if match is None else f"{match[2]}.{int(match[1])}"


def from_tensor(tensor: Tensor, shape: Shape | None, place: Place = (None, None)) -> Content:
    """Return the content of one tensor: [d], [1, d], [k, d] or [layers, d].

    Raises:
        DirectionError: a shape that can be read in two ways and is not declared, or in none.
    """
    layer, site = place
    given = list(tensor.shape)
    if 0 in given:
        raise DirectionError(f"a tensor of shape {given} holds nothing")
    if shape in (Shape.LAYERS, Shape.HIDDEN_STATES):
        if tensor.dim() != 2 or layer is not None:
            raise DirectionError(
                f'shape = "{shape}" needs one tensor [layers, d], not {given}'
                + (f" at layer {layer}" if layer is not None else "")
            )
        return hidden_states(tensor) if shape is Shape.HIDDEN_STATES else stacked(tensor)
    if shape is Shape.SUBSPACE:
        if tensor.dim() != 2:
            raise DirectionError(f'shape = "subspace" needs a tensor [k, d], not {given}')
        return Content((Direction({Role.SUBSPACE: tensor}, layer, site),))
    if tensor.dim() == 1 or (tensor.dim() == 2 and given[0] == 1):
        return Content((Direction({Role.VECTOR: tensor.reshape(-1)}, layer, site),))
    if shape is Shape.VECTOR:
        raise DirectionError(f'shape = "vector" needs a tensor [d] or [1, d], not {given}')
    raise _unclear(given)


def picked(tensor: Tensor, request: Request) -> Tensor:
    """Return the row of a matrix [features, d] that the request names, or the tensor itself.

    Raises:
        DirectionError: there is no such row.
    """
    if request.feature is None:
        return tensor
    if tensor.dim() != 2 or not 0 <= request.feature < tensor.shape[0]:
        raise DirectionError(
            f"a tensor of shape {list(tensor.shape)} has no row {request.feature}",
            fix="`feature` is a row of a matrix [features, d], counted from 0",
        )
    return tensor[request.feature]


def one_row(tensor: Tensor, name: str, width: int | None = None) -> Tensor:
    """Return a tensor that holds one row, [d], [1, d] or the like, as [d].

    Args:
        tensor: the tensor.
        name: what it is, for messages.
        width: d, where it is known.

    Raises:
        DirectionError: it holds several or none, is no array of floats, or has another width.
    """
    # max: a number alone has no axis, and is no row either.
    if not tensor.is_floating_point() or not 0 < tensor.numel() == max(tensor.shape, default=0):
        raise DirectionError(f"{name} has shape {list(tensor.shape)} and is no [d]")
    if width not in (None, tensor.numel()):
        raise DirectionError(f"{name} has shape {list(tensor.shape)} where [{width}] is meant")
    return tensor.reshape(-1)


def stacked(rows: Tensor, site: SiteKind | None = None) -> Content:
    """Return the rows [layers, d] of a stack, one for each block and perhaps at its ``site``."""
    places: dict[Place, Tensor] = {
        (n, None if site is None else str(Site(site, n))): row for n, row in enumerate(rows)
    }
    return layered(places).beside({ROWS: str(len(rows))})


def hidden_states(rows: Tensor) -> Content:
    """Return the rows [layers + 1, d] of transformers' ``hidden_states``, at the sites they mean.

    The last row was taken behind the final norm. The systems that keep it add it before that norm,
    at the output of the last block, and so does this.
    """
    places: dict[Place, Tensor] = {
        (n, str(Site(SiteKind.RESID_POST, n))): row for n, row in enumerate(rows[1:])
    }
    # In no layer, so that attn_out.0 and mlp_out.0 get the row of block 0.
    first: dict[Place, Tensor] = {(None, str(Site(SiteKind.RESID_PRE, 0))): rows[0]}
    return layered(first | places).beside({ROWS: str(len(rows) - 1)})


def layered(vectors: Mapping[Place, Tensor]) -> Content:
    """Return one vector per place; zero vectors are left out and named in the metadata.

    A difference of means at a template's own tokens is exactly zero before the first block: such
    a stack is sound, and only that layer of it cannot be used.

    Raises:
        DirectionError: every vector is zero.
    """
    zero = [place for place, vector in vectors.items() if not bool(vector.any())]
    if len(zero) == len(vectors):
        raise DirectionError("every vector of the artifact is zero", fix="fit it again")
    items = tuple(
        Direction({Role.VECTOR: vector.reshape(-1)}, *place)
        for place, vector in vectors.items()
        if place not in zero
    )
    named = {
        ZERO: [str(layer) for layer, _ in zero if layer is not None],
        ZERO_SITES: [site for _, site in zero if site is not None],
    }
    return Content(items, {key: ",".join(words) for key, words in named.items() if words})


def from_named(names: Sequence[str], get: Callable[[str], Tensor], request: Request) -> Content:
    """Return the content of named tensors: one of them, or a mapping from layer to vector.

    Args:
        names: the names of all tensors.
        get: reads one of them.
        request: its ``key`` picks one tensor, its ``shape`` says what a two-dimensional one is.

    Raises:
        DirectionError: an unknown key, names that are neither one tensor nor layers, or tensors
            of the wrong shape.
    """
    if not names:
        raise DirectionError("the file holds no tensor")
    if request.key is not None:
        name = _find(request.key, names)
        place = place_of(name) or (None, None)
        return from_tensor(picked(get(name), request), request.shape, place).beside({"key": name})
    places = {name: place_of(name) for name in names}
    if all(place is not None for place in places.values()):
        return _mapping({name: place for name, place in places.items() if place}, get, request)
    if len(names) == 1:
        tensor = picked(get(names[0]), request)
        return from_tensor(tensor, request.shape).beside({"key": names[0]})
    raise DirectionError(
        f"the file holds {len(names)} tensors whose names are no layers: {listing(names)}",
        fix="name one of them with `key`",
    )


def _mapping(
    places: Mapping[str, Place], get: Callable[[str], Tensor], request: Request
) -> Content:
    """Return {layer: vector}, or {layer: subspace} where that is declared."""
    if request.shape in (Shape.LAYERS, Shape.HIDDEN_STATES):
        raise DirectionError(
            f'shape = "{request.shape}" is for one stacked tensor, but the file names its layers: '
            f"{listing(list(places))}",
            fix="leave `shape` out",
        )
    if request.feature is not None:
        raise DirectionError(
            f"`feature` is a row of one matrix, but the file names its layers: "
            f"{listing(list(places))}",
            fix="name the matrix with `key`, or leave `feature` out",
        )
    by_place: dict[Place, str] = {}
    for name, place in places.items():
        if place in by_place:
            raise DirectionError(f"{by_place[place]!r} and {name!r} name the same layer")
        by_place[place] = name
    if request.shape is Shape.SUBSPACE or len(by_place) == 1:
        items: list[Direction] = []
        for place, name in by_place.items():
            items += from_tensor(get(name), request.shape, place).items
        return Content(tuple(items))
    vectors: dict[Place, Tensor] = {}
    for place, name in by_place.items():
        tensor = get(name)
        if tensor.dim() != 1 and (tensor.dim() != 2 or tensor.shape[0] != 1):
            raise DirectionError(
                f"{name!r} has shape {list(tensor.shape)} where a vector [d] is meant",
                fix='set shape = "subspace" if each layer holds a subspace [k, d]',
            )
        vectors[place] = tensor
    return layered(vectors)


def listing(names: Sequence[str]) -> str:
    """Return names for a message, shortened where they are many."""
    return shortened([repr(name) for name in names])


def _find(key: str, names: Sequence[str]) -> str:
    if key in names:
        return key
    near = difflib.get_close_matches(key, names, n=1)
    raise DirectionError(
        f"the file holds nothing named {key!r}",
        fix=f"did you mean {near[0]!r}?" if near else f"it holds {listing(names)}",
    )


def _unclear(given: list[int]) -> DirectionError:
    if len(given) == 2:
        return DirectionError(
            f"a tensor of shape {given} can be read in two ways",
            why=f"it is either one subspace spanned by {given[0]} directions, or one vector for "
            f"each of {given[0]} layers, and nothing in the file says which",
            fix='set shape = "subspace" or shape = "layers", or shape = "hidden_states" if row 0 '
            "is the embedding",
        )
    why = None
    if len(given) == 3:
        why = (
            "three axes are a family of directions, such as the [positions, layers, d] of "
            'mean_diffs.pt, which reader = "arditi" reads with the position as `key`'
            if given[1] != 1
            else f"[N, 1, d] are the activations of {given[0]} examples, whose mean differs from "
            "another class's by the direction"
        )
    return DirectionError(
        f"a tensor of shape {given} is no vector [d], subspace [k, d] or stack [layers, d]",
        why=why,
        fix='set reader = "activations" and minus = the other class\'s file'
        if len(given) == 3 and given[1] == 1
        else "save the one vector that is meant",
    )
