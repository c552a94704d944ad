"""What the writers and the readers of the stream become: values that ``emit`` makes updates of."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap, DiagonalMap, LowRankMap
from bake.edits import WeightUpdate
from bake.families import Branch, Layout, Linear, Norm
from bake.plan.hooks import Hooks
from bake.plan.quotient import Computed, computing
from bake.plan.stream_fold import Failure, StreamFold
from bake.plan.types import PartMap, TensorUpdate
from bake.sites import STREAM_KINDS, Site, SiteKind

Gain = Callable[[str], Float[Tensor, " d"]]
"""Reads a norm's tensor from the checkpoint, in float64: the only values that a plan looks at."""


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What is folded into what."""

    layout: Layout
    hooks: Hooks
    stream: StreamFold
    gain: Gain

    def norm_values(self, norm: Norm) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        """Return the gain that a norm applies and its bias, zero where it has none."""
        if norm.weight is None:
            gain = torch.ones(self.layout.hidden, dtype=torch.float64)
        else:
            gain = norm.gain_offset + self.gain(norm.weight)
        return gain, torch.zeros_like(gain) if norm.bias is None else self.gain(norm.bias)

    def computed(self, branch: Branch) -> Computed | None:
        """Return what a branch computes besides."""
        found = self.stream.computed.get(branch.target)
        own = found is not None and branch is computing(self.layout, branch.target)
        return found if own else None

    def slot_remedy(self, site: Site) -> str:
        """Return what to do about a constant from a site that no bias slot takes."""
        if self.layout.family.recasts and site.kind is not SiteKind.LN_FINAL_OUT:
            return (
                'add allow = ["recast"] to [export]: the model is then declared as '
                f"{next(iter(self.layout.family.recasts))}, which has bias slots; exact, but it "
                "rewrites config.json"
            )
        remedy = "use an edit without a constant"
        if site.kind in STREAM_KINDS:
            remedy += ", or serve the offset as a llama.cpp control vector"
            if self.layout.family.widen is not None:
                remedy += (
                    ', or allow = ["widen"], exact but for norms, which do not see the constant '
                    "(docs/relocation.md)"
                )
        return remedy


@dataclass(frozen=True, slots=True, eq=False)
class LayerChange:
    """What becomes of one linear layer.

    y = O ((W + updates) (I x + shift) + b) + added x + addend.
    """

    linear: Linear
    sites: tuple[Site, ...]
    """Those at the layer itself, in forward order."""
    input: AffineMap | None = None
    updates: tuple[WeightUpdate, ...] = ()
    outputs: tuple[PartMap, ...] = ()
    addend: Float[Tensor, " m"] | None = None
    edits: frozenset[int] = frozenset()
    """Those that act at its sites, or whose constant it takes."""
    stream: frozenset[int] = frozenset()
    """Those that act on the stream: the layer takes their linear parts."""
    added: WeightUpdate | None = None
    """What it computes besides."""
    added_by: frozenset[int] = frozenset()
    """The edits that this is for."""

    def needs_bias(self) -> bool:
        """Whether a constant leaves the layer that its bias has to carry."""
        return (
            (self.input is not None and not self.input.is_linear())
            or any(not part.map.is_linear() for part in self.outputs)
            or (self.addend is not None and bool(self.addend.any()))
        )

    def changes_weight(self) -> bool:
        """Whether the weight is another one."""
        maps = [part.map for part in self.outputs]
        if self.input is not None:
            maps.append(self.input)
        more = bool(self.updates) or self.added is not None
        return more or any(not map_.is_translation() for map_ in maps)


@dataclass(frozen=True, slots=True)
class Pieces:
    """What was found of some part of the model."""

    layers: tuple[LayerChange, ...] = ()
    tensors: tuple[TensorUpdate, ...] = ()
    """Of tables and norms."""
    failures: tuple[Failure, ...] = ()
    slotless: bool = False
    """Whether an edit failed for want of a bias slot: a recast may help it."""
    places: tuple[tuple[frozenset[int], str], ...] = ()
    """Edits, and in words where they are folded into."""


def joined(pieces: Iterable[Pieces]) -> Pieces:
    """Return what was found of several parts, in their order."""
    parts = list(pieces)
    return Pieces(
        tuple(layer for part in parts for layer in part.layers),
        tuple(update for part in parts for update in part.tensors),
        tuple(failure for part in parts for failure in part.failures),
        any(part.slotless for part in parts),
        tuple(place for part in parts for place in part.places),
    )


def norm_updates(
    context: Context,
    norm: Norm,
    edits: Iterable[int],
    gain: Float[Tensor, " d"],
    bias: Float[Tensor, " d"],
) -> tuple[TensorUpdate, ...]:
    """Return the updates that give a norm a new gain and bias, where those are not its own."""
    updates = []
    old_gain, old_bias = context.norm_values(norm)
    pairs = [(norm.weight, gain, old_gain, norm.gain_offset), (norm.bias, bias, old_bias, 0.0)]
    for name, new, old, stored in pairs:
        assert name is not None or name is norm.bias or torch.equal(new, old), norm.live
        if name is not None and not torch.equal(new, old):
            shape, own = tuple(new.shape), tuple(sorted(edits))
            updates.append(TensorUpdate(name, name, shape, 0, replacement=new - stored, edits=own))
    return tuple(updates)


def scaled_norm(
    context: Context,
    norm: Norm,
    edits: Iterable[int],
    scale: Float[Tensor, " d"],
    shift: Float[Tensor, " d"],
) -> tuple[TensorUpdate, ...]:
    """Return the updates that make a norm's gain g into s ⊙ g and its bias β into s ⊙ β + t."""
    gain, bias = context.norm_values(norm)
    return norm_updates(context, norm, edits, scale * gain, scale * bias + shift)


def as_diagonal(map_: AffineMap) -> Float[Tensor, " d"] | None:
    """Return the diagonal of a map whose linear part is diagonal, else None."""
    if isinstance(map_, DiagonalMap):
        return map_.scale
    if isinstance(map_, LowRankMap) and map_.is_translation():
        return torch.ones_like(map_.bias)
    return None
