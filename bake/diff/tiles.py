"""``Difference``: one matrix of two models, read side by side in tiles."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bake.diff.precision import FLOATS, arithmetic, half_step
from bake.diff.weights import Weights

TILE = 1 << 21
"""Values that are held at a time, of each of a handful of tiles."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Some rows of the matrix before and after."""

    start: int
    stop: int
    before: Float[Tensor, "rows n"]
    after: Float[Tensor, "rows n"]
    differs: Bool[Tensor, "rows n"]
    box: Float[Tensor, "rows n"] | None
    """How far rounding may have moved the difference, where that was asked for and is known."""

    @property
    def delta(self) -> Float[Tensor, "rows n"]:
        """After minus before."""
        return self.after - self.before


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """One matrix in two models.

    Attributes:
        base: the weights before.
        out: the weights after.
        base_name: the tensor's name in the base.
        name: its name in the other model.
        index: which of the matrices that the tensor stacks.
    """

    base: Weights
    out: Weights
    base_name: str
    name: str
    index: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.out.tensors[self.name].matrix

    @property
    def dtype(self) -> torch.dtype:
        """The type that both matrices are computed with."""
        return arithmetic(
            self.base.tensors[self.base_name].dtype, self.out.tensors[self.name].dtype
        )

    def tiles(self, *, box: bool = False) -> Iterator[Tile]:
        """Yield the rows of both matrices, some at a time, from the first to the last."""
        rows, columns = self.shape
        step = max(1, TILE // max(1, columns))
        for start in range(0, rows, step):
            yield self._tile(start, min(start + step, rows), box=box)

    def _tile(self, start: int, stop: int, *, box: bool) -> Tile:
        first = self.index * self.shape[0]
        old = self.base.rows(self.base_name, first + start, first + stop)
        new = self.out.rows(self.name, first + start, first + stop)
        before, after = self.base.values(self.base_name, old), self.out.values(self.name, new)
        same_type = self.base.tensors[self.base_name].dtype == self.out.tensors[self.name].dtype
        width = new.shape[1] // after.shape[1]
        if same_type and width * after.shape[1] == new.shape[1] and width:
            # By bytes: zeros of both signs differ, and a NaN equals itself.
            differs = (old != new).reshape(stop - start, after.shape[1], width).any(dim=2)
        else:
            differs = before.to(torch.float64) != after.to(torch.float64)
        wide = before.to(self.dtype), after.to(self.dtype)
        found = self._box(old, new, *wide) if box else None
        return Tile(start, stop, *wide, differs, found)

    def _box(self, old: Tensor, new: Tensor, before: Tensor, after: Tensor) -> Tensor | None:
        """Return how far rounding may have moved the difference.

        The result was rounded, and maybe the update too before it was added; where the storage type
        has changed, the base counts as rounded as well.
        """
        stored = self.out.tensors[self.name].dtype
        steps = self.out.steps(self.name, new, after)
        if steps is None:
            return None
        if stored in FLOATS:
            delta = after - before
            steps = steps + half_step(delta, stored).masked_fill(delta == 0, 0.0)
        if self.base.tensors[self.base_name].dtype != stored and not self.out.derived:
            more = self.base.steps(self.base_name, old, before)
            steps = None if more is None else steps + more
        return steps
