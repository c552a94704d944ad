"""Ask llama.cpp: its own server over a GGUF file, in the package xllamacpp."""

from pathlib import Path

from bake.checkpoints.gguf.file import open_gguf
from bake.errors import CheckpointError
from bake.verify.runtimes._exchange import serve
from bake.verify.runtimes.base import RuntimeRequest, RuntimeResult

NAME = "llama.cpp"
CONTROL_VECTORS = ("controlvector", "steeringvector")  # architectures of such files


def run(request: RuntimeRequest, python: Path, *, timeout: float = 900.0) -> RuntimeResult:
    """Return llama.cpp's log-probabilities and greedy tokens for a GGUF file.

    Every prompt position is a request of its own, which suits tens of positions, not thousands.

    Args:
        request: what to compute.
        python: the interpreter of the environment that xllamacpp is installed in.
        timeout: seconds until llama.cpp is killed.

    Raises:
        CheckpointError: the model or the adapter is no GGUF file.
        RuntimeMissing: xllamacpp is not installed there.
        RuntimeFailed: llama.cpp refused the model, crashed or took too long.
    """
    if not request.model.is_file():
        raise CheckpointError("llama.cpp reads a GGUF file", where=str(request.model))
    kind = None
    if request.adapter is not None:
        arch = open_gguf(request.adapter).arch
        kind = "control vector" if arch in CONTROL_VECTORS else "lora"
    return serve(
        NAME,
        "_llamacpp_worker.py",
        request,
        python,
        timeout=timeout,
        variables={},
        extra={"adapter_kind": kind},
    )
