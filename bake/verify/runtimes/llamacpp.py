"""Ask llama.cpp: its own server over a GGUF file, in the package xllamacpp."""

from pathlib import Path

from bake.errors import CheckpointError
from bake.verify.runtimes._exchange import serve
from bake.verify.runtimes.base import RuntimeRequest, RuntimeResult

NAME = "llama.cpp"


def run(request: RuntimeRequest, python: Path, *, timeout: float = 900.0) -> RuntimeResult:
    """Return llama.cpp's log-probabilities and greedy tokens for a GGUF file.

    Every prompt position is a request of its own, which suits tens of positions, not thousands.

    Args:
        request: what to compute.
        python: the interpreter of the environment that xllamacpp is installed in.
        timeout: seconds until llama.cpp is killed.

    Raises:
        CheckpointError: the model is no file.
        RuntimeMissing: xllamacpp is not installed there.
        RuntimeFailed: llama.cpp refused the model, crashed or took too long.
    """
    if not request.model.is_file():
        raise CheckpointError("llama.cpp reads a GGUF file", where=str(request.model))
    return serve(NAME, "_llamacpp_worker.py", request, python, timeout=timeout, variables={})
