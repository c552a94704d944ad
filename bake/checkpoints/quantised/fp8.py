"""FP8 weights: one byte a value, and a scale for the matrix, for a row, or for a block of both.

Mirrors transformers' ``integrations/finegrained_fp8.py`` (``weight_scale_inv``: DeepSeek, Qwen3)
and compressed-tensors' ``compressors/naive_quantized`` (``weight_scale``), where a scale multiplies
despite the former's name.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from bake.checkpoints.quantised.coded import (
    Coded,
    ScaleTable,
    blocks,
    in_whole,
    not_less,
    powers_of_two,
    whole,
)
from bake.checkpoints.quantised.levels import float8, signed_bytes
from bake.checkpoints.quantised.stored import Stored
from bake.errors import CheckpointError

DTYPES = ("F8_E4M3", "F8_E5M2")
"""Of FP8 codes, as safetensors spells them."""


@dataclass(frozen=True, slots=True, eq=False)
class Bytes:
    """Codes that are the bytes of a tensor of the weight's own shape."""

    checkpoint: Stored
    name: str

    def read(self, start: int, stop: int) -> UInt8[Tensor, "rows columns"]:
        """Return the codes of some rows, counted through a stack of matrices."""
        each = math.prod(self.checkpoint.tensors[self.name].shape[1:-1])
        first, last = start // each, -(-stop // each)
        rows = self.checkpoint.read_part(self.name, first, last).view(torch.uint8)
        return rows.reshape(-1, rows.shape[-1])[start - first * each : stop - first * each]

    def stored(self, tiles: Iterable[UInt8[Tensor, "rows columns"]]) -> Iterator[Tensor]:
        """Yield the rows of the tensor."""
        info = self.checkpoint.tensors[self.name]
        for tile in in_whole(tiles, math.prod(info.shape[1:-1])):
            yield tile.contiguous().view(info.torch_dtype).reshape(-1, *info.shape[1:])


@dataclass(frozen=True, slots=True, eq=False)
class BlockScales:
    """Scales of blocks of ``size``, in one tensor of a floating-point type, or of its exponents.

    The matrices of a stack have blocks of their own.
    """

    checkpoint: Stored
    name: str
    shape: tuple[int, ...]
    """Of the weight."""
    size: tuple[int, int]
    power: bool = False
    """Whether every scale is a power of two."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensor."""
        return (self.name,)

    @property
    def count(self) -> tuple[int, int]:
        """Rows and columns of the blocks, those of a stack's matrices one below the other."""
        stack, (rows, columns) = math.prod(self.shape[:-2]), self.shape[-2:]
        return stack * -(-rows // self.size[0]), -(-columns // self.size[1])

    def read(self) -> ScaleTable:
        """Return them, a row for each row of blocks."""
        stack, (rows, columns) = math.prod(self.shape[:-2]), self.shape[-2:]
        own = blocks(rows, self.size[0])
        every = torch.arange(stack).unsqueeze(1) * (int(own[-1]) + 1) + own
        scale = whole(self.checkpoint, self.name).reshape(self.count)
        return ScaleTable(scale, every.reshape(-1), blocks(columns, self.size[1]))

    def hold(self, scale: Float64[Tensor, "r c"]) -> Float64[Tensor, "r c"]:
        """Return scales of the tensor's type that are not less."""
        dtype = self.checkpoint.tensors[self.name].torch_dtype
        if self.power or dtype == torch.float8_e8m0fnu:
            scale = powers_of_two(scale)
        return not_less(scale, dtype)

    def stored(self, scale: Float64[Tensor, "r c"]) -> Mapping[str, Tensor]:
        """Return the tensor."""
        info = self.checkpoint.tensors[self.name]
        return {self.name: scale.reshape(info.shape).to(info.torch_dtype)}


def coded_fp8(
    checkpoint: Stored,
    names: tuple[str, str],
    size: tuple[int, int] | None,
    dtype: str,
    title: str,
    *,
    power: bool = False,
    beside: tuple[str, ...] = (),
) -> Coded:
    """Return a weight whose codes are bytes, in FP8 or in integers of eight bits.

    Args:
        checkpoint: that holds it.
        names: of its codes and of its scales.
        size: rows and columns that share one; None for all of a matrix.
        dtype: what it is dequantised to.
        title: of the format.
        power: whether scales are powers of two.
        beside: other tensors that go with it.

    Raises:
        CheckpointError: there is another number of scales than blocks.
    """
    weight, name = names
    info, of = checkpoint.tensors[weight], checkpoint.tensors[name]
    each = size or (info.shape[-2], info.shape[-1])
    scales = BlockScales(checkpoint, name, info.shape, each, power)
    count, held = math.prod(scales.count), math.prod(of.shape)
    if held != count:
        raise CheckpointError(
            f"{name} holds {held} scales, and {weight} of shape {list(info.shape)} has {count} "
            f"blocks of {each[0]} × {each[1]}",
            where=checkpoint.source,
            fix="fetch config.json and the weights again: one of them is another model's",
        )
    levels = signed_bytes() if info.dtype == "I8" else float8(info.torch_dtype)
    codes = Bytes(checkpoint, weight)
    return Coded(weight, info.shape, dtype, title, levels, codes, scales, beside)
