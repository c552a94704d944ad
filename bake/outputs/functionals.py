"""What an edit makes vanish from a weight, and along which directions its rounding is fed back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import LowRankMap, tolerance
from bake.fold import WeightFold
from bake.rounding import Feedback, Rounding

_MAX_DIRECTIONS = 64  # more of them are no longer "a few", and feedback would find no freedom


@dataclass(frozen=True, slots=True, eq=False)
class Functionals:
    """Rows over one axis of a matrix: what an edit removes, or what it reads."""

    axis: int
    rows: Float[Tensor, "k width"]


def removed(fold: WeightFold) -> tuple[Functionals, ...]:
    """Return what the fold's maps make vanish, along each axis where there is such a thing.

    A projection at the output has rows F with F W' = 0, one at the input columns N with W' N = 0.
    Nothing vanishes where something is added to what they leave.
    """
    found: list[Functionals] = []
    if fold.added is not None:
        return ()
    size = fold.shape[fold.output_axis]
    across = [
        _scattered(map_.left_null(), rows, size)
        for rows, map_ in fold.outputs
        if isinstance(map_, LowRankMap)
    ]
    if across and sum(rows.shape[0] for rows in across):
        found.append(Functionals(fold.output_axis, torch.cat(across)))
    if isinstance(fold.input, LowRankMap):
        null = fold.input.transpose().left_null()
        if null.shape[0]:
            found.append(Functionals(1 - fold.output_axis, null))
    return tuple(found)


def guarded(fold: WeightFold) -> Functionals | None:
    """Return the directions that error feedback protects: those that the edit reads or writes.

    For W' = (I + L R) W they span R, without which a projection would not remove what it should,
    and Lᵀ, along which the weight changes. Feedback runs along one axis; the output's comes first.
    None where there are no directions, or too many, or a map that is not thin.
    """
    size = fold.shape[fold.output_axis]
    rows = [update.left.T for update in fold.updates]
    for indices, map_ in fold.outputs:
        if not isinstance(map_, LowRankMap):
            return None
        left, right = map_.delta_factors()
        rows += [_scattered(part, indices, size) for part in (right, left.T)]
    axis, spanned = fold.output_axis, _basis(rows)
    if spanned is None:
        if not isinstance(fold.input, LowRankMap):
            return None
        left, right = fold.input.delta_factors()
        axis, spanned = 1 - fold.output_axis, _basis([left.T, right])
    if spanned is None or spanned.shape[0] > _MAX_DIRECTIONS:
        return None
    return Functionals(axis, spanned)


def feedback_of(fold: WeightFold, rounding: Rounding) -> Feedback | None:
    """Return the feedback of one matrix's rounding; None to nearest."""
    guard = guarded(fold) if rounding == "feedback" else None
    return None if guard is None else Feedback(guard.rows, guard.axis)


def _basis(rows: Sequence[Tensor]) -> Tensor | None:
    """Return orthonormal rows that span the same space, or None where that is empty."""
    whole = torch.cat(list(rows)) if rows else torch.empty(0, 0)
    if whole.numel() == 0:
        return None
    q, singular, _ = torch.linalg.svd(whole.T, full_matrices=False)
    kept = q[:, singular > tolerance(whole.shape[1]) * float(singular.max())]
    return kept.T if kept.shape[1] else None


def _scattered(rows: Tensor, indices: Sequence[int] | None, size: int) -> Tensor:
    """Return functionals of a part of the axis as functionals of the whole axis."""
    if indices is None:
        return rows
    return rows.new_zeros(rows.shape[0], size).index_copy(1, torch.tensor(indices), rows)
