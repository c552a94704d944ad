"""Ask transformers, or PEFT over it: a fresh process that loads what a user would load."""

from pathlib import Path

from bake.errors import CheckpointError
from bake.verify.runtimes._exchange import serve
from bake.verify.runtimes.base import RuntimeRequest, RuntimeResult

NAME, ADAPTED = "transformers", "PEFT"


def run(request: RuntimeRequest, python: Path, *, timeout: float = 3600.0) -> RuntimeResult:
    """Return transformers' log-probabilities and greedy tokens for a checkpoint folder.

    Args:
        request: what to compute; with an adapter, PEFT puts it on the model.
        python: the interpreter of the environment that transformers is installed in.
        timeout: seconds until the process is killed.

    Raises:
        CheckpointError: the model is no checkpoint folder, or the adapter no adapter's.
        RuntimeMissing: transformers, or PEFT for an adapter, is not installed there.
        RuntimeFailed: it refused the model, crashed or took too long.
    """
    if not (request.model / "config.json").is_file():
        raise CheckpointError(
            "transformers reads a checkpoint folder", where=f"{request.model}/config.json"
        )
    if request.adapter is None:
        return serve(NAME, "_hf_worker.py", request, python, timeout=timeout, variables={})
    if not (request.adapter / "adapter_config.json").is_file():
        raise CheckpointError("PEFT reads an adapter's folder", where=str(request.adapter))
    return serve(ADAPTED, "_hf_worker.py", request, python, timeout=timeout, variables={})
