"""Round the rows of a GGUF tensor with error feedback, and say how far that may move a value.

A block keeps the scales that it has in the base file, where they still reach its values, and gets
other codes: what an edit does not reach stays as it is, and no quantiser is needed.

**How far a value may be off.** A grid reaches half a step beyond its ends. A block whose values lie
within reach takes the nearest codes, half a step off at most, and feedback moves a code by one: no
value is more than 1½ steps of its own block off (``allowed_error``).
"""

import torch
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor

from bake.checkpoints.gguf.codec import (
    FLOATS,
    check_fits,
    decode,
    encode,
    stored_bytes,
    strips,
)
from bake.checkpoints.gguf.ggml import Ggml
from bake.checkpoints.gguf.grid import (
    PLANES,
    SIMPLE,
    Grid,
    fresh_blocks,
    read_codes,
    read_grid,
    with_codes,
)
from bake.checkpoints.gguf.types import GgmlType
from bake.rounding import Feedback, Moves, Rounding, Where, to_storage

_REACH = 0.5 + 2.0**-10  # steps; and what float32 makes of a quotient
_SCALES_OF_SCALES = {"Q2_K": 15, "Q3_K": 31, "Q4_K": 63, "Q5_K": 63, "Q6_K": 127}


def encode_measured(
    values: Float64[Tensor, "rows columns"],
    kind: GgmlType,
    name: str,
    *,
    base: UInt8[Tensor, "rows bytes"] | None = None,
    feedback: Feedback | None = None,
    ggml: Ggml | None = None,
) -> tuple[UInt8[Tensor, "rows bytes"], Float64[Tensor, "rows columns"]]:
    """Return some rows in the type, and what their values read back as, less the exact ones.

    Args:
        values: the exact rows.
        kind: the type.
        name: the tensor's name, for messages.
        base: the rows before the edit, in the same type, whose scales feedback keeps.
        feedback: of the matrix that these rows are the next of; to nearest without it. The type is
            one of ``FEEDBACK`` then.
        ggml: encodes blocks of types that gguf-py does not, where a scale has to be another.

    Raises:
        InputError: a value does not fit the type.
        UsageError: a block needs other scales, and nothing here quantises to the type.
    """
    if kind.name in FLOATS:
        round_ = to_storage if feedback is None else feedback.to_storage
        rounded = round_(values, FLOATS[kind.name], name)
        return stored_bytes(rounded), rounded.to(torch.float64) - values
    if feedback is None:
        raw = encode(values, kind, name, ggml=ggml)
        return raw, decode(raw, kind, name) - values
    rows = _Rows(values, kind, name, ggml)
    return rows.with_feedback(base, feedback)


def allowed_error(
    raw: UInt8[Tensor, "rows bytes"], kind: GgmlType, name: str, rounding: Rounding
) -> Float[Tensor, "rows columns"] | None:
    """Return how far every value may lie from the exact one, by the grid of its own block.

    Half a step to nearest, 1½ with feedback (see the module). A block of 256 values, of a type with
    scales of scales, keeps its scales for a whole step beyond its ends. Where it was quantised anew
    it is ggml's, which clips up to a step where that lessens the square error, and rounds the
    scales of its runs to multiples of the largest over 15 (Q2_K), 31 (Q3_K), 63 (Q4_K, Q5_K) or 127
    (Q6_K): a run may end that much of the largest range earlier. What gguf-py quantises to nearest
    rounds its codes before its scales, which 1 / 8 of a step more allows for; its Q4_0 and Q5_0 end
    a whole step before the value opposite to the largest. None for a type without an even grid,
    where nothing but the sum of all errors can be said.
    """
    if kind.name not in PLANES:
        return None
    grid = read_grid(raw, kind, lambda some: decode(some, kind, name))
    steps = grid.steps(raw.shape[0])
    if kind.name in SIMPLE:
        return steps * (_REACH + 1) if rounding == "feedback" else steps * 1.125
    span = (grid.scale.abs() * (grid.high - grid.low)).amax(dim=1) / _SCALES_OF_SCALES[kind.name]
    clipped = span.reshape(raw.shape[0], -1).repeat_interleave(kind.block, dim=1)
    return steps * (_REACH + 1 + (rounding == "feedback")) + clipped


