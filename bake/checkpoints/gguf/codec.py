"""Rows of a GGUF tensor to float64 and back.

Decoding is exact: every type's values are float32 numbers. Encoding rounds to nearest, every block
anew; ``rounding`` keeps scales and feeds errors back.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from bake.checkpoints.gguf.ggml import VARIABLE, Ggml
from bake.checkpoints.gguf.grid import PLANES, SIMPLE, read_codes, read_grid
from bake.checkpoints.gguf.types import GgmlType
from bake.errors import CheckpointError, InputError, UsageError
from bake.rounding import to_storage

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_GGUF_PY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
# Those that ggml_quantize_chunk takes beside them; it aborts the process on any other.
_GGML = tuple(
    "Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS".split()
)
FEEDBACK = (*FLOATS, *PLANES)
"""The types that can be rounded with error feedback."""

_STRIP = 1 << 17  # values that are rounded at a time: in fewer, calls cost more than memory does


def decode(
    raw: UInt8[Tensor, "rows bytes"], kind: GgmlType, name: str
) -> Float64[Tensor, "rows columns"]:
    """Return the values of some rows.

    Raises:
        CheckpointError: gguf-py has no decoder for the type.
    """
    if kind.name in FLOATS:
        return raw.contiguous().view(FLOATS[kind.name]).to(torch.float64)
    if kind.name in SIMPLE:
        return _by_strips(raw, kind, name)
    import gguf

    number = gguf.GGMLQuantizationType(kind.number)
    try:
        with np.errstate(invalid="ignore"):  # an infinite scale times zero
            values = gguf.quants.dequantize(raw.numpy(), number)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{name} is stored as {kind.name}, which gguf-py cannot decode",
            fix="start from a GGUF in another type, or from the checkpoint",
        ) from error
    return torch.from_numpy(values).to(torch.float64)


def can_encode(kind: GgmlType, ggml: Ggml | None) -> bool:
    """Return whether ``encode`` can write the type."""
    if kind.name in FLOATS or kind.name in _GGUF_PY:
        return True
    return kind.name in _GGML and ggml is not None and not ggml.needs_importance(kind)


def check_encodable(kind: GgmlType, ggml: Ggml | None, name: str) -> None:
    """Raise unless ``encode`` can write the type.

    Raises:
        UsageError: nothing here quantises to it.
    """
    if can_encode(kind, ggml):
        return
    choice = "write the edited tensors in another type (--gguf-type Q8_0)"
    if kind.name not in _GGML:
        raise UsageError(f"{name} is stored as {kind.name}, which no tool encodes", fix=choice)
    if ggml is None:
        raise UsageError(
            f"{name} is stored as {kind.name}, which gguf-py decodes but does not encode",
            fix=f"install llama-cpp-python or xllamacpp, or name a ggml library in ${VARIABLE}, "
            f"or {choice}",
        )
    raise UsageError(
        f"{name} is stored as {kind.name}, which is quantised with an importance matrix only",
        fix=choice,
    )


def encode(
    values: Float64[Tensor, "rows columns"],
    kind: GgmlType,
    name: str,
    *,
    ggml: Ggml | None = None,
) -> UInt8[Tensor, "rows bytes"]:
    """Return the rows in the type, every value or block rounded to nearest.

    Raises:
        InputError: a value does not fit the type.
        UsageError: nothing here quantises to it.
    """
    if kind.name in FLOATS:
        return stored_bytes(to_storage(values, FLOATS[kind.name], name))
    check_encodable(kind, ggml, name)
    single = to_storage(values, torch.float32, name)
    if kind.name not in _GGUF_PY:
        assert ggml is not None  # check_encodable
        raw = ggml.quantize(single, kind)
    else:
        import gguf

        number = gguf.GGMLQuantizationType(kind.number)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
            raw = torch.from_numpy(gguf.quants.quantize(single.numpy(), number))
    check_fits(decode(raw, kind, name), values, kind, name)
    return raw


def _by_strips(raw: Tensor, kind: GgmlType, name: str) -> Tensor:
    """Return the values of rows of a simple type."""
    values = torch.empty(raw.shape[0], raw.shape[1] // kind.size * kind.block, dtype=torch.float64)
    for rows in strips(values):
        grid = read_grid(raw[rows], kind, lambda some: decode(some, kind, name))
        values[rows] = grid.values(read_codes(raw[rows], kind))
    return values


def strips(values: Tensor) -> Iterator[slice]:
    """Yield the rows of a matrix in stretches that stay in the processor's cache."""
    height = max(1, _STRIP // max(1, values.shape[1]))
    for start in range(0, values.shape[0], height):
        yield slice(start, start + height)


def check_fits(written: Tensor, values: Tensor, kind: GgmlType, name: str) -> None:
    """Raise where values, or their errors, are no numbers once they are written.

    Raises:
        InputError: they do not fit the type.
    """
    if not math.isfinite(float(written.sum())):  # of float32 numbers, so that no sum overflows
        raise InputError(
            f"the edited tensor {name} does not fit {kind.name}: |value| up to "
            f"{float(values.abs().max()):.3g}",
            why="the scale of a block is a float16",
            fix="lower the strength or the coefficient",
        )


def stored_bytes(values: Tensor) -> Tensor:
    """Return values of a floating-point type as the bytes that hold them."""
    return values.contiguous().view(torch.uint8)
