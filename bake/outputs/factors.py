"""The factors of a planned weight change, from one pass over the weight: memory of one tile.

See ``bake.plan.lowrank`` for the formula. The weight comes in tiles of rows, as it lies on disk;
what grows with it are the factors alone.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from bake.checkpoints import Checkpoint
from bake.fold import ReadRows
from bake.plan.lowrank import LowRank, Target, low_rank, split_constant
from bake.tiles import spans

Factors = tuple[Tensor, Tensor]
FactorSource = Callable[[Target], Factors]
"""Returns (A, B) of a weight that the plan changes, in float64, at the rank of the change."""


class FactorSum:
    """(A, B) of one weight, summed up while its tiles come by, in order and each once.

    For a layer W' − W = B A, with W as [out, inner] whatever its storage; for a table E of rows
    [tokens, d] it is E' − E = (B A)ᵀ.
    """

    def __init__(self, shape: tuple[int, ...], output_axis: int, change: LowRank) -> None:
        self._axis, self._change = output_axis, change
        outer, inner = shape[output_axis], shape[1 - output_axis]
        self._rows = torch.zeros(change.output_right.shape[0], inner, dtype=torch.float64)  # R_o W
        self._columns = torch.zeros(outer, change.input_left.shape[1], dtype=torch.float64)  # W L_i
        self._is_table = change.constant is not None
        self.needs_weight = bool(self._rows.shape[0] or self._columns.shape[1])

    def add(self, tile: Float[Tensor, "rows columns"], start: int) -> None:
        """Add the rows of the stored weight from ``start`` on, in float64."""
        change, stop = self._change, start + tile.shape[0]
        if self._is_table:
            self._rows[:, start:stop] = (tile @ change.output_right.T).T
        elif self._axis == 0:
            self._rows += change.output_right[:, start:stop] @ tile
            self._columns[start:stop] = tile @ change.input_left
        else:
            self._rows[:, start:stop] = (tile @ change.output_right.T).T
            self._columns += tile.T @ change.input_left[start:stop]

    def factors(self) -> tuple[Float[Tensor, "r inner"], Float[Tensor, "out r"]]:
        """Return (A, B), once every row has come by."""
        return self._table() if self._is_table else self._layer()

    def _layer(self) -> Factors:
        change, rows, columns = self._change, self._rows, self._columns
        rows = rows + (change.output_right @ change.update_left) @ change.update_right
        columns = columns + change.update_left @ (change.update_right @ change.input_left)
        rows = rows + (rows @ change.input_left) @ change.input_right
        a = torch.cat([change.update_right, rows, change.input_right])
        return a, torch.cat([change.update_left, change.output_left, columns], dim=1)

    def _table(self) -> Factors:
        """A constant along the edited directions joins their factors; another has a row of ones."""
        change = self._change
        assert change.constant is not None
        inside, outside = split_constant(change.output_left, change.constant)
        a = self._rows + inside.unsqueeze(1)
        if outside is None:
            return a, change.output_left
        ones = torch.ones(1, a.shape[1], dtype=torch.float64)
        return torch.cat([a, ones]), torch.cat([change.output_left, outside.unsqueeze(1)], dim=1)


def weight_factors(
    read: ReadRows, shape: tuple[int, ...], output_axis: int, change: LowRank
) -> tuple[Float[Tensor, "r inner"], Float[Tensor, "out r"]]:
    """Return (A, B) of one weight in float64, from one pass over it; see ``FactorSum``.

    Args:
        read: reads rows of the stored weight.
        shape: of the stored weight.
        output_axis: the axis of it that the output is on.
        change: the factors that need no weight.
    """
    total = FactorSum(shape, output_axis, change)
    if total.needs_weight:
        for start, stop in spans(shape):
            total.add(read(start, stop).to(torch.float64), start)
    return total.factors()


def factors_from(checkpoint: Checkpoint) -> FactorSource:
    """Return what computes a target's factors from the checkpoint's weights."""

    def source(target: Target) -> Factors:
        update = target.update
        assert update is not None

        def read(start: int, stop: int) -> Tensor:
            return checkpoint.read_rows(update.source, start, stop)

        return weight_factors(read, target.shape, target.output_axis, low_rank(update))

    return source


def padded(
    a: Float[Tensor, "r inner"], b: Float[Tensor, "out r"], rank: int
) -> tuple[Float[Tensor, "rank inner"], Float[Tensor, "out rank"]]:
    """Return the factors with zeros up to a rank that all weights of an adapter share."""
    more = rank - a.shape[0]
    return (
        torch.cat([a, a.new_zeros(more, a.shape[1])]),
        torch.cat([b, b.new_zeros(b.shape[0], more)], dim=1),
    )
