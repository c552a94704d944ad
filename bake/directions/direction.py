"""``Direction``: what was fitted at one place. ``Directions``: what one artifact holds.

Both are checked when they are made, so that no reader can forget to: shapes that fit each other,
floating-point values, all of them finite, and nothing zero where zero has no direction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import torch
from torch import Tensor

from bake.errors import DirectionError, UsageError
from bake.sites import HEAD_KINDS, INNER_KINDS, SiteKind, parse_site

_OWN_WIDTHS = (*HEAD_KINDS, *INNER_KINDS)
DTYPES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""The types of fitted tensors, with safetensors' names of them."""


# What a reader concludes stands beside what the file says itself, under names of bake's own.
ZERO = "bake.zero_layers"
"""In the metadata: the layers whose vector is zero and was left out."""
ZERO_SITES = "bake.zero_sites"
"""In the metadata: their sites, where the artifact has some."""
ROWS = "bake.rows"
"""In the metadata: for how many blocks the stack had rows, which the items are."""

SAYS = "bake.system_does"
"""In the metadata: what the artifact's own system does that weights cannot."""
POSITIONS = "bake.positions"
"""In the metadata: at which tokens the artifact's own system acts, a text of ``Positions``."""


class Role(StrEnum):
    """What a tensor is for; its shape in letters is in ``SHAPES``.

    d is the width of the activations at the site and k a rank. A ready update of a weight is a left
    and a right factor too, and its i is the width of the weight's input; for an eraser, i = d.
    """

    VECTOR = "vector"
    SUBSPACE = "subspace"
    MEAN = "mean"
    LEFT = "left"
    RIGHT = "right"
    BIAS = "bias"
    SCALE = "scale"
    OFFSET = "offset"
    MATRIX = "matrix"
    LOW = "low"
    HIGH = "high"
    THRESHOLD = "threshold"


SHAPES: Mapping[Role, tuple[str, ...]] = MappingProxyType(
    {
        Role.VECTOR: ("d",),
        Role.SUBSPACE: ("k", "d"),
        Role.MEAN: ("d",),
        Role.LEFT: ("d", "k"),
        Role.RIGHT: ("k", "i"),
        Role.BIAS: ("d",),
        Role.SCALE: ("d",),
        Role.OFFSET: ("d",),
        Role.MATRIX: ("d", "d"),
        Role.LOW: ("d",),
        Role.HIGH: ("d",),
        Role.THRESHOLD: ("k",),
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """One fitted thing at one place.

    Raises:
        DirectionError: a tensor of another shape than its role's, not of a floating dtype, not
            finite, or zero where a direction is meant; half of a pair of factors; or a site that
            is none, or one of another layer.
    """

    tensors: Mapping[Role, Tensor]
    """By role, on the CPU, detached, in the dtype they were stored in, each owning its memory."""
    layer: int | None = None
    """The block, counted from 0; None where the artifact names none or means every block."""
    site: str | None = None
    """The place that the artifact itself names, for example ``resid_post.14``."""

    def __post_init__(self) -> None:
        owned = {Role(role): _owned(role, tensor) for role, tensor in self.tensors.items()}
        if not owned:
            raise DirectionError(f"{self.place} holds no tensor")
        if (Role.LEFT in owned) != (Role.RIGHT in owned):
            raise DirectionError(
                f"{self.place} holds one factor of an eraser and not the other",
                fix="left [d, k] and right [k, i] go together",
            )
        sizes: dict[str, int] = {}
        for role, tensor in owned.items():
            _check_shape(role, tensor, sizes)
            _check_values(role, tensor, self.place)
        if (Role.LOW in owned) != (Role.HIGH in owned):
            raise DirectionError(
                f"{self.place} holds one limit of its values and not the other",
                fix="low [d] and high [d] go together",
            )
        factors = [role for role in (Role.LEFT, Role.RIGHT) if role in owned]
        zero = [role for role in factors if not bool(owned[role].any())]
        if len(zero) == 1:  # both are an eraser of rank zero, which a fit that found nothing gives
            raise DirectionError(f"the {zero[0]} of {self.place} is zero", fix="fit it again")
        _check_site(self.layer, self.site)
        object.__setattr__(self, "tensors", MappingProxyType(owned))

    @property
    def width(self) -> int:
        """The width d of the activations."""
        # Every role but the right factor has a d, and that factor has the left one beside it.
        return next(
            tensor.shape[SHAPES[role].index("d")]
            for role, tensor in self.tensors.items()
            if "d" in SHAPES[role]
        )

    @property
    def place(self) -> str:
        """Where this was fitted, in words for a message."""
        if self.site is not None:
            return self.site
        return "the direction" if self.layer is None else f"layer {self.layer}"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Directions:
    """What one artifact holds, and where it came from.

    Raises:
        DirectionError: no items, two at one place, or widths that differ.
    """

    concept: str
    """The artifact's own name for it, or the name of its file."""
    format: str
    """The name of the reader, a key of ``READERS``."""
    source: str
    """The path it was read from, as it was given."""
    digest: str
    """``sha256:…`` of the file; of a folder, see ``bake.directions.registry.digest``."""
    items: tuple[Direction, ...]
    metadata: Mapping[str, str]
    """What else the artifact says, as text."""

    def __post_init__(self) -> None:
        if not self.items:
            raise DirectionError("the artifact holds no direction")
        places = [(item.layer, item.site) for item in self.items]
        for item, place in zip(self.items, places, strict=True):
            if places.count(place) > 1:
                raise DirectionError(f"the artifact holds two directions for {item.place}")
        seen: dict[SiteKind | None, Direction] = {}
        for item in self.items:
            # Neurons and heads have widths of their own; all else is as wide as the stream.
            kind = None if item.site is None else parse_site(item.site).kind
            first = seen.setdefault(kind if kind in _OWN_WIDTHS else None, item)
            if first.width != item.width:
                raise DirectionError(
                    f"the widths differ: {first.width} in {first.place}, "
                    f"{item.width} in {item.place}",
                    why="the directions of one artifact belong to one model",
                )
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))

    def __repr__(self) -> str:
        count = f"{len(self.items)} item{'s' * (len(self.items) != 1)}"
        return f"Directions({self.concept}: {count} of width {self.width}, {self.format})"

    @property
    def width(self) -> int:
        """The width d of the activations, at the first place where there are several."""
        return self.items[0].width

    def at_layer(self, layer: int) -> Direction:
        """Return the item of a layer, or the one that belongs to no layer and so to all.

        Raises:
            DirectionError: no item, or several, at that layer.
        """
        found = [item for item in self.items if item.layer == layer]
        if not found and len(self.items) == 1 and self.items[0].layer is None:
            return self.items[0]
        if len(found) == 1:
            return found[0]
        if found:
            sites = [item.site for item in found if item.site is not None]
            raise self._error(
                f"there are {len(found)} directions at layer {layer}: "
                + ", ".join(item.place for item in found),
                fix=f'site = "{sites[0]}" in place of a layer picks one',
            )
        zero = str(layer) in self.metadata.get(ZERO, "").split(",")
        raise self._error(
            f"the direction of layer {layer} is zero"
            if zero
            else f"there is no direction for layer {layer}",
            fix=f"the artifact holds {shortened([item.place for item in self.items])}",
        )

    def at_site(self, site: str) -> Direction | None:
        """Return the item that the artifact itself places at a site, for example ``ln1_out.3``."""
        return next((item for item in self.items if item.site == site), None)

    def _error(self, what: str, *, fix: str) -> DirectionError:
        return DirectionError(what, where=self.source, fix=fix)


