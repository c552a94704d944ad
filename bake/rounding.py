"""Round float64 results to the storage dtype, once, and refuse what the dtype cannot hold.

``to_storage`` rounds every value to its nearest neighbour. ``Feedback`` then moves a few values by
a step, so that what the directions of an edit see of the rounding errors cancels: a component that
the edit removed stays removed, where rounding to nearest alone leaves half a per cent of it in
bfloat16.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bake.errors import InputError

Rounding = Literal["nearest", "feedback"]

_LADDER = 24  # rungs for what is left, two or three for every halving of the weight
_MARGIN = 8  # lines beside those that would just do
_PASSES = 4
_ENOUGH = 2.0**-14  # steps that are seen on average: a thousandth of what nearest leaves and less

Where = tuple[Int[Tensor, " lines"] | Int[Tensor, "lines 1"], Int[Tensor, " n"] | slice]
"""An index of some lines by some, or all, of the others."""


def to_storage(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return the values rounded to nearest in ``dtype``.

    Raises:
        InputError: a value is not finite, or overflows the dtype (65504 in float16).
    """
    rounded = values.to(dtype)
    # One pass that makes no other tensor; both ends of a tensor with a NaN are NaN.
    if rounded.numel() and not all(end.isfinite() for end in rounded.aminmax()):
        largest = float(values.abs().max())
        raise InputError(
            f"the edited tensor {name} does not fit its dtype: |value| up to {largest:.3g}",
            why=f"{str(dtype).removeprefix('torch.')} holds at most {torch.finfo(dtype).max:.3g}, "
            "or the base tensor holds values that are not finite",
            fix="lower the strength or the coefficient, or use a checkpoint in another dtype",
        )
    return rounded


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """What some values may be moved by: a whole number of units each."""

    unit: Float[Tensor, "lines n"]
    """May be negative, and 0 where a value has nowhere to go."""
    low: Float[Tensor, "lines n"]
    high: Float[Tensor, "lines n"]


class Rounded(Protocol):
    """A tile that was rounded to nearest, seen with the directions' axis first."""

    def moves(self, where: Where) -> Moves:
        """Return what some values may do."""

    def move(self, where: Where, counts: Float[Tensor, "lines n"]) -> None:
        """Move them by so many units."""


class Feedback:
    """Error feedback along some directions, over a matrix that comes in tiles of rows.

    Along the rows (axis 0) every tile cancels what the directions have seen of the errors so far,
    roughly, and carries the rest on to the next; the last ones cancel what they can. Along the
    columns (axis 1) every row is a matter of its own. Nothing is held but what was seen.

    Only a few lines are looked at: those of the largest weight in the directions, which cancel most
    of what there is with the fewest moves, and a ladder of ever smaller weights for what is left.
    What ends worst is walked again, each time along twice as many rungs.
    """

    def __init__(self, directions: Float[Tensor, "k length"], axis: int) -> None:
        """Begin with the first tile.

        Args:
            directions: rows over the ``axis`` of the matrix; they need not be orthonormal.
            axis: the axis of the matrix that they run along.
        """
        self.axis = axis
        self._basis = torch.linalg.qr(directions.to(torch.float64).T)[0].T
        (seeing,) = torch.nonzero(self._basis.square().sum(dim=0), as_tuple=True)
        self._end = 1 + int(seeing[-1]) if seeing.numel() else 0
        self._carried: Tensor | None = None
        self._start = 0

    def settle(self, errors: Float[Tensor, "rows columns"], rounded: Rounded) -> None:
        """Move some values of the next tile.

        Args:
            errors: the tile as it is rounded, less the exact one, in float64; what moves is added
                to it.
            rounded: the tile.
        """
        along = errors if self.axis == 0 else errors.T
        start, height = (self._start if self.axis == 0 else 0), along.shape[0]
        basis = self._basis[:, start : start + height]
        seen = basis @ along
        if self._carried is not None:
            seen += self._carried
        # The last tile may be too small to cancel finely, so the one before it does as well.
        fine = self.axis == 1 or start + 2 * height >= self._end
        order, columns, bulk = _heaviest(basis), None, 0
        for number in range(_PASSES if fine else 1):
            part = seen if columns is None else seen[:, columns]
            if not order.numel() or not part.numel():
                break
            step = 4 * float(along[order[:_MARGIN]].abs().mean())
            bulk = _bulk(basis[:, order[bulk:]], part, step) + bulk
            lines = order[_taken(basis[:, order], bulk, _LADDER << number if fine else 0)]
            where = (lines, slice(None)) if columns is None else (lines[:, None], columns)
            may = rounded.moves(where)
            counts = _walk(part, basis[:, lines], may)
            along[where] += counts * may.unit
            rounded.move(where, counts)
            if columns is not None:
                seen[:, columns] = part
            size = seen.square().sum(dim=0)
            if float(size.mean()) <= (_ENOUGH * step) ** 2:
                break
            (columns,) = torch.nonzero(size > size.mean(), as_tuple=True)
        if self.axis == 0:
            self._carried, self._start = seen, start + height

    def to_storage(
        self, values: Float[Tensor, "rows columns"], dtype: torch.dtype, name: str
    ) -> Tensor:
        """Return the next tile in ``dtype``, each value as one of its two neighbours.

        Raises:
            InputError: as the function of this name.
        """
        rounded = to_storage(values, dtype, name)
        errors = rounded.to(torch.float64) - values
        views = (rounded, errors) if self.axis == 0 else (rounded.T, errors.T)
        self.settle(errors, _Floats(*views))
        return rounded


