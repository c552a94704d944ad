"""``Levels``: the values that the codes of a number format stand for."""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float64, Int16, UInt8
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """The finite values of a format, in ascending order, and which code is which.

    A code that stands for no number is at no place, −1. Of two codes for one value, as of ±0, the
    first is the one that is written.
    """

    values: Float64[Tensor, " n"]
    place: Int16[Tensor, " codes"]
    """Of every code."""
    code: UInt8[Tensor, " n"]
    """Of every value."""

    def placed(self, codes: UInt8[Tensor, "*s"]) -> Int16[Tensor, "*s"]:
        """Return the places of some codes."""
        return self.place[codes.to(torch.int64)]

    def nearest(self, ideal: Float64[Tensor, "*s"]) -> Int16[Tensor, "*s"]:
        """Return the places of the values that are nearest; an end's beyond it."""
        between = (self.values[1:] + self.values[:-1]) / 2
        return torch.bucketize(ideal.contiguous(), between).to(torch.int16)

    @property
    def low(self) -> float:
        """How far below the first value numbers are taken for it: half a step."""
        return float(self.values[0] - (self.values[1] - self.values[0]) / 2)

    @property
    def high(self) -> float:
        """How far above the last value numbers are taken for it: half a step."""
        return float(self.values[-1] + (self.values[-1] - self.values[-2]) / 2)


def _levels(of_codes: Tensor) -> Levels:
    """Return the levels of a table that has a value for every code."""
    finite = of_codes.isfinite()
    values, inverse = torch.unique(of_codes[finite], return_inverse=True)
    place = torch.full((of_codes.shape[0],), -1, dtype=torch.int16)
    place[finite] = inverse.to(torch.int16)
    first = torch.arange(of_codes.shape[0] - 1, -1, -1)
    code = torch.zeros(values.shape[0], dtype=torch.uint8)
    for number in first[place[first] >= 0].tolist():  # the first of equal ones is the last to stay
        code[int(place[number])] = number
    return Levels(values, place, code)


@cache
def float8(dtype: torch.dtype) -> Levels:
    """Return the levels of an 8-bit floating-point type, whose codes are its bytes."""
    codes = torch.arange(256, dtype=torch.uint8)
    return _levels(codes.view(dtype).to(torch.float64))


@cache
def e2m1() -> Levels:
    """Return the levels of FP4 with two bits of exponent (OCP Microscaling Formats, table 5)."""
    half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    return _levels(torch.cat([half, -half]))


@cache
def integers(bits: int, lowest: int) -> Levels:
    """Return consecutive integers from ``lowest`` on, whose codes count from 0."""
    return _levels(torch.arange(lowest, lowest + (1 << bits), dtype=torch.float64))


@cache
def signed_bytes() -> Levels:
    """Return the integers from −128 to 127, whose codes are their bytes."""
    codes = torch.arange(256, dtype=torch.uint8)
    return _levels(codes.view(torch.int8).to(torch.float64))


def table(values: Float64[Tensor, " codes"]) -> Levels:
    """Return the levels of a table that a checkpoint brings."""
    return _levels(values.to(torch.float64))
