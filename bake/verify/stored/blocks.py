"""Values and steps of stored GGUF rows, by gguf-py alone: nothing here is shared with encoding."""

import gguf
import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from bake.checkpoints.gguf.grid import PLANES, read_grid
from bake.checkpoints.gguf.types import GgmlType
from bake.errors import CheckpointError

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

Raw = UInt8[Tensor, "rows bytes"]


def values_of(raw: Raw, kind: GgmlType, name: str) -> Float64[Tensor, "rows columns"]:
    """Return the values of some rows.

    Raises:
        CheckpointError: gguf-py has no decoder for the type.
    """
    if kind.name in FLOATS:
        return raw.contiguous().view(FLOATS[kind.name]).to(torch.float64)
    try:
        with np.errstate(invalid="ignore"):  # an infinite scale times zero
            found = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType(kind.number))
    except NotImplementedError as error:
        raise CheckpointError(
            f"{name} is stored as {kind.name}, which gguf-py cannot decode",
            fix="write the edited tensors in another type",
        ) from error
    return torch.from_numpy(found).to(torch.float64)


def steps_of(raw: Raw, kind: GgmlType, name: str) -> Float64[Tensor, "rows columns"]:
    """Return the distance between neighbouring values at every value of some rows.

    Where a block's values are offset + scale × code, it is the scale. Where they are taken from a
    table, neighbours lie apart by different steps, and it is the mean one: the block's span over
    as many steps as its bits have room for.
    """
    if kind.name in PLANES:
        grid = read_grid(raw, kind, lambda rows: values_of(rows, kind, name))
        return grid.steps(raw.shape[0]).to(torch.float64)
    values = values_of(raw, kind, name).reshape(-1, kind.block)
    levels = max(2, int(2 ** (8 * kind.size / kind.block)))
    span = values.amax(dim=1, keepdim=True) - values.amin(dim=1, keepdim=True)
    return (span / (levels - 1)).expand_as(values).reshape(raw.shape[0], -1)
