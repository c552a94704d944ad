"""The readers of the stream: what stands between it and them, and their own outputs."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap, DiagonalMap, LowRankMap, chain
from bake.edits import WeightUpdate
from bake.families import Layout, Linear, Norm, Part
from bake.plan.lowrank import thin, thin_factors
from bake.plan.pieces import (
    Context,
    LayerChange,
    Pieces,
    as_diagonal,
    joined,
    norm_updates,
    scaled_norm,
)
from bake.plan.quotient import SIGHT, Computed, gated_outputs
from bake.plan.stream_fold import Fold
from bake.plan.types import PartMap
from bake.sites import Site

LEAST_GAIN = 2.0**-16
"""Of the largest gain of a norm, the least that a reader may be divided by: float16 has no room for
more. Trained models have single channels of 2⁻¹⁵."""
LEAST_COMPUTED = 2.0**-10
"""The same where neurons read through the norm, whose largest scale is 2¹⁴."""


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
    gain: Tensor | None = None
    """What the norm multiplies by then; None where there is none."""


def fold_readers(context: Context) -> Pieces:
    """Fold norm outputs, frames and the readers' own outputs; the head reads the final norm's."""
    layout = context.layout
    readings: dict[tuple[int, str | None], _Reading] = {}
    pieces: list[Pieces] = []
    for branch in layout.branches:
        key = branch.source, None if branch.norm_in is None else branch.norm_in.live
        fold, computed = context.stream.folds[branch.source], context.computed(branch)
        if key not in readings:
            readings[key] = _reading(context, branch.norm_in, fold, computed)
            pieces.append(readings[key].norm)
        pieces += [_reader(context, linear, readings[key], computed) for linear in branch.reads]
    last = _reading(context, layout.final_norm, context.stream.folds[-1])
    return joined([*pieces, last.norm, _reader(context, layout.unembed, last)])


def _reading(
    context: Context, norm: Norm | None, fold: Fold, computed: Computed | None = None
) -> _Reading:
    """Fold what stands between the stream and its readers: turn, gain, bias, norm hook."""
    frame, turned_by = fold.seen, fold.turned_by | fold.cleared_by
    if norm is None:
        return _Reading(None if frame.is_translation() else thin(frame), stream=turned_by)
    map_, edits = context.hooks.map_at(norm.site), context.hooks.edits_at(norm.site)
    diagonal = as_diagonal(map_)
    if computed is not None:
        return _computing(context, norm, fold, computed)
    if not frame.is_translation():
        gain, bias = context.norm_values(norm)
        # A rotation keeps the plan that artifacts of earlier versions name by its digest.
        if context.stream.is_relocated() and _is_even(frame, gain):
            # Behind the map the bias has to be what it was, where a norm has one.
            behind = gain * fold.inverse.linear(bias / gain)
            own = Pieces(tensors=norm_updates(context, norm, turned_by, gain, behind))
            passed = chain([_behind(frame, gain), map_], map_.width)
            return _Reading(thin(passed), (norm.site,), turned_by, own)
        seen = chain([frame, DiagonalMap(gain, bias), map_], context.layout.hidden)
        ones, zeros = torch.ones_like(gain), torch.zeros_like(bias)
        plain = norm_updates(context, norm, turned_by, ones, zeros)
        return _Reading(thin(seen), (norm.site,), turned_by, Pieces(tensors=plain))
    into = norm.weight is not None and (map_.is_linear() or norm.bias is not None)
    if map_.is_identity():
        return _Reading()
    if diagonal is None or not into:
        places = ((edits, f"readers of {norm.live}"),)
        return _Reading(thin(map_), (norm.site,), norm=Pieces(places=places))
    updates = scaled_norm(context, norm, edits, diagonal, map_.bias)
    places = ((edits, f"gain and bias of {norm.live}"),)
    return _Reading(norm=Pieces(tensors=updates, places=places))


def _computing(context: Context, norm: Norm, fold: Fold, computed: Computed) -> _Reading:
    """Return what readers see that compute an edit besides, behind a norm without a hook."""
    gain, bias = context.norm_values(norm)
    by = fold.turned_by | fold.cleared_by
    # The neurons alone see the dimension that the embedding sets.
    sight = torch.where(computed.one != 0, SIGHT, 1.0)
    if _is_even(fold.seen, gain, LEAST_COMPUTED):
        own = gain * sight
        seen: AffineMap = _behind(fold.seen, own)
    else:
        own = sight
        seen = chain([DiagonalMap(1 / own, bias), fold.seen, DiagonalMap(gain, bias)], len(gain))
    norms = norm_updates(context, norm, by | computed.edits, own, bias)
    map_ = None if seen.is_translation() else thin(seen)
    return _Reading(map_, stream=by, norm=Pieces(tensors=norms), gain=own)


def _is_even(frame: AffineMap, gain: Float[Tensor, " d"], least: float = LEAST_GAIN) -> bool:
    """Whether a frame is thin, and no gain too small for readers to be divided by."""
    rank, sizes = thin_factors(frame)[0].shape[1], gain.abs()
    return 4 * rank <= frame.width and float(sizes.min()) >= least * float(sizes.max())


def _behind(frame: AffineMap, gain: Float[Tensor, " d"]) -> LowRankMap:
    """Return D T D⁻¹, what a thin frame T is behind a gain D.

    The norm then keeps its gain, and what its readers change by stays thin.
    """
    left, right = thin_factors(frame)
    return LowRankMap(left * gain.unsqueeze(1), right / gain, torch.zeros_like(gain))


def _reader(
    context: Context, linear: Linear, reading: _Reading, computed: Computed | None = None
) -> Pieces:
    """Fold what a layer reads into its input, and the hooks at its outputs into its rows."""
    hooks, parts = context.hooks, []
    updates: list[WeightUpdate] = []
    places = []
    sites = (*reading.sites, *(part.site for part in linear.parts))
    edits = hooks.edits_at(*sites)
    for part in linear.parts if edits else ():  # of a mixture's thousands most have none
        map_ = hooks.map_at(part.site)
        if not map_.is_identity():
            parts.append(PartMap(None if linear.is_one_site() else part.rows, map_))
        updates += _part_updates(context, linear, part)
        at = f"outputs of {linear.weight.removesuffix('.weight')}"
        places.append((hooks.edits_at(part.site), at))
    added, added_by = None, frozenset[int]()
    if computed is not None:
        assert reading.gain is not None
        added = _neurons(context.layout, linear, computed, reading.gain)
        added_by = computed.edits if added is not None else added_by
    layer = LayerChange(
        linear,
        sites,
        reading.map,
        tuple(updates),
        tuple(parts),
        None,
        edits,
        reading.stream,
        added,
        added_by,
    )
    return Pieces((layer,), places=tuple(places))


def _neurons(
    layout: Layout, linear: Linear, computed: Computed, gain: Float[Tensor, " d"]
) -> WeightUpdate | None:
    """Return what a gated layer's reader is given to compute besides; a router is given nothing."""
    outputs, parts = linear.outputs, gated_outputs(layout, linear)
    found = [computed.read(kind, outputs, gain, end) for kind, end in parts]
    if not found:
        return None
    left, right = torch.cat([one.left for one in found], dim=1), [one.right for one in found]
    return WeightUpdate(left, torch.cat(right))


def _part_updates(context: Context, linear: Linear, part: Part) -> list[WeightUpdate]:
    """Return the weight updates at one part of a layer's output, as ones of the whole output."""
    found = context.hooks.updates_at(part.site)
    if not found:
        return []
    index, width = torch.tensor(part.rows), linear.outputs
    return [
        WeightUpdate(
            update.left.new_zeros(width, update.left.shape[1]).index_copy(0, index, update.left),
            update.right,
        )
        for update in found
    ]
