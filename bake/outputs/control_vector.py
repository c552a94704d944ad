"""The control-vector output: a GGUF file of constants that llama.cpp adds behind blocks.

The format is repeng's (``repeng/control.py: export_gguf``), which llama.cpp reads
(``common/common.cpp: common_control_vector_load``): architecture ``controlvector``, and for every
block N ≥ 1 a float32 vector ``direction.N`` that is added to the block's output, its residual sum
included.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from bake.affine import AffineMap
from bake.artifact.artifact import Artifact
from bake.errors import UsageError
from bake.outputs.folder import write_artifact
from bake.plan import Plan
from bake.plan.carriers import refuse, vector_layers
from bake.rounding import to_storage

FILE = "control-vector.gguf"
ARCHITECTURE = "controlvector"


def export_control_vector(
    plan: Plan,
    out: Path,
    *,
    record: Mapping[str, Any],
    force: bool = False,
) -> Artifact:
    """Write the plan's offsets as ``control-vector.gguf`` to the folder ``out``.

    No weight of the base is read. Offsets behind one block add up.

    Args:
        plan: whose edits all add a constant behind block 1 or later.
        out: a folder that does not exist, unless ``force``.
        record: what ``bake.json`` keeps besides the plan.
        force: replace an artifact of bake at ``out``.

    Raises:
        InexactPlan: an edit is no control vector, or llama.cpp adds none in this architecture.
        UsageError: every offset is zero, or ``out`` is in the way.
        InputError: a value does not fit float32, or the disk refuses.
    """
    vectors = check_control_vector(plan)
    hint = plan.layout.family.gguf.arch if plan.layout.family.gguf else plan.layout.family.name

    def write(folder: Path) -> None:
        write_vectors(folder / FILE, vectors, hint)

    return write_artifact(plan, "control-vector", out, record=record, force=force, write=write)


def check_control_vector(plan: Plan) -> dict[int, Float32[Tensor, " d"]]:
    """Return the constant behind every block, as ``summed_vectors`` does.

    Raises:
        InexactPlan: an edit is no control vector, or llama.cpp adds none in this architecture.
        UsageError: every offset is zero.
        InputError: a value does not fit float32.
    """
    refuse(plan, "control-vector")
    vectors = summed_vectors(plan)
    if not vectors:
        raise UsageError("every offset is zero, so a control vector of them would be empty")
    return vectors


def summed_vectors(plan: Plan) -> dict[int, Float32[Tensor, " d"]]:
    """Return the constant behind every block, [d] in float32; blocks without one are left out."""
    sums: dict[int, Tensor] = {}
    for layer, edit in vector_layers(plan):
        assert isinstance(edit.map, AffineMap)
        sums[layer] = sums.get(layer, torch.zeros_like(edit.map.bias)) + edit.map.bias
    return {
        layer: to_storage(sums[layer], torch.float32, f"direction.{layer}")
        for layer in sorted(sums)
        if bool(sums[layer].any())
    }


def write_vectors(path: Path, vectors: Mapping[int, Float32[Tensor, " d"]], hint: str) -> None:
    """Write a control vector file; the same vectors give the same bytes."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", hint)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer}", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