def shortened(words: Sequence[str]) -> str:
    """Return words for a message, without those in the middle where they are many."""
    return ", ".join(words if len(words) <= 12 else (*words[:8], "…", *words[-2:]))


def _owned(role: Role, tensor: Tensor) -> Tensor:
    """Return the tensor as a contiguous copy: a view would keep its whole storage alive."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise DirectionError(f"the {role} is no plain tensor: it is sparse, quantised or empty")
    if tensor.dtype not in DTYPES:
        name = str(tensor.dtype).removeprefix("torch.")
        raise DirectionError(
            f"the {role} holds {name} values where floats are meant",
            fix="save it as float16, bfloat16, float32 or float64",
        )
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _check_site(layer: int | None, site: str | None) -> None:
    if site is None:
        return
    try:
        parsed = parse_site(site)
    except UsageError as error:
        raise DirectionError(f"{site!r} is no site: {error.what}", fix=error.fix) from error
    if layer is not None and layer != parsed.layer:
        raise DirectionError(f"a direction of layer {layer} cannot be placed at {site}")


def _check_shape(role: Role, tensor: Tensor, sizes: dict[str, int]) -> None:
    """Check the shape against the role's, and against the sizes that earlier tensors set."""
    letters = SHAPES[role]
    given = list(tensor.shape)
    if len(given) != len(letters) or 0 in given:
        raise DirectionError(f"the {role} has shape {given} where [{', '.join(letters)}] is meant")
    for letter, size in zip(letters, given, strict=True):
        if sizes.setdefault(letter, size) != size:
            raise DirectionError(
                f"the {role} has shape {given}, [{', '.join(letters)}], "
                f"where {letter} = {sizes[letter]}"
            )


def _check_values(role: Role, tensor: Tensor, place: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise DirectionError(
            f"the {role} of {place} holds {bad} values that are not finite (NaN or infinity)",
            fix="fit it again; a sum in float16 overflows above 65504",
        )
    match role:
        case Role.VECTOR if not bool(tensor.any()):
            raise DirectionError(f"the {role} of {place} is zero", fix="fit it again")
        case Role.SUBSPACE if not bool(tensor.any(dim=1).all()):
            row = int((~tensor.any(dim=1)).nonzero()[0])
            raise DirectionError(f"row {row} of the {role} of {place} is zero", fix="drop it")