class _Rows:
    """Rows of values that take codes under scales."""

    def __init__(self, values: Tensor, kind: GgmlType, name: str, ggml: Ggml | None) -> None:
        self.values, self.kind, self.name, self.ggml = values, kind, name, ggml

    def with_feedback(self, base: Tensor | None, feedback: Feedback) -> tuple[Tensor, Tensor]:
        """Return the rows in the type, and their errors."""
        values, kind = self.values, self.kind
        width = values.shape[1] // kind.block * kind.size
        raw = torch.empty(values.shape[0], width, dtype=torch.uint8)
        codes, errors = torch.empty(values.shape), torch.empty_like(values)
        for rows in strips(values):
            old = None if base is None else base[rows]
            raw[rows] = self._nearest(values[rows], old, codes[rows], errors[rows])
            check_fits(errors[rows], values[rows], kind, self.name)
        feedback.settle(errors, _Codes(self._grid(raw), codes, errors, feedback.axis))
        raw = with_codes(raw, kind, codes)
        if kind.name not in SIMPLE:  # their decoders multiply scales in another order
            errors = decode(raw, kind, self.name) - values
        return raw, errors

    def _nearest(self, values: Tensor, old: Tensor | None, codes: Tensor, errors: Tensor) -> Tensor:
        """Return blocks that reach the values; the nearest codes and their errors are filled in."""
        size = self.kind.block
        raw = self._fresh(values.reshape(-1, size)) if old is None else old
        strange = self._coded(values, raw, codes, errors)
        if old is not None and strange.numel():
            raw = old.reshape(-1, self.kind.size).clone()
            blocks = values.reshape(-1, size)[strange]
            raw[strange] = made = self._fresh(blocks)
            few, off = torch.empty(blocks.shape), torch.empty_like(blocks)
            self._coded(blocks, made, few, off)
            codes.view(-1, size)[strange], errors.view(-1, size)[strange] = few, off
        return raw.reshape(values.shape[0], -1)

    def _coded(
        self, values: Tensor, raw: Tensor, codes: Tensor, errors: Tensor
    ) -> Int[Tensor, " blocks"]:
        """Fill in the nearest codes and their errors; return the blocks that miss a value."""
        grid = self._grid(raw)
        ideal = grid.ideal(values)
        flat = grid.steps(values.shape[0]) == 0 if bool((grid.scale == 0).any()) else None
        if flat is not None:  # all codes stand for one value, and those that are there stay
            ideal = torch.where(flat, read_codes(raw, self.kind).reshape(ideal.shape), ideal)
        codes.copy_(ideal.round()).clamp_(grid.low, grid.high)
        grid.errors(codes, values, out=errors)
        far = ideal.sub_(codes).abs_().reshape(-1, self.kind.block).amax(dim=1)
        strange = ~(far <= (_REACH if self.kind.name in SIMPLE else 2 * _REACH))
        if flat is not None:
            strange |= (flat & (errors != 0)).reshape(-1, self.kind.block).any(dim=1)
        return torch.nonzero(strange)[:, 0]

    def _fresh(self, blocks: Float64[Tensor, "n block"]) -> UInt8[Tensor, "n size"]:
        made = fresh_blocks(blocks, self.kind)
        return encode(blocks, self.kind, self.name, ggml=self.ggml) if made is None else made

    def _grid(self, raw: Tensor) -> Grid:
        return read_grid(raw, self.kind, lambda some: decode(some, self.kind, self.name))


class _Codes:
    """Codes under scales. Each may go to a neighbour that is no more than 1½ steps off."""

    def __init__(self, grid: Grid, codes: Tensor, errors: Tensor, axis: int) -> None:
        self.grid, self.axis = grid, axis
        table = grid.scale.reshape(codes.shape[0], -1)
        tables = (codes, errors, table)
        self.codes, self.errors, self.scales = tables if axis == 0 else [t.T for t in tables]

    def moves(self, where: Where) -> Moves:
        lines, others = where
        run = self.grid.kind.block // self.grid.scale.shape[1]
        if self.axis == 1:
            unit = self.scales[lines // run, others]
        elif isinstance(others, slice):
            unit = self.scales[lines].repeat_interleave(run, dim=1)
        else:
            unit = self.scales[lines, others // run]
        near, unit = self.codes[where], unit.to(torch.float64).contiguous()
        off = self.errors[where] / unit
        far = _REACH + 1
        up = (off + 1 <= far) & (near < self.grid.high)
        down = (off - 1 >= -far) & (near > self.grid.low)
        return Moves(unit, -down.to(torch.float64), up.to(torch.float64))

    def move(self, where: Where, counts: Tensor) -> None:
        self.codes[where] += counts.to(self.codes.dtype)