class _Floats:
    """Values of a floating-point type, each of which may go to the neighbour on its other side."""

    def __init__(self, rounded: Tensor, errors: Tensor) -> None:
        self.rounded, self.errors = rounded, errors

    def moves(self, where: Where) -> Moves:
        near = self.rounded[where]
        unit = _other_neighbour(near, self.errors[where]).to(torch.float64) - near.to(torch.float64)
        return Moves(unit, torch.zeros_like(unit), torch.ones_like(unit))

    def move(self, where: Where, counts: Tensor) -> None:
        near = self.rounded[where]
        # The errors are those behind the move: of what moved, the exact value lies on the old side.
        ahead = torch.where(self.errors[where] > 0, torch.inf, -torch.inf).to(near.dtype)
        self.rounded[where] = torch.where(counts == 1, torch.nextafter(near, ahead), near)


def _heaviest(basis: Float[Tensor, "k m"]) -> Int[Tensor, " lines"]:
    """Return the lines that the directions see, in the order of their weight."""
    weights = basis.square().sum(dim=0)
    return torch.argsort(weights, descending=True)[: int((weights > 0).sum())]


def _bulk(basis: Float[Tensor, "k lines"], seen: Float[Tensor, "k n"], step: float) -> int:
    """Return how many of the heaviest lines outweigh three times what is seen on average.

    Three times, since half of the steps would go the wrong way. A step is taken to be four times
    the mean error, which it is for errors to nearest, and more where an edit is small beside the
    steps.
    """
    count = basis.shape[0]
    reach = basis.square().sum(dim=0).sqrt().cumsum(dim=0) * step
    need = 3 * count * float(seen.square().sum(dim=0).mean().sqrt())
    return int(torch.searchsorted(reach, need)) + count * _MARGIN


def _taken(basis: Float[Tensor, "k lines"], bulk: int, rungs: int) -> Bool[Tensor, " lines"]:
    """Return which lines, in the order of their weight, to walk: the heaviest, and a ladder."""
    count, length = basis.shape
    taken = torch.arange(length) < bulk
    if rungs and bulk < length:
        ladder = basis[:, bulk:].square().sum(dim=0).sqrt()
        first, last = float(ladder[0]), float(ladder[-1])
        ideal = first * (last / first) ** torch.linspace(0, 1, count * rungs, dtype=torch.float64)
        taken[bulk + torch.searchsorted(-ladder, -ideal).clamp(max=ladder.numel() - 1)] = True
    return taken


def _walk(
    seen: Float[Tensor, "k n"], basis: Float[Tensor, "k lines"], may: Moves
) -> Float[Tensor, "lines n"]:
    """Return by how many units every value moves; ``seen`` becomes what is then seen.

    Each line in turn makes the square of what is seen as small as it can.
    """
    counts = -1 / (basis.square().sum(dim=0).unsqueeze(1) * may.unit)
    counts[may.unit == 0] = 0.0
    # In NumPy, which spends a fraction of torch's time on a call for a few hundred values.
    left, tables = seen.numpy(), (basis.T, counts, may.unit, may.low, may.high)
    for row, count, unit, low, high in zip(*(t.numpy() for t in tables), strict=True):
        count *= np.dot(row, left)
        np.rint(count, out=count)
        np.maximum(count, low, out=count)
        np.minimum(count, high, out=count)
        left += row[:, None] * (count * unit)
    return counts


def _other_neighbour(rounded: Tensor, errors: Tensor) -> Tensor:
    """Return the neighbour on the other side of each exact value; itself where that is exact.

    A value at the end of the range stays, since its neighbour is infinite.
    """
    infinity = torch.full_like(rounded, torch.inf)
    neighbour = torch.nextafter(rounded, torch.where(errors < 0, infinity, -infinity))
    return torch.where((errors == 0) | ~torch.isfinite(neighbour), rounded, neighbour)
