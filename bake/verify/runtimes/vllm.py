"""Ask vLLM: its own loader, its own kernels, a checkpoint folder as a server would read it."""

import json
from pathlib import Path

from bake.errors import CheckpointError
from bake.verify.runtimes._exchange import serve
from bake.verify.runtimes.base import RuntimeRequest, RuntimeResult

NAME = "vLLM"

# One process, so that an error reaches the worker's stderr and nothing outlives it.
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def run(request: RuntimeRequest, python: Path, *, timeout: float = 900.0) -> RuntimeResult:
    """Return vLLM's log-probabilities and greedy tokens for a checkpoint folder.

    Args:
        request: what to compute.
        python: the interpreter of the environment that vLLM is installed in.
        timeout: seconds until vLLM is killed; starting it takes 10 to 50 of them.

    Raises:
        CheckpointError: the model is no checkpoint folder, or the adapter no PEFT folder.
        RuntimeMissing: vLLM is not installed there.
        RuntimeFailed: vLLM refused the model, crashed or took too long.
    """
    if not (request.model / "config.json").is_file():
        raise CheckpointError(
            "vLLM reads a checkpoint folder", where=f"{request.model}/config.json"
        )
    return serve(
        NAME,
        "_vllm_worker.py",
        request,
        python,
        timeout=timeout,
        variables=VARIABLES,
        extra={} if request.adapter is None else {"adapter_rank": _rank(request.adapter)},
    )


# vLLM config/lora.py: MaxLoRARanks. An adapter of any rank fits into a larger one.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def _rank(adapter: Path) -> int:
    """Return what `--max-lora-rank` must be for an adapter."""
    config = adapter / "adapter_config.json"
    try:
        rank = int(json.loads(config.read_text(encoding="utf-8"))["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError("vLLM reads a PEFT LoRA with its rank", where=str(config)) from error
    fitting = [allowed for allowed in RANKS if allowed >= rank]
    if not fitting:
        raise CheckpointError(
            f"the adapter's rank is {rank}, and vLLM takes up to {RANKS[-1]}", where=str(config)
        )
    return fitting[0]
