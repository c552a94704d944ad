"""vLLM: its own loader, its own kernels, a checkpoint folder as a server would read it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.artifact.carrier import VLLM_RANKS, vllm_room
from bake.errors import CheckpointError
from bake.verify.runtimes.runtime import Runtime

if TYPE_CHECKING:
    from bake.verify.runtimes.request import RuntimeRequest


def _adapter_rank(request: "RuntimeRequest") -> Mapping[str, Any]:
    return {} if request.adapter is None else {"adapter_rank": max_lora_rank(request.adapter)}


def max_lora_rank(adapter: Path) -> int:
    """Return what ``--max-lora-rank`` must be for an adapter.

    Raises:
        CheckpointError: it states no rank, or a larger one than vLLM takes.
    """
    config = adapter / "adapter_config.json"
    try:
        rank = int(json.loads(config.read_text(encoding="utf-8"))["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError("vLLM reads a PEFT LoRA with its rank", where=str(config)) from error
    room = vllm_room(rank)
    if room is None:
        raise CheckpointError(
            f"the adapter's rank is {rank}, and vLLM takes up to {VLLM_RANKS[-1]}",
            where=str(config),
        )
    return room


VLLM = Runtime(
    "vllm",
    "vLLM",
    ("checkpoint", "merge", "lora"),
    "_vllm_worker.py",
    ("numpy", "torch", "transformers", "vllm"),
    # One process, so that an error reaches the worker's stderr and nothing outlives it.
    variables={
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    },
    details=_adapter_rank,
)
