"""The control-vector output: a GGUF file of constants that llama.cpp adds behind blocks.

The format is repeng's (``repeng/control.py: export_gguf``), which llama.cpp reads
(``common/common.cpp: common_control_vector_load``): architecture ``controlvector``, and for every
block N ≥ 1 a float32 vector ``direction.N`` that is added to the block's output, its residual sum
included.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float32
from torch import Tensor

from bake.affine import AffineMap
from bake.artifact.artifact import Artifact
from bake.errors import UsageError
from bake.outputs.export import CarrierRun, CarrierWriter, Export
from bake.outputs.folder import close_artifact
from bake.plan import Plan
from bake.plan.carriers import refuse, vector_layers
from bake.rounding import to_storage

FILE = "control-vector.gguf"
ARCHITECTURE = "controlvector"


def prepare_control_vector(export: Export) -> CarrierWriter:
    """Return what writes the plan's offsets. No weight is read; offsets behind one block add up.

    Raises:
        InexactPlan: an edit is no control vector, or llama.cpp adds none in this architecture.
        UsageError: every offset is zero.
        InputError: a value does not fit float32.
    """
    refuse(export.plan, "control-vector")  # an allowed loss would be no constant at all
    vectors = summed_vectors(export.plan)
    if not vectors:
        raise UsageError("every offset is zero, so a control vector of them would be empty")
    return partial(_write, export.plan, vectors)


def _write(plan: Plan, vectors: Mapping[int, Tensor], run: CarrierRun) -> Artifact:
    family = plan.layout.family
    hint = family.gguf.arch if family.gguf else family.name
    write_vectors(run.place.folder / FILE, vectors, hint)
    return close_artifact(plan, "control-vector", run)


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
