"""Round float64 results to the storage dtype, once, and refuse what the dtype cannot hold.

``to_storage`` rounds every value to its nearest neighbour. ``feedback`` then moves a few values to
the neighbour on their other side, so that what the directions of an edit see of the rounding errors
cancels: a component that the edit removed stays removed, where rounding to nearest alone leaves
half a per cent of it in bfloat16.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bake.errors import InputError

Rounding = Literal["nearest", "feedback"]

_BLOCK = 1 << 22  # values that are corrected at a time: columns are independent of one another
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
        chosen = corrections(values.T, (nearest.T, other.T), directions).T
    else:
        chosen = corrections(values, (nearest, other), directions)
    return torch.where(chosen == 1, other, nearest)


def corrections(
    exact: Float[Tensor, "m n"],
    choices: Sequence[Float[Tensor, "m n"]],
    directions: Float[Tensor, "k m"],
) -> Int[Tensor, "m n"]:
    """Return which choice to take for every value, so that the directions see the errors cancel.

    All begin with the first choice, the nearest. The walk goes down the rows, those with the
    largest weight in the directions first, and takes another choice where that makes the
    accumulated error of the column smaller: large weights cancel most of it, small ones what is
    left. Choices that are equal leave a value where it is.
    """
    chosen = torch.zeros(exact.shape, dtype=torch.int8)
    if directions.shape[0] == 0 or exact.numel() == 0:
        return chosen
    basis = torch.linalg.qr(directions.to(torch.float64).T)[0].T
    width = max(1, _BLOCK // exact.shape[0])
    for start in range(0, exact.shape[1], width):
        columns = slice(start, start + width)
        errors = [c[:, columns].to(torch.float64) - exact[:, columns] for c in choices]
        chosen[:, columns] = _walk(errors, basis)
    return chosen


def _walk(errors: Sequence[Tensor], basis: Tensor) -> Tensor:
    """Return the index of a choice per entry; ``errors`` [m, n] are what the choices err by."""
    chosen = torch.zeros(errors[0].shape, dtype=torch.int8)
    current = errors[0].clone()
    seen = basis @ current
    weight = basis.square().sum(dim=0)
    order = [int(i) for i in torch.argsort(weight, descending=True) if weight[i] > 0]
    # A second walk settles the columns whose large weights happened to be of no use in the first.
    for _ in range(_WALKS):
        for i in order:
            row, best = basis[:, i], torch.zeros_like(seen[0])
            toward = 2 * (row @ seen)
            step, index = torch.zeros_like(best), chosen[i]
            for number, error in enumerate(errors):
                move = error[i] - current[i]
                change = move * (toward + weight[i] * move)  # of the squared length of ``seen``
                gains = change < best
                best = torch.where(gains, change, best)
                step = torch.where(gains, move, step)
                index = torch.where(gains, torch.tensor(number, dtype=torch.int8), index)
            seen += torch.outer(row, step)
            current[i] += step
            chosen[i] = index
    return chosen


def _other_neighbour(values: Tensor, nearest: Tensor) -> Tensor:
    """Return the neighbour on the other side of each value; itself where the value is exact.

    A value at the end of the range stays, since its neighbour is infinite.
    """
    error = values - nearest.to(torch.float64)
    infinity = torch.full_like(nearest, torch.inf)
    neighbour = torch.nextafter(nearest, torch.where(error > 0, infinity, -infinity))
    return torch.where((error == 0) | ~torch.isfinite(neighbour), nearest, neighbour)
