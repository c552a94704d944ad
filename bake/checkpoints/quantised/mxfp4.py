"""MXFP4 experts of gpt-oss: ``_blocks`` and ``_scales``, one stack of matrices for all experts.

Mirrors transformers' ``integrations/mxfp4.py: convert_moe_packed_tensors``. The unquantised
checkpoint has them as [experts, in, out]; here every output has its inputs in a row, 32 of them
under one power of two.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from bake.checkpoints.quantised.coded import Coded, ScaleTable, blocks, in_whole
from bake.checkpoints.quantised.found import Found, disagreeing
from bake.checkpoints.quantised.levels import e2m1
from bake.checkpoints.quantised.nibbles import from_exponents, held_exponents, to_exponents
from bake.checkpoints.quantised.packing import from_bytes, to_bytes
from bake.checkpoints.quantised.stored import Stored

_GROUP, _BYTES = 32, 16
_BLOCKS, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True, slots=True, eq=False)
class _Experts:
    """Codes as bytes [experts, out, groups, 16]; a row of the weight is an input of an expert."""

    checkpoint: Stored
    name: str
    inputs: int

    def read(self, start: int, stop: int) -> UInt8[Tensor, "rows columns"]:
        """Return the codes of some rows."""
        first, last = start // self.inputs, -(-stop // self.inputs)
        stored = self.checkpoint.read_part(self.name, first, last)
        found = [from_bytes(expert.flatten(1)).T for expert in stored]
        rows = torch.cat(found) if found else stored.new_empty(0, stored.shape[1])
        return rows[start - first * self.inputs : stop - first * self.inputs]

    def stored(self, tiles: Iterable[UInt8[Tensor, "rows columns"]]) -> Iterator[Tensor]:
        """Yield the bytes of whole experts."""
        for tile in in_whole(tiles, self.inputs):
            for expert in torch.split(tile, self.inputs):
                packed = to_bytes(expert.T.contiguous())
                yield packed.reshape(1, packed.shape[0], -1, _BYTES)


@dataclass(frozen=True, slots=True, eq=False)
class _ExpertScales:
    """Exponents [experts, out, groups]."""

    checkpoint: Stored
    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """The tensor."""
        return (self.name,)

    def read(self) -> ScaleTable:
        """Return them, a row for each group of inputs of an expert."""
        scale = from_exponents(self.checkpoint.read(self.name)).transpose(1, 2)
        experts, groups, outputs = scale.shape
        rows = blocks(experts * groups * _GROUP, _GROUP)
        return ScaleTable(scale.reshape(-1, outputs), rows, torch.arange(outputs))

    def hold(self, scale: Float64[Tensor, "r c"]) -> Float64[Tensor, "r c"]:
        """Return powers of two that are not less."""
        return held_exponents(scale)

    def stored(self, scale: Float64[Tensor, "r c"]) -> Mapping[str, Tensor]:
        """Return the tensor."""
        experts, outputs, groups = self.checkpoint.tensors[self.name].shape
        turned = scale.reshape(experts, groups, outputs).transpose(1, 2)
        return {self.name: to_exponents(turned).contiguous()}


def find(checkpoint: Stored, settings: Mapping[str, Any], dtype: str) -> Found:
    """Return the experts of a checkpoint whose configuration says ``mxfp4``.

    Raises:
        CheckpointError: the configuration and the tensors disagree.
    """
    tensors = checkpoint.tensors
    coded = []
    for name in tensors:
        if not name.endswith(_BLOCKS):
            continue
        stem = name.removesuffix(_BLOCKS)
        shape, scales = tensors[name].shape, tensors.get(stem + _SCALES)
        if scales is None or scales.shape != shape[:3] or shape[3:] != (_BYTES,):
            raise disagreeing(checkpoint, "mxfp4", f"{name} has no {stem}{_SCALES} of its shape")
        experts, outputs, groups = shape[:3]
        inputs = groups * _GROUP
        codes = _Experts(checkpoint, name, inputs)
        found = _ExpertScales(checkpoint, scales.name)
        whole = (experts, inputs, outputs)
        coded.append(Coded(stem, whole, dtype, "MXFP4", e2m1(), codes, found))
    return Found(tuple(coded))
