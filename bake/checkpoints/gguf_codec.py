"""Rows of a GGUF tensor to float64 and back.

Decoding is exact: every type's values are float32 numbers. Encoding rounds, to nearest or with
error feedback. A quantised block's scale comes from rounding to nearest; feedback then chooses
among the multiples of that scale.
"""

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from bake.checkpoints.ggml import VARIABLE, Ggml
from bake.checkpoints.gguf_types import GgmlType
from bake.errors import CheckpointError, InputError, UsageError
from bake.rounding import corrections, feedback, to_storage

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
_LIMITS = {"Q8_0": (-127, 127), "Q4_0": (-8, 7)}  # of the multiples that a block holds
FEEDBACK = (*FLOATS, *_LIMITS)
"""The types that can be rounded with error feedback."""


def decode(
    raw: UInt8[Tensor, "rows bytes"], kind: GgmlType, name: str
) -> Float64[Tensor, "rows columns"]:
    """Return the values of some rows.

    Raises:
        CheckpointError: gguf-py has no decoder for the type.
    """
    if kind.name in FLOATS:
        return raw.contiguous().view(FLOATS[kind.name]).to(torch.float64)
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


def check_encodable(kind: GgmlType, ggml: Ggml | None, name: str) -> None:
    """Raise unless ``encode`` can write the type.

    Raises:
        UsageError: nothing here quantises to it.
    """
    if kind.name in FLOATS or kind.name in _GGUF_PY:
        return
    choice = 'choose edited_type = "Q8_0" for the edited tensors'
    if kind.name not in _GGML:
        raise UsageError(f"{name} is stored as {kind.name}, which no tool encodes", fix=choice)
    if ggml is None:
        raise UsageError(
            f"{name} is stored as {kind.name}, which gguf-py decodes but does not encode",
            fix=f"install llama-cpp-python or xllamacpp, or name a ggml library in ${VARIABLE}, "
            f"or {choice}",
        )
    if ggml.needs_importance(kind):
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
        return _bytes(to_storage(values, FLOATS[kind.name], name))
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
    if not bool(torch.isfinite(decode(raw, kind, name)).all()):
        raise InputError(
            f"the edited tensor {name} does not fit {kind.name}: |value| up to "
            f"{float(values.abs().max()):.3g}",
            why="the scale of a block is a float16",
            fix="lower the strength or the coefficient",
        )
    return raw


def encode_with_feedback(
    values: Float64[Tensor, "m n"],
    directions: Float64[Tensor, "k axis"],
    kind: GgmlType,
    name: str,
    *,
    axis: int = 0,
) -> UInt8[Tensor, "m bytes"]:
    """Return the whole matrix in the type, rounded as ``rounding.feedback`` does.

    Args:
        values: the exact matrix.
        directions: k rows over the ``axis`` of the matrix.
        kind: one of ``FEEDBACK``.
        name: the tensor's name, for messages.
        axis: the axis that the directions run along.

    Raises:
        InputError: a value does not fit the type.
    """
    if kind.name in FLOATS:
        return _bytes(feedback(values, directions, FLOATS[kind.name], name, axis=axis))
    raw = encode(values, kind, name)
    scales, codes = _unpack(raw, kind)
    nearest = scales * codes
    low, high = _LIMITS[kind.name]
    towards = torch.sign((values - nearest) * scales)
    neighbours = (codes + towards).clamp(low, high)
    if axis == 1:
        moved = corrections(values.T, nearest.T, (scales * neighbours).T, directions).T
    else:
        moved = corrections(values, nearest, scales * neighbours, directions)
    return _pack(raw, torch.where(moved, neighbours, codes), kind)


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _unpack(raw: Tensor, kind: GgmlType) -> tuple[Tensor, Tensor]:
    """Return scale and multiple of every value: a block is a float16 and its 32 codes."""
    rows = raw.shape[0]
    blocks = raw.reshape(-1, kind.size)
    scales = blocks[:, :2].contiguous().view(torch.float16).to(torch.float64)
    if kind.name == "Q8_0":
        codes = blocks[:, 2:].contiguous().view(torch.int8).to(torch.float64)
    else:  # Q4_0: the low halves of the bytes are the first 16 codes, the high ones the others
        packed = blocks[:, 2:]
        codes = torch.cat([packed & 15, packed >> 4], dim=1).to(torch.float64) - 8
    return scales.expand(-1, kind.block).reshape(rows, -1), codes.reshape(rows, -1)


def _pack(raw: Tensor, codes: Tensor, kind: GgmlType) -> Tensor:
    """Return the rows with other multiples of the same scales."""
    blocks = raw.reshape(-1, kind.size).clone()
    whole = codes.reshape(-1, kind.block)
    if kind.name == "Q8_0":
        blocks[:, 2:] = whole.to(torch.int8).view(torch.uint8)
    else:
        shifted = (whole + 8).to(torch.uint8)
        blocks[:, 2:] = shifted[:, :16] | (shifted[:, 16:] << 4)
    return blocks.reshape(raw.shape)
