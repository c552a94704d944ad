"""The readers of the stream: what stands between it and them, and their own outputs."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap, DiagonalMap, LowRankMap, chain
from bake.edits import WeightUpdate
from bake.families import Linear, Norm, Part
from bake.plan.lowrank import thin_factors
from bake.plan.pieces import (
    Context,
    LayerChange,
    Pieces,
    as_diagonal,
    joined,
    norm_updates,
    scaled_norm,
)
from bake.plan.stream import Fold, thin
from bake.plan.types import PartMap
from bake.sites import Site

LEAST_GAIN = 2.0**-10
"""Of the largest gain of a norm, the least that a reader may be divided by: float16 has no room for
more."""


@dataclass(frozen=True, slots=True, eq=False)
class _Reading:
    """What every reader behind one norm sees of the stream."""

    map: AffineMap | None = None
    """What the readers' inputs take; None where nothing is left to them."""
    sites: tuple[Site, ...] = ()
    """The norm's output, where its hooks are left to the readers."""
    stream: frozenset[int] = frozenset()
    """The edits that turn the stream."""
    norm: Pieces = field(default_factory=Pieces)
    """What becomes of the norm."""


def fold_readers(context: Context) -> Pieces:
    """Fold norm outputs, frames and the readers' own outputs; the head reads the final norm's."""
    layout = context.layout
    readings: dict[tuple[int, str | None], _Reading] = {}
    pieces: list[Pieces] = []
    for branch in layout.branches:
        key = branch.source, None if branch.norm_in is None else branch.norm_in.weight
        if key not in readings:
            readings[key] = _reading(context, branch.norm_in, context.stream.folds[branch.source])
            pieces.append(readings[key].norm)
        pieces += [_reader(context, linear, readings[key]) for linear in branch.reads]
    last = _reading(context, layout.final_norm, context.stream.folds[-1])
    return joined([*pieces, last.norm, _reader(context, layout.unembed, last)])


def _reading(context: Context, norm: Norm | None, fold: Fold) -> _Reading:
    """Fold what stands between the stream and its readers: turn, gain, bias, norm hook."""
    frame, turned_by = fold.seen, fold.turned_by | fold.cleared_by
    if norm is None:
        return _Reading(None if frame.is_translation() else thin(frame), stream=turned_by)
    map_, edits = context.hooks.map_at(norm.site), context.hooks.edits_at(norm.site)
    diagonal = as_diagonal(map_)
    if not frame.is_translation():
        gain, bias = context.norm_values(norm)
        # A rotation keeps the plan that artifacts of earlier versions name by its digest.
        passed = _passed(frame, gain) if context.stream.is_relocated() else None
        if passed is not None:
            # Behind the map the bias has to be what it was, where a norm has one.
            behind = gain * fold.inverse.linear(bias / gain)
            own = Pieces(tensors=norm_updates(context, norm, turned_by, gain, behind))
            return _Reading(thin(chain([passed, map_], map_.width)), (norm.site,), turned_by, own)
        seen = chain([frame, DiagonalMap(gain, bias), map_], context.layout.hidden)
        ones, zeros = torch.ones_like(gain), torch.zeros_like(bias)
        plain = norm_updates(context, norm, turned_by, ones, zeros)
        return _Reading(thin(seen), (norm.site,), turned_by, Pieces(tensors=plain))
    if diagonal is None or not (map_.is_linear() or norm.bias is not None):
        places = ((edits, f"readers of {norm.live}"),)
        return _Reading(thin(map_), (norm.site,), norm=Pieces(places=places))
    if map_.is_identity():
        return _Reading()
    updates = scaled_norm(context, norm, edits, diagonal, map_.bias)
    places = ((edits, f"gain and bias of {norm.live}"),)
    return _Reading(norm=Pieces(tensors=updates, places=places))


def _passed(frame: AffineMap, gain: Float[Tensor, " d"]) -> LowRankMap | None:
    """Return D T D⁻¹, what a thin frame T is behind a gain D, or None where a gain is too small.

    The norm then keeps its gain, and what its readers change by stays thin.
    """
    left, right = thin_factors(frame)
    sizes = gain.abs()
    if 4 * left.shape[1] > frame.width or float(sizes.min()) < LEAST_GAIN * float(sizes.max()):
        return None
    return LowRankMap(left * gain.unsqueeze(1), right / gain, torch.zeros_like(gain))


def _reader(context: Context, linear: Linear, reading: _Reading) -> Pieces:
    """Fold what a layer reads into its input, and the hooks at its outputs into its rows."""
    hooks, parts = context.hooks, []
    updates: list[WeightUpdate] = []
    places = []
    for part in linear.parts:
        map_ = hooks.map_at(part.site)
        if not map_.is_identity():
            parts.append(PartMap(None if linear.is_one_site() else part.rows, map_))
        updates += _part_updates(context, linear, part)
        at = f"outputs of {linear.weight.removesuffix('.weight')}"
        places.append((hooks.edits_at(part.site), at))
    sites = (*reading.sites, *(part.site for part in linear.parts))
    edits = hooks.edits_at(*sites)
    layer = LayerChange(
        linear, sites, reading.map, tuple(updates), tuple(parts), None, edits, reading.stream
    )
    return Pieces((layer,), places=tuple(places))


def _part_updates(context: Context, linear: Linear, part: Part) -> list[WeightUpdate]:
    """Return the weight updates at one part of a layer's output, as ones of the whole output."""
    index, width = torch.tensor(part.rows), linear.shape[linear.output_axis]
    return [
        WeightUpdate(
            update.left.new_zeros(width, update.left.shape[1]).index_copy(0, index, update.left),
            update.right,
        )
        for update in context.hooks.updates_at(part.site)
    ]
