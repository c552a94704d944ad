"""Round float64 results to the storage dtype, once, and refuse what the dtype cannot hold.

``to_storage`` rounds every value to its nearest neighbour. ``feedback`` then moves a few values to
the neighbour on their other side, so that what the directions of an edit see of the rounding errors
cancels: a component that the edit removed stays removed, where rounding to nearest alone leaves
half a per cent of it in bfloat16.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bake.errors import InputError

Rounding = Literal["nearest", "feedback"]

_BLOCK = 1 << 20  # values that are corrected at a time: columns are independent of one another
_WALKS = 2


def to_storage(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return the values rounded to nearest in ``dtype``.

    Raises:
        InputError: a value is not finite, or overflows the dtype (65504 in float16).
    """
    rounded = values.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        largest = float(values.abs().max())
        raise InputError(
            f"the edited tensor {name} does not fit its dtype: |value| up to {largest:.3g}",
            why=f"{str(dtype).removeprefix('torch.')} holds at most {torch.finfo(dtype).max:.3g}, "
            "or the base tensor holds values that are not finite",
            fix="lower the strength or the coefficient, or use a checkpoint in another dtype",
        )
    return rounded


def feedback(
    values: Float[Tensor, "m n"],
    directions: Float[Tensor, "k axis"],
    dtype: torch.dtype,
    name: str,
    *,
    axis: int = 0,
) -> Float[Tensor, "m n"]:
    """Return the values rounded to ``dtype`` with error feedback along some directions.

    Every value becomes one of its two neighbours in ``dtype``. ``directions @ result`` equals
    ``directions @ values`` far more closely than after rounding to nearest (for ``axis`` 1 the same
    of ``result @ directions.T``), at hardly any cost in the error of a single value.

    Args:
        values: the exact matrix, in float64.
        directions: k rows over the ``axis`` of the matrix; they need not be orthonormal.
        dtype: a floating-point storage type.
        name: the tensor's name, for messages.
        axis: the axis that the directions run along.

    Raises:
        InputError: as ``to_storage``.
    """
    nearest = to_storage(values, dtype, name)
    other = _other_neighbour(values, nearest)
    if axis == 1:
        moved = corrections(values.T, nearest.T, other.T, directions).T
    else:
        moved = corrections(values, nearest, other, directions)
    return torch.where(moved, other, nearest)


def corrections(
    exact: Float[Tensor, "m n"],
    nearest: Float[Tensor, "m n"],
    other: Float[Tensor, "m n"],
    directions: Float[Tensor, "k m"],
) -> Bool[Tensor, "m n"]:
    """Return which values to take from ``other``, so that the directions see the errors cancel.

    The walk goes down the rows, those with the largest weight in the directions first, and moves a
    value when that makes the accumulated error of its column smaller: large weights cancel most
    of it, small ones what is left. ``other`` equals ``nearest`` where a value may not move.
    """
    moved = torch.zeros(exact.shape, dtype=torch.bool)
    if directions.shape[0] == 0 or exact.numel() == 0:
        return moved
    basis = torch.linalg.qr(directions.to(torch.float64).T)[0].T
    width = max(1, _BLOCK // exact.shape[0])
    for start in range(0, exact.shape[1], width):
        columns = slice(start, start + width)
        first = nearest[:, columns].to(torch.float64)
        step = other[:, columns].to(torch.float64) - first
        moved[:, columns] = _walk(first - exact[:, columns].to(torch.float64), step, basis)
    return moved


def _walk(error: Tensor, step: Tensor, basis: Tensor) -> Tensor:
    """Return which entries take their step; ``error`` [m, n] is what they err by without it."""
    seen = basis @ error
    weight = basis.square().sum(dim=0)
    order = [int(i) for i in torch.argsort(weight, descending=True) if weight[i] > 0]
    moved = torch.zeros(error.shape, dtype=torch.bool)
    # A second walk settles the columns whose large weights happened to be of no use in the first.
    for _ in range(_WALKS):
        for i in order:
            row = basis[:, i]
            move = torch.where(moved[i], -step[i], step[i])
            gains = move * (2 * (row @ seen) + weight[i] * move) < 0
            seen += torch.outer(row, torch.where(gains, move, 0.0))
            moved[i] ^= gains
    return moved


def _other_neighbour(values: Tensor, nearest: Tensor) -> Tensor:
    """Return the neighbour on the other side of each value; itself where the value is exact.

    A value at the end of the range stays, since its neighbour is infinite.
    """
    error = values - nearest.to(torch.float64)
    infinity = torch.full_like(nearest, torch.inf)
    neighbour = torch.nextafter(nearest, torch.where(error > 0, infinity, -infinity))
    return torch.where((error == 0) | ~torch.isfinite(neighbour), nearest, neighbour)
