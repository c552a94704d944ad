"""``Measure``: what rounding a tensor to codes did to the edit of it."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bake.checkpoints.gguf.codec import strips
from bake.outputs.functionals import Functionals


@dataclass(slots=True)
class Measure:
    """What rounding did to one tensor, summed over its experts; squares of Frobenius norms."""

    error: float = 0.0
    norm: float = 0.0
    meant: float = 0.0
    done: float = 0.0
    left: float = 0.0
    had: float = 0.0
    rounding: set[str] = field(default_factory=set)

    def add(self, base: Tensor, exact: Tensor, errors: Tensor) -> None:
        """Add a stretch of the tensor: as it was, as it is meant to be, and what it is off by."""
        for rows in strips(exact):
            meant, off = exact[rows].flatten(), errors[rows].flatten()
            change = meant - base[rows].flatten()
            self.error += float(off.dot(off))
            self.norm += float(meant.dot(meant))
            size = float(change.dot(change))
            self.meant += size
            self.done += size + float(change.dot(off))

    @property
    def change(self) -> float:
        """The share of the edit that the tensor has after rounding: 1 is all of it."""
        return self.done / self.meant if self.meant else 1.0

    @property
    def leak(self) -> float | None:
        """The share of a removed component that came back; None where the edit removes none."""
        return (self.left / self.had) ** 0.5 if self.had else None

    def record(self) -> dict[str, Any]:
        """Return the numbers for the record; ``error`` is relative to the tensor's norm."""
        return {
            "rounding": "+".join(sorted(self.rounding)),
            "change": self.change,
            "leak": self.leak,
            "error": (self.error / self.norm) ** 0.5 if self.norm else 0.0,
        }


class Seen:
    """What functionals see of a matrix that comes tile by tile."""

    def __init__(self, functionals: Functionals) -> None:
        self.functionals = functionals
        self.across: Tensor | None = None
        self.within = 0.0

    def add(self, tile: Tensor, start: int) -> None:
        """Add rows of the matrix, of which ``start`` is the first."""
        rows = self.functionals.rows
        if self.functionals.axis == 1:
            self.within += float((tile @ rows.T).square().sum())
            return
        part = rows[:, start : start + tile.shape[0]] @ tile
        self.across = part if self.across is None else self.across + part

    def square(self) -> float:
        """Return the square of what they see of it."""
        return self.within if self.across is None else float(self.across.square().sum())
