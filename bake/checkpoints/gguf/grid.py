"""The grid of a block: its values are offset + scale × code, and where the bits of the codes lie.

A block keeps scales and codes apart, so codes can be exchanged under the scales that are there.
The layouts are those of ggml (ggml/src/ggml-common.h: ``block_q4_0`` and so on); scale and offset
are read off the decoder itself, as what it makes of the codes 0 and 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from bake.checkpoints.gguf.types import GgmlType

Decoder = Callable[[UInt8[Tensor, "rows bytes"]], Float64[Tensor, "rows columns"]]


@dataclass(frozen=True, slots=True)
class Plane:
    """Some bits of every code of a block: ``bits`` at a time, in the bytes from start to stop.

    Every byte holds 8 / bits values, ``run`` values apart: the first ``run`` of a stretch are in
    the lowest bits of its bytes, the next ``run`` above them.
    """

    start: int
    stop: int
    bits: int
    run: int

    def unpack(self, blocks: UInt8[Tensor, "n size"]) -> UInt8[Tensor, "n block"]:
        """Return these bits of every code."""
        packed = blocks[:, self.start : self.stop].reshape(blocks.shape[0], -1, 1, self.run)
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8).reshape(1, 1, -1, 1)
        return ((packed >> shifts) & ((1 << self.bits) - 1)).reshape(blocks.shape[0], -1)

    def pack(self, blocks: UInt8[Tensor, "n size"], codes: UInt8[Tensor, "n block"]) -> None:
        """Write these bits of every code into the blocks."""
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8).reshape(1, 1, -1, 1)
        values = codes.reshape(blocks.shape[0], -1, 8 // self.bits, self.run) << shifts
        # The fields do not overlap, so their sum is their union.
        packed = values.sum(dim=2, dtype=torch.uint8)
        blocks[:, self.start : self.stop] = packed.reshape(blocks.shape[0], -1)


PLANES = {
    # From the lowest bits of the codes to the highest.
    "Q4_0": (Plane(2, 18, 4, 16),),
    "Q4_1": (Plane(4, 20, 4, 16),),
    "Q5_0": (Plane(6, 22, 4, 16), Plane(2, 6, 1, 1)),
    "Q5_1": (Plane(8, 24, 4, 16), Plane(4, 8, 1, 1)),
    "Q8_0": (Plane(2, 34, 8, 1),),
    "Q2_K": (Plane(16, 80, 2, 32),),
    "Q3_K": (Plane(32, 96, 2, 32), Plane(0, 32, 1, 32)),
    "Q4_K": (Plane(16, 144, 4, 32),),
    "Q5_K": (Plane(48, 176, 4, 32), Plane(16, 48, 1, 32)),
    "Q6_K": (Plane(0, 128, 4, 64), Plane(128, 192, 2, 32)),
}
_SIGNED = ("Q8_0",)  # its codes are bytes in two's complement


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The values that a tensor's blocks can take under their scales, all [rows, columns]."""

    codes: Float64[Tensor, "rows columns"]
    scale: Float64[Tensor, "rows columns"]
    offset: Float64[Tensor, "rows columns"]
    low: int
    high: int

    def values(self, codes: Tensor) -> Tensor:
        """Return what the codes stand for."""
        return self.offset + self.scale * codes

    def ideal(self, values: Tensor) -> Tensor:
        """Return the codes, not whole and maybe out of range, that would stand for the values.

        Where the scale is 0 all codes stand for one value, and those that are there stay.
        """
        flat = self.scale == 0
        exact = (values - self.offset) / self.scale.masked_fill(flat, 1.0)
        return torch.where(flat, self.codes, exact)


def read_grid(raw: UInt8[Tensor, "rows bytes"], kind: GgmlType, decode: Decoder) -> Grid:
    """Return the grid of some rows; the type is one of ``PLANES``."""
    zeros, ones = (decode(_filled(raw, kind, code)) for code in (0, 1))
    bits = sum(plane.bits for plane in PLANES[kind.name])
    codes = torch.zeros_like(zeros)
    blocks, shift = raw.reshape(-1, kind.size), 0
    for plane in PLANES[kind.name]:
        codes += plane.unpack(blocks).reshape(codes.shape).to(torch.float64) * (1 << shift)
        shift += plane.bits
    low = 0
    if kind.name in _SIGNED:
        low = -(1 << (bits - 1))
        codes = torch.where(codes >= -low, codes + 2 * low, codes)
    return Grid(codes, ones - zeros, zeros, low, low + (1 << bits) - 1)


def with_codes(
    raw: UInt8[Tensor, "rows bytes"], kind: GgmlType, codes: Float64[Tensor, "rows columns"]
) -> UInt8[Tensor, "rows bytes"]:
    """Return the rows with other codes under the same scales."""
    blocks = raw.reshape(-1, kind.size).clone()
    whole = codes.reshape(-1, kind.block).to(torch.int64)
    for plane in PLANES[kind.name]:
        plane.pack(blocks, (whole & ((1 << plane.bits) - 1)).to(torch.uint8))
        whole = whole >> plane.bits
    return blocks.reshape(raw.shape)


def _filled(raw: Tensor, kind: GgmlType, code: int) -> Tensor:
    """Return the rows with one code everywhere."""
    columns = raw.shape[1] // kind.size * kind.block
    same = torch.full((raw.shape[0], columns), float(code), dtype=torch.float64)
    return with_codes(raw, kind, same)
