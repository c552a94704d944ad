"""Other values under the scales that are there: a weight that is edited keeps its format.

Every value becomes one of its two neighbours among the levels of its block: the nearer, or where
error feedback says so the other. A block keeps its scale as long as its levels reach its values,
for which half a step beyond their ends is near enough; otherwise it gets the least scale that the
format holds and that does. So no value is off by more than a step, and what an edit does not reach
keeps its bytes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock

import torch
from jaxtyping import Float64, Int16, UInt8
from torch import Tensor

from bake.checkpoints.quantised.coded import Coded, ScaleTable
from bake.errors import InputError
from bake.rounding import Feedback, Moves, Where

Tiles = Callable[[], Iterator[Float64[Tensor, "rows columns"]]]
"""Yields consecutive rows of a weight, in float64."""
_REACH = 2.0**-20  # of a step: what a quotient in float64 and a sum of two may be off by


@dataclass(frozen=True, eq=False)
class Recoded:
    """A weight with other values, in its format.

    Attributes:
        coded: the weight as it is.
        exact: its values as they are meant.
    """

    coded: Coded
    exact: Tiles
    turn: Lock = field(default_factory=Lock, repr=False)

    @property
    def table(self) -> ScaleTable:
        """The scales: those that are there, and greater ones for blocks that outgrow theirs.

        Raises:
            InputError: no scale of the format is large enough.
        """
        with self.turn:  # codes and scales may be written by two threads
            return self._table

    @cached_property
    def _table(self) -> ScaleTable:
        old, coded, start = self.coded.scales.read(), self.coded, 0
        need = torch.zeros_like(old.scale)
        for tile in self.exact():
            old.largest(need, self._needed(tile, old, start), start)
            start += tile.shape[0]
        grown = need > old.scale.abs() * (1 + _REACH)
        if not bool(grown.any()):
            return old
        held = coded.scales.hold(need)
        scale = torch.where(grown, torch.where(old.scale < 0, -held, held), old.scale)
        if not math.isfinite(float(scale.sum())):
            raise InputError(
                f"the edited tensor {coded.name} does not fit {coded.format}: a block needs a "
                f"scale of {float(need.max()):.3g}",
                why="the format has none so large",
                fix="lower the strength or the coefficient, or write it with --dequantize",
            )
        return ScaleTable(scale, old.rows, old.columns, old.zero)

    def _needed(self, tile: Tensor, old: ScaleTable, start: int) -> Tensor:
        """Return the least size of a scale under which the levels reach every value of a tile.

        A scale keeps its sign: quantisers turn some blocks so that the end with one level more is
        on the side of the largest value. Infinite where no scale does: all levels are on the other
        side of their zero.
        """
        tile = torch.where(old.at(old.scale, start, start + tile.shape[0]) < 0, -tile, tile)
        zero: Tensor | float = 0.0
        if old.zero is not None:
            zero = old.at(old.zero, start, start + tile.shape[0])
        end = torch.where(
            tile > 0,
            (self.coded.levels.high - zero + torch.zeros_like(tile)).clamp_(min=0),
            (self.coded.levels.low - zero + torch.zeros_like(tile)).clamp_(max=0),
        )
        return torch.where(tile == 0, 0.0, tile / end)

    def codes(
        self,
        feedback: Callable[[int], Feedback | None] = lambda start: None,
        measured: Callable[[int, Tensor, Tensor], None] = lambda start, exact, errors: None,
    ) -> Iterator[UInt8[Tensor, "rows columns"]]:
        """Yield the codes, tile by tile.

        Args:
            feedback: given the first row of a tile, returns what rounds it; None for to nearest.
            measured: told of every tile: its first row, what was meant, and what it is off by.
        """
        start, table = 0, self.table
        for tile in self.exact():
            rounded = _Rounded(self.coded, table, tile, start)
            if (settles := feedback(start)) is not None:
                settles.settle(rounded.errors, rounded.along(settles.axis))
            measured(start, tile, rounded.errors)
            yield rounded.codes()
            start += tile.shape[0]

    def stored_scales(self) -> dict[str, Tensor]:
        """Return the tensors that hold the scales, whole."""
        return dict(self.coded.scales.stored(self.table.scale))


class _Rounded:
    """Some rows, each value at the place of its nearest level."""

    def __init__(self, coded: Coded, table: ScaleTable, exact: Tensor, start: int) -> None:
        stop = start + exact.shape[0]
        self.levels, self.exact = coded.levels, exact
        self.old = coded.codes.read(start, stop)
        self.scale = table.at(table.scale, start, stop)
        self.zero = None if table.zero is None else table.at(table.zero, start, stop)
        ideal = exact / self.scale
        if self.zero is not None:
            ideal += self.zero
        # Where the scale is 0 all levels are one value, and the one that is there stays.
        flat = self.scale == 0
        self.place = self.levels.nearest(ideal)
        self.place = torch.where(flat, self.levels.placed(self.old), self.place)
        self.errors = self.values(self.place, ...) - exact

    def values(self, place: Int16[Tensor, "..."], where: Where | object) -> Tensor:
        """Return the values of some places."""
        levels = self.levels.values[place.to(torch.int64)]
        if self.zero is not None:
            levels = levels - self.zero[where]  # type: ignore[index]
        return levels * self.scale[where]  # type: ignore[index]

    def along(self, axis: int) -> "_Neighbours":
        """Return them with the axis that feedback runs along first."""
        return _Neighbours(self, axis)

    def codes(self) -> UInt8[Tensor, "rows columns"]:
        """Return the codes: the one that is there wherever it stands for the value."""
        same = self.levels.placed(self.old) == self.place
        return torch.where(same, self.old, self.levels.code[self.place.to(torch.int64)])


class _Neighbours:
    """Each value may go to the level on the other side of the exact one."""

    def __init__(self, rounded: _Rounded, axis: int) -> None:
        tables = (rounded.place, rounded.errors, rounded.scale)
        self.place, self.errors, self.scale = tables if axis == 0 else [t.T for t in tables]
        self.levels = rounded.levels.values

    def moves(self, where: Where) -> Moves:
        """Return what some values may do."""
        near, errors = self.place[where].to(torch.int64), self.errors[where]
        way = (errors.sign() * self.scale[where].sign()).to(torch.int64)
        other = (near - way).clamp_(0, self.levels.shape[0] - 1)
        unit = ((self.levels[other] - self.levels[near]) * self.scale[where]).contiguous()
        return Moves(unit, torch.zeros_like(unit), torch.ones_like(unit))

    def move(self, where: Where, counts: Tensor) -> None:
        """Move them; the errors are those behind the move, of what moved on its other side."""
        way = self.errors[where].sign() * self.scale[where].sign()
        self.place[where] += (counts * way).to(torch.int16)
