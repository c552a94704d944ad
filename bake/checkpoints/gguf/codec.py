"""Rows of a GGUF tensor to float64 and back.

Decoding is exact: every type's values are float32 numbers. Encoding rounds, to nearest or with
error feedback. To nearest, a block is quantised anew. With feedback it keeps the scales that it has
in the base file, where they still span its values, and gets other codes: what an edit does not
reach stays as it is, and no quantiser is needed.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float64, UInt8
from torch import Tensor

from bake.checkpoints.gguf.ggml import VARIABLE, Ggml
from bake.checkpoints.gguf.grid import PLANES, Grid, read_grid, with_codes
from bake.checkpoints.gguf.types import GgmlType
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
FEEDBACK = (*FLOATS, *PLANES)
"""The types that can be rounded with error feedback."""

_SLAB = 1 << 22  # values whose codes are chosen at a time


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
    choice = "write the edited tensors in another type (--edited-type Q8_0)"
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
    base: UInt8[Tensor, "m bytes"] | None = None,
    ggml: Ggml | None = None,
) -> UInt8[Tensor, "m bytes"]:
    """Return the matrix in the type, rounded as ``rounding.feedback`` does.

    Args:
        values: the exact matrix; whole along ``axis``.
        directions: k rows over the ``axis`` of the matrix.
        kind: one of ``FEEDBACK``.
        name: the tensor's name, for messages.
        axis: the axis that the directions run along.
        base: the matrix before the edit, in the same type, whose scales are kept where they do.
        ggml: encodes blocks of types that gguf-py does not, where a scale has to be another.

    Raises:
        InputError: a value does not fit the type.
        UsageError: a block needs other scales, and nothing here quantises to the type.
    """
    if kind.name in FLOATS:
        return _bytes(feedback(values, directions, FLOATS[kind.name], name, axis=axis))
    if axis == 1:
        return _recoded(values, directions, kind, name, axis, base, ggml)
    width = max(1, _SLAB // values.shape[0] // kind.block) * kind.block
    ratio = kind.size / kind.block
    slabs = []
    for start in range(0, values.shape[1], width):
        stop = min(start + width, values.shape[1])
        old = None if base is None else base[:, round(start * ratio) : round(stop * ratio)]
        slabs.append(_recoded(values[:, start:stop], directions, kind, name, 0, old, ggml))
    return torch.cat(slabs, dim=1)


def _recoded(
    values: Tensor,
    directions: Tensor,
    kind: GgmlType,
    name: str,
    axis: int,
    base: Tensor | None,
    ggml: Ggml | None,
) -> Tensor:
    """Return the rows under scales that span them, with codes chosen by error feedback."""
    raw = encode(values, kind, name, ggml=ggml) if base is None else base
    grid = read_grid(raw, kind, lambda bytes_: decode(bytes_, kind, name))
    if base is not None:
        strange = _out_of_reach(values, grid, kind)
        if bool(strange.any()):
            blocks = values.reshape(-1, kind.block)[strange]
            raw = raw.reshape(-1, kind.size).clone()
            raw[strange] = encode(blocks, kind, name, ggml=ggml)
            raw = raw.reshape(base.shape)
            grid = read_grid(raw, kind, lambda bytes_: decode(bytes_, kind, name))
    ideal = grid.ideal(values)
    nearest = ideal.round().clamp(grid.low, grid.high)
    towards = torch.sign(ideal - nearest)
    # An edit that is small beside the steps pulls all values of a column one way, and of steps
    # towards the values alone none would lead back from too far: hence the neighbours away from
    # them as a third choice, which one or two values of a column take.
    codes = [nearest, *((nearest + s).clamp(grid.low, grid.high) for s in (towards, -towards))]
    if axis == 1:
        chosen = corrections(values.T, [grid.values(c).T for c in codes], directions).T
    else:
        chosen = corrections(values, [grid.values(c) for c in codes], directions)
    taken = torch.stack(codes).gather(0, chosen.to(torch.int64).unsqueeze(0))[0]
    return with_codes(raw, kind, taken)


def _out_of_reach(values: Tensor, grid: Grid, kind: GgmlType) -> Bool[Tensor, " blocks"]:
    """Return the blocks with a value outside of their range by more than a sixteenth of it."""
    reached = grid.values(grid.ideal(values).clamp(grid.low, grid.high))
    excess = (values - reached).abs().reshape(-1, kind.block).amax(dim=1)
    span = grid.scale.abs().reshape(-1, kind.block).amax(dim=1) * (grid.high - grid.low + 1)
    return excess > span / 16


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)
