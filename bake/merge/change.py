"""What an adapter makes of one parameter: the base's values or others, and sums of factors.

The arithmetic of ``peft/tuners/lora/layer.py`` and ``dora.py``, in float64 and by rows, so that no
parameter is in memory whole: W + s B A, for DoRA scaled to the lengths that were trained.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bake.tiles import spans

ReadRows = Callable[[int, int], Tensor]
"""Returns rows ``start`` to ``stop`` of the base's tensor, in any float type."""


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """A sum of low rank: ``left`` times ``right``, one matrix or one for each row of the parameter.

    Attributes:
        left: [m, r], or [e, m, r] where the parameter stacks matrices.
        right: [r, n] or [e, r, n].
        scale: what the product is multiplied by.
    """

    left: Float[Tensor, "*e m r"]
    right: Float[Tensor, "*e r n"]
    scale: float

    def widened(self) -> "Factors":
        """Return the same in float64, with the scale in ``left``."""
        left = self.left.to(torch.float64) * self.scale
        return Factors(left, self.right.to(torch.float64), 1.0)

    def add_to(self, total: Float[Tensor, "rows ..."], start: int, stop: int) -> None:
        """Add some rows, along axis 0, of factors that are ``widened``."""
        if total.ndim == self.right.ndim == 2:
            total.addmm_(self.left[start:stop], self.right)
            return
        right = self.right if self.right.ndim == 2 else self.right[start:stop]
        total += (self.left[start:stop] @ right).reshape(total.shape)

    def part(self, index: int, start: int, stop: int) -> "Factors":
        """Return what is added to some rows of one of the stacked matrices."""
        return Factors(self.left[index, start:stop], self.right[index], self.scale)

    def equals(self, other: "Factors") -> bool:
        """Whether both add the same, factor for factor."""
        same = torch.equal(self.left, other.left) and torch.equal(self.right, other.right)
        return same and self.scale == other.scale  # of one configuration each, and no sum


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """DoRA's magnitudes: the length that every row, or every column, is scaled to."""

    values: Float[Tensor, " n"]
    by_row: bool


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Single rows that stand in for the base's: ``peft/tuners/trainable_tokens/layer.py``."""

    indices: Int[Tensor, " k"]
    values: Float[Tensor, "k n"]

    def put(self, into: Float[Tensor, "rows n"], start: int, stop: int) -> None:
        """Write those between ``start`` and ``stop`` into these rows of the parameter."""
        inside = (self.indices >= start) & (self.indices < stop)
        into[self.indices[inside] - start] = self.values[inside].to(into.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What becomes of one parameter.

    Attributes:
        whole: stands in for the base's values; None where these stay.
        rows: what some of the rows are, before anything is added; None where none are.
        factors: what is added.
        offset: what is added to a vector; None where nothing is.
        lengths: what the sum is scaled to; None where it is not.
    """

    whole: Float[Tensor, "..."] | None = None
    rows: Rows | None = None
    factors: tuple[Factors, ...] = ()
    offset: Float[Tensor, " n"] | None = None
    lengths: Lengths | None = None

    @property
    def changes(self) -> bool:
        """Whether anything becomes of it."""
        parts = (self.whole, self.offset, self.rows)
        return bool(self.factors) or any(part is not None for part in parts)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of what is put in the place of the base's, or None where a sum has its own."""
        return None if self.whole is None else tuple(self.whole.shape)

    def equals(self, other: "Change") -> bool:
        """Whether both make the same of the same base, number for number."""
        pairs = (
            (self.whole, other.whole),
            (self.offset, other.offset),
            (_values(self.lengths), _values(other.lengths)),
            (_values(self.rows), _values(other.rows)),
            (_indices(self.rows), _indices(other.rows)),
        )
        return (
            all(_equal(one, two) for one, two in pairs)
            and len(self.factors) == len(other.factors)
            and all(one.equals(two) for one, two in zip(self.factors, other.factors, strict=True))
        )

    def same_factors(self, other: "Change") -> bool:
        """Whether the factors of both are the same numbers, whatever these are scaled by."""
        pairs = zip(self.factors, other.factors, strict=False)
        same = all(
            torch.equal(one.left, two.left) and torch.equal(one.right, two.right)
            for one, two in pairs
        )
        return same and len(self.factors) == len(other.factors)

    def part(self, index: int, start: int, stop: int) -> "Change":
        """Return what becomes of some rows of one of the matrices that the parameter stacks."""
        assert self.offset is None and self.lengths is None and self.rows is None
        whole = None if self.whole is None else self.whole[index, start:stop]
        return Change(whole, None, tuple(p.part(index, start, stop) for p in self.factors))

    def tiles(self, read: ReadRows, shape: tuple[int, ...]) -> Iterator[Float[Tensor, "rows ..."]]:
        """Yield the parameter, in float64 and by rows, from the first to the last.

        Args:
            read: the base's rows, which are read twice where columns are scaled.
            shape: of the parameter.
        """
        rows = self.reader(read, shape)
        for start, stop in _spans(shape):
            yield rows(start, stop)

    def reader(self, read: ReadRows, shape: tuple[int, ...]) -> ReadRows:
        """Return what gives any rows of the parameter, in float64."""
        wide = replace(self, factors=tuple(part.widened() for part in self.factors))
        columns = wide._columns(read, shape)

        def rows(start: int, stop: int) -> Float[Tensor, "rows ..."]:
            return wide._scaled(wide._sum(read, start, stop), start, stop, columns)

        return rows

    def _sum(self, read: ReadRows, start: int, stop: int) -> Tensor:
        rows = read(start, stop) if self.whole is None else self.whole[start:stop]
        total = rows.to(torch.float64, copy=True)
        if self.rows is not None:
            self.rows.put(total, start, stop)
        for part in self.factors:
            part.add_to(total, start, stop)
        if self.offset is not None:
            total += self.offset[start:stop].to(torch.float64)
        return total

    def _columns(self, read: ReadRows, shape: tuple[int, ...]) -> Tensor | None:
        """Return what scales the columns: their lengths are known when all rows have passed."""
        if self.lengths is None or self.lengths.by_row:
            return None
        squares = torch.zeros(shape[1], dtype=torch.float64)
        for start, stop in _spans(shape):
            squares += self._sum(read, start, stop).square().sum(0)
        return self.lengths.values.to(torch.float64) / squares.sqrt()

    def _scaled(self, rows: Tensor, start: int, stop: int, columns: Tensor | None) -> Tensor:
        if columns is not None:
            return rows * columns
        if self.lengths is None:
            return rows
        lengths: Tensor = rows.flatten(1).norm(dim=1)
        scale = self.lengths.values[start:stop].to(torch.float64) / lengths
        scaled: Tensor = rows * scale.view(-1, *(1,) * (rows.ndim - 1))
        return scaled


def _spans(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the tiles of a parameter with any number of axes."""
    width = 1
    for size in shape[1:]:
        width *= size
    yield from spans((shape[0] if shape else 1, width))


def _values(part: Lengths | Rows | None) -> Tensor | None:
    return None if part is None else part.values


def _indices(rows: Rows | None) -> Tensor | None:
    return None if rows is None else rows.indices


def _equal(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return torch.equal(one, two)
