"""FP4 weights: two codes a byte under a scale for every few columns (NVFP4, MXFP4).

Mirrors compressed-tensors' ``compressors/nvfp4`` and ``compressors/mxfp4``. NVFP4's scales are FP8
numbers, multiplied or divided by one number of the whole weight; MXFP4's are powers of two, of
which the exponents are stored.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from bake.checkpoints.quantised.coded import ScaleTable, blocks, not_less, powers_of_two, whole
from bake.checkpoints.quantised.packing import from_bytes, to_bytes
from bake.checkpoints.quantised.stored import Stored

_BIAS = 127  # of an exponent that is stored as a byte: E8M0
_LAST = 254  # 255 is no number


@dataclass(frozen=True, slots=True, eq=False)
class Nibbles:
    """Codes of four bits in rows of bytes."""

    checkpoint: Stored
    name: str

    def read(self, start: int, stop: int) -> UInt8[Tensor, "rows columns"]:
        """Return the codes of some rows."""
        return from_bytes(self.checkpoint.read_part(self.name, start, stop))

    def stored(self, tiles: Iterable[UInt8[Tensor, "rows columns"]]) -> Iterator[Tensor]:
        """Yield the rows of bytes."""
        for tile in tiles:
            yield to_bytes(tile)


@dataclass(frozen=True, slots=True, eq=False)
class Float8Scales:
    """Scales in FP8 for every ``group`` columns, under one number of the whole weight."""

    checkpoint: Stored
    name: str
    whole_name: str
    group: int
    divided: bool
    """Whether the scales are divided by that number, and not multiplied."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensor; the number of the whole weight stays."""
        return (self.name,)

    @property
    def factor(self) -> float:
        """What a stored scale is multiplied by."""
        number = float(whole(self.checkpoint, self.whole_name).reshape(()))
        return 1 / number if self.divided else number

    def read(self) -> ScaleTable:
        """Return them, a row for each of the weight."""
        scale = whole(self.checkpoint, self.name) * self.factor
        rows, groups = scale.shape
        return ScaleTable(scale, torch.arange(rows), blocks(groups * self.group, self.group))

    def hold(self, scale: Float64[Tensor, "r c"]) -> Float64[Tensor, "r c"]:
        """Return scales that FP8 holds and that are not less."""
        dtype = self.checkpoint.tensors[self.name].torch_dtype
        return not_less(scale / self.factor, dtype) * self.factor

    def stored(self, scale: Float64[Tensor, "r c"]) -> Mapping[str, Tensor]:
        """Return the tensor; what ``hold`` has multiplied is divided again and lies on a number."""
        dtype = self.checkpoint.tensors[self.name].torch_dtype
        return {self.name: (scale / self.factor).to(torch.float32).to(dtype)}


@dataclass(frozen=True, slots=True, eq=False)
class ExponentScales:
    """Powers of two for every ``group`` columns, of which the exponents are stored."""

    checkpoint: Stored
    name: str
    group: int

    @property
    def names(self) -> tuple[str, ...]:
        """The tensor."""
        return (self.name,)

    def read(self) -> ScaleTable:
        """Return them, a row for each of the weight."""
        scale = from_exponents(self.checkpoint.read(self.name))
        rows, groups = scale.shape
        return ScaleTable(scale, torch.arange(rows), blocks(groups * self.group, self.group))

    def hold(self, scale: Float64[Tensor, "r c"]) -> Float64[Tensor, "r c"]:
        """Return powers of two that are not less."""
        return held_exponents(scale)

    def stored(self, scale: Float64[Tensor, "r c"]) -> Mapping[str, Tensor]:
        """Return the tensor."""
        return {self.name: to_exponents(scale)}


def from_exponents(stored: UInt8[Tensor, "*s"]) -> Float64[Tensor, "*s"]:
    """Return the powers of two of stored exponents; no number for the last of them."""
    powers = (stored.to(torch.float64) - _BIAS).exp2()
    return torch.where(stored > _LAST, torch.nan, powers)


def to_exponents(scale: Float64[Tensor, "*s"]) -> UInt8[Tensor, "*s"]:
    """Return the stored exponents of powers of two."""
    return (scale.log2() + _BIAS).to(torch.uint8)


def held_exponents(scale: Float64[Tensor, "*s"]) -> Float64[Tensor, "*s"]:
    """Return powers of two that have a stored exponent and are not less."""
    powers = powers_of_two(scale).clamp(min=2.0**-_BIAS)
    return torch.where(powers > 2.0 ** (_LAST - _BIAS), torch.inf, powers)
