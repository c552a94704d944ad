"""The grid of a block: its values are offset + scale × code, and where the bits of the codes lie.

A block keeps scales and codes apart, so codes can be exchanged under the scales that are there.
The layouts are those of ggml (ggml/src/ggml-common.h: ``block_q4_0`` and so on). Of the simple
types scale and offset are the float16 numbers that a block begins with; of the others they are read
off the decoder itself, as what it makes of the codes 0 and 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, UInt8
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
        packed = _words(blocks[:, self.start : self.stop], self.run)
        fields = [(packed >> shift) & self._mask for shift in range(0, 8, self.bits)]
        return torch.stack(fields, dim=2).view(torch.uint8).reshape(blocks.shape[0], -1)

    def pack(self, blocks: UInt8[Tensor, "n size"], codes: UInt8[Tensor, "n block"]) -> None:
        """Write these bits of every code into the blocks; the codes have no others."""
        words = _words(codes, self.run)
        fields = words.reshape(words.shape[0], -1, 8 // self.bits, words.shape[2])
        packed = fields[:, :, 0].contiguous()
        for number in range(1, fields.shape[2]):
            packed |= fields[:, :, number] << number * self.bits
        blocks[:, self.start : self.stop] = packed.view(torch.uint8).reshape(blocks.shape[0], -1)

    @property
    def _mask(self) -> int:
        """The bits of one value, in every byte of what ``_words`` makes of a run."""
        mask = (1 << self.bits) - 1
        return mask if self.run % 8 else int.from_bytes(bytes([mask] * 8), "little", signed=True)


def _words(bytes_: UInt8[Tensor, "n bytes"], run: int) -> Tensor:
    """Return runs of bytes, [n, runs, words]: eight bytes a word where a run has so many.

    No bit of a code leaves its byte: what is shifted out of one is masked, or was 0.
    """
    runs = bytes_.reshape(bytes_.shape[0], -1, run)
    return runs if run % 8 else runs.contiguous().view(torch.int64)


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
_ZERO = {"Q4_0": 8.0, "Q4_1": None, "Q5_0": 16.0, "Q5_1": None, "Q8_0": 0.0}
"""Of the simple types: which code stands for 0; None where a block has a minimum instead."""
SIMPLE = tuple(_ZERO)
"""The types with one scale a block, whose decoders are the grid's own formula."""
_SIGNED = ("Q8_0",)  # its codes are bytes in two's complement
_RUN = 16  # values; all types have scales for so many, or for a multiple


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The values that a tensor's blocks can take under their scales.

    Scale and offset are [blocks, runs, 1], for so many equal runs of a block's values: in float32,
    with which decoders compute, or in float64 where they were read off one.
    """

    kind: GgmlType
    scale: Float[Tensor, "blocks runs 1"]
    offset: Float[Tensor, "blocks runs 1"]
    low: int
    high: int

    def values(self, codes: Float[Tensor, "rows columns"]) -> Float64[Tensor, "rows columns"]:
        """Return what the codes stand for."""
        return self._decoded(codes).to(torch.float64)

    def errors(
        self,
        codes: Float[Tensor, "rows columns"],
        values: Float64[Tensor, "rows columns"],
        out: Float64[Tensor, "rows columns"],
    ) -> None:
        """Fill in what the codes stand for, less the values, in one pass."""
        torch.sub(self._decoded(codes), values, out=out)

    def _decoded(self, codes: Tensor) -> Tensor:
        found = codes.to(self.scale.dtype).reshape(*self.scale.shape[:2], -1) * self.scale
        return found.add_(self.offset).reshape(codes.shape)

    def ideal(self, values: Float64[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Return the codes, not whole and maybe out of range, that would stand for the values.

        They are infinite, or no numbers, where the scale is 0.
        """
        single = values.to(self.scale.dtype).reshape(*self.scale.shape[:2], -1)
        return single.sub(self.offset).div_(self.scale).reshape(values.shape)

    def steps(self, rows: int) -> Float[Tensor, "rows columns"]:
        """Return the distance of neighbouring codes at every value, [rows, columns]."""
        run = self.kind.block // self.scale.shape[1]
        return self.scale.abs().reshape(rows, -1).repeat_interleave(run, dim=1)


