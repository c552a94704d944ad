"""The LoRA output: a PEFT adapter written from the plan, with no model loaded.

Every module of the adapter has the same rank r, zero-padded, and ``lora_alpha`` = r, so that the
scale is 1 in every runtime: some of them overlook patterns of ranks and rank-stabilised scales
(llama.cpp's converter, SGLang). No bias, no dropout, no module saved whole.

Keys are those that PEFT writes (``peft/utils/save_and_load.py``), after ``base_model.model.`` and
the module's path: ``.lora_A.weight`` [r, in] and ``.lora_B.weight`` [out, r] for layers,
``.lora_embedding_A`` [r, V] and ``.lora_embedding_B`` [d, r] for tables. A mixture's experts keep
their names of the checkpoint, one pair for every projection of every expert: PEFT, vLLM and
llama.cpp stack them, and want all of them.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from bake.artifact.artifact import Artifact
from bake.artifact.schema import BaseRef
from bake.checkpoints.header import build_header
from bake.checkpoints.stream import Fill, Literal, Piece, Producer
from bake.checkpoints.workers import write_file
from bake.errors import UsageError
from bake.outputs.export import CarrierRun, CarrierWriter, Export
from bake.outputs.factors import Factors, FactorSource, factors_from, padded
from bake.outputs.folder import close_artifact
from bake.plan.lowrank import Target, rank_of, targets_of
from bake.progress import Progress, Tally
from bake.rounding import to_storage

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def prepare_lora(export: Export) -> CarrierWriter:
    """Return what writes a PEFT adapter. Of the base only the edited tensors are read, in tiles.

    ``adapter_config.json`` names the base by its Hub id and commit, or by the place of its folder:
    PEFT looks for any other name below the folder that it is run in.

    Raises:
        InexactPlan: a finding is not exact and not allowed, or a wanted runtime refuses the
            adapter.
        UsageError: the plan changes no weight.
    """
    return partial(_write, export, nonempty(targets_of(export.plan)))


def _write(export: Export, targets: Sequence[Target], run: CarrierRun) -> Artifact:
    rank, plan, folder = common_rank(targets), export.plan, run.place.folder
    base = run.record.base
    if base.path is not None:
        base = replace(base, model=str(export.checkpoint.path.resolve()))
    config = adapter_config(targets, rank, base)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    source = factors_from(export.checkpoint) if run.factors is None else run.factors.source
    # Half precision would lose what the base's own half precision keeps: a factor is multiplied.
    dtype = torch.float64 if plan.layout.dtype == "F64" else torch.float32
    _write_weights(folder / WEIGHTS, source, targets, rank, dtype, run.progress)
    return close_artifact(plan, "lora", run)


def nonempty(targets: Sequence[Target]) -> Sequence[Target]:
    """Return the targets.

    Raises:
        UsageError: there is none.
    """
    if not targets:
        raise UsageError("the plan changes no weight, so an adapter of it would be empty")
    return targets


def common_rank(targets: Sequence[Target]) -> int:
    """Return the rank that all modules of an adapter share: the largest that one needs."""
    return max(1, *(rank_of(target.update) for target in targets if target.update is not None))


def target_factors(source: FactorSource, target: Target, rank: int) -> Factors:
    """Return (A, B) of one weight in float64, zero-padded; a table's A is [rank, tokens]."""
    if target.update is not None:
        return padded(*source(target), rank)
    outer, inner = target.shape[target.output_axis], target.shape[1 - target.output_axis]
    zeros = torch.zeros(rank, inner, dtype=torch.float64)
    return zeros, torch.zeros(outer, rank, dtype=torch.float64)


def adapter_config(targets: Sequence[Target], rank: int, base: BaseRef) -> dict[str, Any]:
    """Return ``adapter_config.json``: every field that a runtime could take for another default."""
    modules = {
        target.module.rpartition(".")[2] if target.role == "expert" else target.module
        for target in targets
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.model,
        "revision": base.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "bias": "none",
        "lora_bias": False,
        "use_rslora": False,
        "use_dora": False,
        # Conv1D stores [in, out]: GPT-2 in transformers.
        "fan_in_fan_out": any(t.output_axis == 1 for t in targets if t.role == "linear"),
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def adapter_keys(target: Target) -> tuple[str, str]:
    """Return the names of A and B in a PEFT adapter."""
    stem = _PREFIX + target.module
    if target.role in ("embed", "positions"):
        return f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _write_weights(
    path: Path,
    source: FactorSource,
    targets: Sequence[Target],
    rank: int,
    dtype: torch.dtype,
    progress: Progress | None,
) -> None:
    """Write the factors one weight after another, in the base's precision or in float32."""
    name = "F64" if dtype == torch.float64 else "F32"
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    producers: dict[str, Producer] = {}
    for target in targets:
        outer, inner = target.shape[target.output_axis], target.shape[1 - target.output_axis]
        key_a, key_b = adapter_keys(target)
        shapes[key_a] = name, (rank, inner)
        shapes[key_b] = name, (outer, rank)
        producers[key_a], producers[key_b] = _producers(source, target, rank, dtype)
    header, infos = build_header(shapes, shard=WEIGHTS)
    pieces: list[Piece] = [Literal(header), *(Fill(info, producers[info.name]) for info in infos)]
    tally = Tally(infos[-1].stop, progress)
    write_file(path, pieces, origin=None, advance=tally.advance)


def _producers(
    source: FactorSource, target: Target, rank: int, dtype: torch.dtype
) -> tuple[Producer, Producer]:
    """Return producers of A and B that read the weight once, whichever is asked first."""
    lock = Lock()
    made: dict[str, Tensor] = {}

    def produce(side: str) -> Iterator[Tensor]:
        with lock:
            if side not in made:
                factors = target_factors(source, target, rank)
                for key, factor in zip("AB", factors, strict=True):
                    made[key] = to_storage(factor, dtype, f"{target.name} ({key})")
            factor = made.pop(side)
        yield factor

    return partial(produce, "A"), partial(produce, "B")
