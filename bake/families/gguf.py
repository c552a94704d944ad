"""Where the tensors of a checkpoint lie in a GGUF file of the same model.

llama.cpp's converter does more than rename: it stores every linear layer as [out, in], stacks the
experts of a block, orders the outputs of some layers anew, and writes a norm's whole gain (Gemma's
1 + weight). A ``GgufPlace`` states all of it for one tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bake.errors import UsageError
from bake.families.layout import Layout, Linear, Norm
from bake.families.table import GgufNames


@dataclass(frozen=True, slots=True)
class GgufPlace:
    """One tensor of a checkpoint, as a GGUF file holds it."""

    name: str
    expert: int | None = None
    """Index along the leading axis of a tensor that stacks all experts."""
    rows: Sequence[int] | None = None
    """Row i of the file is output rows[i] of the checkpoint's tensor; None: the same order."""
    transposed: bool = False
    """Whether the checkpoint stores the matrix as [in, out]."""
    addend: float = 0.0
    """What the file's values are larger by: the offset of a norm's gain."""


def gguf_names(layout: Layout) -> GgufNames:
    """Return the family's names in GGUF files.

    Raises:
        UsageError: the table has no section [gguf].
    """
    names = layout.family.gguf
    if names is None:
        raise UsageError(
            f"the table {layout.family.name!r} says nothing of GGUF files",
            fix="bake the checkpoint and convert it with llama.cpp's own converter, or add a "
            "section [gguf] to the table",
        )
    return names


def gguf_places(layout: Layout) -> Mapping[str, GgufPlace]:
    """Return the place of every tensor that an edit may touch, by its name in the checkpoint.

    Bias slots that the checkpoint does not fill have places too, since an edit may create them.

    Raises:
        UsageError: the table has no section [gguf].
    """
    names = gguf_names(layout)
    places = {layout.embed: GgufPlace(f"{names.embed}.weight")}
    for table, name in zip(layout.positions, names.positions, strict=True):
        places[table] = GgufPlace(f"{name}.weight")
    for branch in layout.branches:
        block = f"blk.{branch.layer}"
        live = layout.block_live.replace("{layer}", str(branch.layer))
        for norm in branch.norms:
            name = names.norms[norm.live.removeprefix(f"{live}.")]
            places |= _norm(norm, f"{block}.{name}")
        for linear in (*branch.reads, *branch.writes):
            places |= _linear(linear, f"{block}.{names.linears[linear.module]}", names, layout)
    places |= _norm(layout.final_norm, names.final_norm)
    return places | _linear(layout.unembed, names.unembed, names, layout)


def unedited_names(layout: Layout) -> frozenset[str]:
    """Return the tensors that a GGUF file of the model may hold besides those with a place."""
    return frozenset(
        name.replace("{layer}", str(layer))
        for name in gguf_names(layout).untouched
        for layer in range(layout.layers)
    )


def rotary_rows(rows: int, head_dim: int) -> tuple[int, ...]:
    """Return the order of ``LlamaModel.permute``: the halves of every head interleaved.

    Row (h, j, half) of the file is row (h, half, j) of the checkpoint. Mirrors
    ``reshape(heads, 2, head_dim / 2, …).swapaxes(1, 2)`` in llama.cpp's conversion/llama.py.
    """
    half = head_dim // 2
    return tuple(
        start + part * half + j
        for start in range(0, rows, head_dim)
        for j in range(half)
        for part in range(2)
    )


def _norm(norm: Norm, name: str) -> dict[str, GgufPlace]:
    places = dict[str, GgufPlace]()
    if norm.weight is not None:
        places[norm.weight] = GgufPlace(f"{name}.weight", addend=norm.gain_offset)
    if norm.bias is not None:
        places[norm.bias] = GgufPlace(f"{name}.bias")
    return places


def _linear(linear: Linear, name: str, names: GgufNames, layout: Layout) -> dict[str, GgufPlace]:
    rows: Sequence[int] | None = None
    match names.rows.get(linear.module):
        case "rotary":
            rows = rotary_rows(linear.shape[linear.output_axis], layout.dims["head_dim"])
        case "parts":
            rows = tuple(row for part in linear.parts for row in part.rows)
    expert = None
    if "{expert}" in linear.module:
        before, after = linear.module.split("{expert}")
        number = linear.weight.removesuffix(f"{after}.weight").rpartition(before)[2]
        expert = int(number)
    transposed = linear.output_axis == 1
    return {
        linear.weight: GgufPlace(f"{name}.weight", expert, rows, transposed),
        linear.bias.name: GgufPlace(f"{name}.bias", expert, rows),
    }
