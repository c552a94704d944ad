"""``Deviation``: how far one stored tensor lies from the planned one, in steps of its type.

Rounding to nearest errs by a number between −½ and ½ step, uniform and independent of the others.
So three things are known of every honest rounding, whatever the tensor: no value is off by more
than the type's reach, the mean square is a twelfth of the squared step, and along a direction r the
errors add up as Σ rᵢ² step² / 12. Rounding that favours a direction errs less along it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bake.verify.stored.files import Directions, Rows, StoredFiles
from bake.verify.tolerance import fold_tolerance

NOISE = 2.0
"""The most that the root mean square of the errors may be of that of rounding to nearest. Rounding
that moves some values to their other neighbour, to keep a direction, adds up to a half of it."""
DIRECTION = 3.0
"""The same of the errors' component along a direction. Over the columns of a matrix it is a sum of
sixteen squares or more, whose root is above three times its mean once in 10²⁰ matrices."""
COLUMNS = 16
"""Columns from which on the component along a direction is judged."""
_STRIP = 1 << 15  # values that are compared at a time: all that is made of them stays in a cache


@dataclass(frozen=True, slots=True)
class Deviation:
    """What came of comparing one tensor."""

    name: str
    values: int
    outside: int
    """Values that are off by more than the type's reach."""
    noise: float
    """Root mean square of the errors, over that of rounding to nearest."""
    direction: float
    """The same of the component along the edited directions; 0 where there is none."""

    @property
    def score(self) -> float:
        """The largest of the three over its limit, plus one for every value outside."""
        return max(self.noise / NOISE, self.direction / DIRECTION) + self.outside

    @property
    def held(self) -> bool:
        """Whether the files hold the planned tensor."""
        return self.within(1)

    def within(self, times: int) -> bool:
        """Whether no value is outside, and the sums are within so many times their limits."""
        quiet = self.noise <= times * NOISE and self.direction <= times * DIRECTION
        return self.outside == 0 and quiet


Spoil = Callable[[int, int, Rows], Rows]
"""Returns other values for the stored rows between two indices."""


def deviation(
    files: StoredFiles, name: str, spoil: Spoil | None = None, *, times: int = 1
) -> Deviation:
    """Compare one stored tensor with the planned one.

    A spoiled one is told by the first values outside, and is compared no further.

    Args:
        files: that hold it.
        name: one of ``files.planned``.
        spoil: what a mistake makes of the stored values; None for the values as they are.
        times: of the type's reach, what a value may be off by.
    """
    found = files.directions(name) if files.unbiased else None
    total = _Sums(found)
    reach = times * files.reach(name)
    for start, stop, exact in files.planned[name].spans():
        # The same sum in another order, on another processor, rounds otherwise in float64.
        slack = times * fold_tolerance(max(exact.shape), _largest(exact))
        broken = None if spoil is None else spoil(start, stop, files.rows(name, start, stop))
        for rows in _strips(exact):
            part, first = exact[rows], start + rows.start
            span = first, first + part.shape[0]
            have = files.rows(name, *span) if broken is None else broken[rows]
            total.add(have - part, files.steps(name, *span, part), reach, slack, first)
            if spoil is not None and total.outside:
                return total.deviation(name)
    return total.deviation(name)


def _largest(values: Tensor) -> float:
    """Return the largest absolute value, in one pass that makes no other tensor."""
    if not values.numel():
        return 0.0
    least, most = values.aminmax()
    return max(-float(least), float(most))


def _strips(values: Tensor) -> Iterator[slice]:
    """Yield the rows of a matrix in stretches that stay in the processor's cache."""
    height = max(1, _STRIP // max(1, values.shape[1]))
    for start in range(0, values.shape[0], height):
        yield slice(start, start + height)


class _Sums:
    """Squares of errors and of what they may be, summed while the tiles pass."""

    def __init__(self, directions: Directions | None) -> None:
        self.directions = directions
        self.values = self.outside = self.columns = 0
        self.errors = self.expected = self.along_expected = self.along = 0.0
        self.across: Tensor | None = None

    def add(self, error: Rows, steps: Rows, reach: float, slack: float, start: int) -> None:
        """Add some rows; ``slack`` is what may be off beside the steps that ``reach`` counts."""
        count, error = error.numel(), error.contiguous()
        self.values += count
        within = error.abs().le_((steps * reach).add_(slack))  # not so where one is no number
        self.outside += count - int(torch.count_nonzero(within))
        square = steps.square()
        self.errors += float(error.flatten().dot(error.flatten()))
        self.expected += float(square.sum()) / 12 + count * slack * slack
        if self.directions is not None and error.shape[1] > 1:
            self._along(error, square.div_(12).add_(slack * slack), start)

    def _along(self, error: Rows, square: Rows, start: int) -> None:
        assert self.directions is not None
        basis = self.directions.basis
        if self.directions.axis == 1:
            self.columns += error.shape[0]
            self.along += float((error @ basis.T).square().sum())
            self.along_expected += float((square @ basis.square().T).sum())
            return
        # Of a stack of matrices the tiles are of one each, and the directions those of every one:
        # what one of them is off by is not made up for by another.
        first = start % basis.shape[1]
        if first == 0:
            self._close()
        part = basis[:, first : first + error.shape[0]]
        self.columns += error.shape[1] if first == 0 else 0
        found = part @ error
        self.across = found if self.across is None else self.across.add_(found)
        self.along_expected += float((part.square() @ square).sum())

    def _close(self) -> None:
        """Count what the matrix that has passed is off by along the directions."""
        if self.across is not None:
            self.along += float(self.across.square().sum())
            self.across = None

    def deviation(self, name: str) -> Deviation:
        self._close()
        judged = self.columns >= COLUMNS
        return Deviation(
            name,
            self.values,
            self.outside,
            _ratio(self.errors, self.expected),
            _ratio(self.along, self.along_expected) if judged else 0.0,
        )


def _ratio(found: float, expected: float) -> float:
    if math.isnan(found):
        return math.inf
    return math.sqrt(found / expected) if expected else math.inf if found else 0.0


def float_steps(exact: Rows, dtype: torch.dtype) -> Rows:
    """Return the distance between neighbours of a floating-point type at every value."""
    info, (bits, exponent) = torch.finfo(dtype), _EXPONENT[exact.dtype]
    # A number without its sign and mantissa is the power of two at or below it.
    size = exact.abs().clamp_(min=info.smallest_normal)
    return size.view(bits).bitwise_and_(exponent).view(exact.dtype).mul_(info.eps)


_EXPONENT = {
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
}
"""Of numbers in IEEE 754: integers of their size, and the bits of the exponent."""
