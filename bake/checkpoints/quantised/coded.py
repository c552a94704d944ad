"""``Coded``: one weight that a checkpoint stores as codes under scales, whatever the format.

A value is scale × (level − zero). Every format differs in where the codes lie (``Codes``) and in
how the scales are stored (``Scales``); all else is told here once. The rows of a weight of more
than two axes are counted through its leading axes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from bake.checkpoints.quantised.levels import Levels
from bake.checkpoints.quantised.stored import Stored
from bake.errors import CheckpointError


@dataclass(frozen=True, slots=True, eq=False)
class ScaleTable:
    """The scales of a weight, and which of them a value has: that of its row's and its column's."""

    scale: Float64[Tensor, "r c"]
    rows: Int64[Tensor, " rows"]
    columns: Int64[Tensor, " columns"]
    zero: Float64[Tensor, "r c"] | None = None
    """In levels; None where it is 0 everywhere."""

    def at(self, values: Tensor, start: int, stop: int) -> Float64[Tensor, "n columns"]:
        """Return a table's number for every value of some rows of the weight."""
        return values[self.rows[start:stop]].index_select(1, self.columns)

    def largest(self, into: Tensor, values: Tensor, start: int) -> None:
        """Raise a table's numbers to the largest of what some rows of the weight have."""
        width = into.shape[1]
        some = torch.zeros(values.shape[0], width, dtype=into.dtype)
        some.scatter_reduce_(1, self.columns.expand_as(values), values, "amax")
        rows = self.rows[start : start + values.shape[0]].unsqueeze(1).expand_as(some)
        into.scatter_reduce_(0, rows, some, "amax")


class Codes(Protocol):
    """Where a weight's codes lie."""

    @property
    def name(self) -> str:
        """The tensor that holds them."""
        ...

    def read(self, start: int, stop: int) -> UInt8[Tensor, "rows columns"]:
        """Return the codes of some rows of the weight."""
        ...

    def stored(self, tiles: Iterable[UInt8[Tensor, "rows columns"]]) -> Iterator[Tensor]:
        """Yield the tensor that holds other codes, tile by tile; they come in order of the rows."""
        ...


class Scales(Protocol):
    """How a weight's scales are stored."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that hold them, and zeros where there are any."""
        ...

    def read(self) -> ScaleTable:
        """Return them."""
        ...

    def hold(self, scale: Float64[Tensor, "r c"]) -> Float64[Tensor, "r c"]:
        """Return scales of the storage type that are not less; infinite where there is none."""
        ...

    def stored(self, scale: Float64[Tensor, "r c"]) -> Mapping[str, Tensor]:
        """Return the tensors that hold other scales, which ``hold`` has returned."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """One weight.

    Attributes:
        name: as the unquantised checkpoint has it.
        shape: the sizes of its axes there.
        dtype: what its values are stored in where it is dequantised, as safetensors spells it.
        format: what its codes are, in a word or two.
        levels: what they stand for.
        codes: where they lie.
        scales: how its scales are stored.
        beside: further tensors of its layer that are about its codes, as a shape or the scale of
            what the layer reads.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: str
    levels: Levels
    codes: Codes
    scales: Scales
    beside: tuple[str, ...] = ()

    @property
    def matrix(self) -> tuple[int, int]:
        """The number of its rows, and their length."""
        return math.prod(self.shape[:-1]), self.shape[-1]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every tensor of the file that is a part of it."""
        return (self.codes.name, *self.scales.names, *self.beside)

    def values(
        self, start: int, stop: int, table: ScaleTable | None = None
    ) -> Float64[Tensor, "rows columns"]:
        """Return rows, as exact as float64 holds a product.

        Args:
            start: the first.
            stop: past the last.
            table: of the scales, where they have been read before.

        Raises:
            CheckpointError: a code, or a scale, stands for no number.
        """
        found = self.scales.read() if table is None else table
        place = self.levels.placed(self.codes.read(start, stop))
        levels = self.levels.values[place.to(torch.int64)]
        if found.zero is not None:
            levels = levels - found.at(found.zero, start, stop)
        values = levels * found.at(found.scale, start, stop)
        if bool((place < 0).any()) or not math.isfinite(float(values.sum())):
            raise CheckpointError(f"{self.name} holds a code or a scale that is no number")
        return values

    def read(self, start: int, stop: int) -> Float64[Tensor, "rows ..."]:
        """Return the part from ``start`` to ``stop`` along axis 0."""
        each = math.prod(self.shape[1:-1])
        found = self.values(start * each, stop * each)
        return found.reshape(stop - start, *self.shape[1:])

    def steps(
        self, start: int, stop: int, exact: Float64[Tensor, "rows columns"]
    ) -> Float64[Tensor, "rows columns"]:
        """Return the distance of the two neighbours of some values, for some rows."""
        found, count = self.scales.read(), self.levels.values.shape[0]
        scale = found.at(found.scale, start, stop)
        ideal = torch.where(scale == 0, 0.0, exact / scale)
        if found.zero is not None:
            ideal = ideal + found.at(found.zero, start, stop)
        above = torch.bucketize(ideal.contiguous(), self.levels.values).clamp_(1, count - 1)
        return (self.levels.values[above] - self.levels.values[above - 1]) * scale.abs()


def blocks(size: int, each: int) -> Int64[Tensor, " size"]:
    """Return which block of so many every index is in; the last one may be short."""
    return torch.arange(size) // each


def whole(checkpoint: Stored, name: str) -> Float64[Tensor, "..."]:
    """Return a tensor of scales in float64."""
    return checkpoint.read(name).to(torch.float64)


def not_less(values: Float64[Tensor, "*s"], dtype: torch.dtype) -> Float64[Tensor, "*s"]:
    """Return numbers of a floating-point type that are not less, infinite where it has none."""
    if dtype.itemsize == 1:
        from bake.checkpoints.quantised.levels import float8

        steps = float8(dtype).values
        place = torch.bucketize(values, steps)
        ends = torch.cat([steps, torch.tensor([torch.inf], dtype=torch.float64)])
        return ends[place]
    rounded = values.to(dtype)
    up = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.to(torch.float64) < values, up, rounded).to(torch.float64)


def powers_of_two(values: Float64[Tensor, "*s"]) -> Float64[Tensor, "*s"]:
    """Return the least powers of two that are not less; 0 for 0."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp(torch.where(mantissa == 0.5, 0.5, 1.0) * (values > 0), exponent)


def in_whole(
    tiles: Iterable[UInt8[Tensor, "rows columns"]], height: int
) -> Iterator[UInt8[Tensor, "rows columns"]]:
    """Yield rows in tiles of whole matrices of so many rows, one or several at a time."""
    held: list[Tensor] = []
    rows = 0
    for tile in tiles:
        held.append(tile)
        rows += tile.shape[0]
        if rows % height == 0:
            yield torch.cat(held)
            held, rows = [], 0
    assert not held, "the rows are no whole number of matrices"