def read_grid(raw: UInt8[Tensor, "rows bytes"], kind: GgmlType, decode: Decoder) -> Grid:
    """Return the grid of some rows; the type is one of ``PLANES``."""
    blocks = raw.reshape(-1, kind.size)
    low, high = ends(kind)
    if kind.name in _ZERO:
        zero, numbers = _ZERO[kind.name], 2 if _ZERO[kind.name] is None else 1
        header = blocks[:, : 2 * numbers].contiguous().view(torch.float16).to(torch.float32)
        scale = header[:, :1]
        offset = header[:, 1:] if zero is None else scale * -zero
        return Grid(kind, scale.unsqueeze(2), offset.unsqueeze(2), low, high)
    zeros, ones = (
        decode(_filled(blocks, kind, code)).reshape(blocks.shape[0], -1, _RUN)[:, :, :1]
        for code in (0, 1)
    )
    return Grid(kind, ones - zeros, zeros, low, high)


def ends(kind: GgmlType) -> tuple[int, int]:
    """Return the smallest and the largest code of one of ``PLANES``."""
    bits = sum(plane.bits for plane in PLANES[kind.name])
    low = -(1 << (bits - 1)) if kind.name in _SIGNED else 0
    return low, low + (1 << bits) - 1


def read_codes(raw: UInt8[Tensor, "rows bytes"], kind: GgmlType) -> Float[Tensor, "rows columns"]:
    """Return the codes of some rows, whole numbers in float32."""
    blocks, (lowest, *others) = raw.reshape(-1, kind.size), PLANES[kind.name]
    codes, shift = lowest.unpack(blocks), lowest.bits
    for plane in others:
        codes |= plane.unpack(blocks) << shift
        shift += plane.bits
    whole = codes.view(torch.int8) if kind.name in _SIGNED else codes
    return whole.to(torch.float32).reshape(raw.shape[0], -1)


def with_codes(
    raw: UInt8[Tensor, "rows bytes"], kind: GgmlType, codes: Float[Tensor, "rows columns"]
) -> UInt8[Tensor, "rows bytes"]:
    """Return the rows with other codes, whole numbers in range, under the same scales."""
    blocks = raw.reshape(-1, kind.size).clone()
    signed = codes.reshape(-1, kind.block).to(torch.int8 if kind.name in _SIGNED else torch.uint8)
    whole = signed.view(torch.uint8)
    for plane in PLANES[kind.name]:
        plane.pack(blocks, whole & ((1 << plane.bits) - 1))
        if plane is not PLANES[kind.name][-1]:
            whole = whole >> plane.bits
    return blocks.reshape(raw.shape)


def fresh_blocks(
    values: Float[Tensor, "n block"], kind: GgmlType
) -> UInt8[Tensor, "n size"] | None:
    """Return blocks of a simple type whose grids reach all values to half a step; codes are 0.

    Half a step beyond its end a grid still reaches: with codes from L to H around the zero, every
    value lies within it where scale ≥ max(highest / (H + ½), −lowest / (½ − L)), or with the signs
    exchanged; with a minimum where offset ≤ lowest + scale / 2 and offset + (H + ½) scale ≥
    highest. The offset is rounded down to a float16 and the scale up, so that it stays so. A scale
    is infinite where the values are too large. None: the type has scales of scales.
    """
    if kind.name not in _ZERO:
        return None
    low, high = ends(kind)
    least, most = values.amin(dim=1), values.amax(dim=1)
    zero = _ZERO[kind.name]
    if zero is None:
        offset = _half(least + (most - least) / (2 * (high + 1)), up=False)
        header = [_half((most - offset) / (high + 0.5), up=True), offset]
    else:
        above, below = high - zero + 0.5, zero - low + 0.5
        straight = torch.maximum(most / above, -least / below)
        turned = torch.maximum(-least / above, most / below)
        scale = torch.where(straight <= turned, straight, -turned)
        header = [torch.where(scale < 0, -1.0, 1.0) * _half(scale.abs(), up=True)]
    blocks = torch.zeros(values.shape[0], kind.size, dtype=torch.uint8)
    numbers = torch.stack(header, dim=1).to(torch.float16).view(torch.uint8)
    blocks[:, : 2 * len(header)] = numbers
    return blocks


def _half(values: Tensor, *, up: bool) -> Tensor:
    """Return float16 numbers that are not less than the values, or not more; as they came."""
    rounded = values.to(torch.float16)
    wrong = rounded.to(values.dtype) < values if up else rounded.to(values.dtype) > values
    end = torch.full_like(rounded, torch.inf if up else -torch.inf)
    return torch.where(wrong, torch.nextafter(rounded, end), rounded).to(values.dtype)


def _filled(blocks: UInt8[Tensor, "n size"], kind: GgmlType, code: int) -> Tensor:
    """Return the blocks with one code everywhere."""
    same = torch.full((blocks.shape[0], kind.block), float(code))
    return with_codes(blocks, kind, same)
