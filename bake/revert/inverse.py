"""The inverse of what a plan does to one tensor, and how far an error of its values can spread.

A plan says W' = O (W + U) I. Where O and I are invertible, W = O⁻¹ (W' − O U I) I⁻¹, which is a
fold again. Every stored value of W' is off by its rounding, δ, and so W by |O⁻¹| |δ| |I⁻¹| at most,
entry by entry: the same fold with the magnitudes of the maps.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap, DenseMap, DiagonalMap, LowRankMap
from bake.edits import WeightUpdate
from bake.fold import Rows, WeightFold
from bake.plan import TensorUpdate

Outputs = tuple[tuple[Rows, AffineMap], ...]


def is_singular(map_: AffineMap) -> bool:
    """Tell whether a map makes something of its input disappear."""
    return map_.left_null().shape[0] > 0


def inverse(map_: AffineMap) -> AffineMap:
    """Return x ↦ A⁻¹ (x − b), for a map that is not singular, in the form that the map has."""
    if isinstance(map_, DiagonalMap):
        return DiagonalMap(1 / map_.scale, -map_.bias / map_.scale)
    if isinstance(map_, DenseMap):
        full = torch.linalg.inv(map_.full)
        return DenseMap(full, -(full @ map_.bias))
    assert isinstance(map_, LowRankMap)
    # (I + L R)⁻¹ = I − L (1 + R L)⁻¹ R
    core = torch.eye(map_.left.shape[1], dtype=map_.left.dtype) + map_.right @ map_.left
    found = LowRankMap(-map_.left @ torch.linalg.inv(core), map_.right, torch.zeros_like(map_.bias))
    return found.with_bias(-found.linear(map_.bias))


def magnitude(map_: AffineMap) -> AffineMap:
    """Return a linear map whose every entry is at least the magnitude of this one's."""
    zero = torch.zeros_like(map_.bias)
    if isinstance(map_, DiagonalMap):
        return DiagonalMap(map_.scale.abs(), zero)
    if isinstance(map_, DenseMap):
        return DenseMap(map_.full.abs(), zero)
    assert isinstance(map_, LowRankMap)
    return LowRankMap(map_.left.abs(), map_.right.abs(), zero)


def inverted(parts: Iterable[tuple[Rows, AffineMap]]) -> Outputs:
    """Return the inverses of maps on disjoint rows."""
    return tuple((rows, inverse(map_)) for rows, map_ in parts)


def magnitudes(parts: Iterable[tuple[Rows, AffineMap]]) -> Outputs:
    """Return the magnitudes of maps on disjoint rows."""
    return tuple((rows, magnitude(map_)) for rows, map_ in parts)


def maps_of(update: TensorUpdate) -> tuple[AffineMap, ...]:
    """Return every map that acts on a weight."""
    maps = [part.map for part in update.outputs]
    return (*maps, *([] if update.input is None else [update.input]))


def inverse_fold(update: TensorUpdate) -> WeightFold:
    """Return the fold that takes the planned weight back to the base's."""
    return WeightFold(
        shape=_two(update),
        output_axis=update.output_axis,
        outputs=inverted((part.rows, part.map) for part in update.outputs),
        updates=tuple(_taken_back(added, update) for added in update.updates),
        input=None if update.input is None else inverse(update.input),
        table=update.is_table,
    )


def spread_fold(update: TensorUpdate) -> WeightFold:
    """Return the fold that takes a bound of the planned weight's errors to one of the base's."""
    back = inverse_fold(update)
    return WeightFold(
        shape=back.shape,
        output_axis=back.output_axis,
        outputs=magnitudes(back.outputs),
        input=None if back.input is None else magnitude(back.input),
        table=back.table,
    )


def applied(parts: Iterable[tuple[Rows, AffineMap]], vector: Float[Tensor, " m"]) -> Tensor:
    """Return a vector with each part's map applied to its rows."""
    for rows, map_ in parts:
        if rows is None:
            vector = map_(vector)
        else:
            index = torch.tensor(rows)
            vector = vector.index_copy(0, index, map_(vector[index]))
    return vector


def _taken_back(added: WeightUpdate, update: TensorUpdate) -> WeightUpdate:
    """Return −O U I: what an update has become in the planned weight, to be subtracted there."""
    left = added.left
    for part in update.outputs:
        if part.rows is None:
            left = part.map.linear(left.T).T
        else:
            index = torch.tensor(part.rows)
            left = left.index_copy(0, index, part.map.linear(left[index].T).T)
    right = added.right if update.input is None else update.input.adjoint(added.right)
    return WeightUpdate(-left, right)


def _two(update: TensorUpdate) -> tuple[int, int]:
    rows, columns = update.shape
    return rows, columns
