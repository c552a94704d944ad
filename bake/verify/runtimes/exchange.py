"""The request and the result as files between two processes: JSON and an .npz, never a pickle."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bake.errors import CheckpointError
from bake.process import RuntimeFailed, find, run_script
from bake.verify.runtimes.request import RuntimeRequest, RuntimeResult
from bake.verify.runtimes.runtime import Runtime


def ask(
    runtime: Runtime, request: RuntimeRequest, python: Path, *, timeout: float = 900.0
) -> RuntimeResult:
    """Return a runtime's log-probabilities and greedy tokens.

    Args:
        runtime: which one.
        request: what to compute.
        python: the interpreter of the environment that it is installed in.
        timeout: seconds until it is killed.

    Raises:
        CheckpointError: the model or the adapter is nothing that it reads.
        RuntimeMissing: it is not installed there.
        RuntimeFailed: it refused the model, crashed, took too long, or its answer does not fit the
            request.
    """
    _check_model(runtime, request.model)
    asked = {**as_json(request), **runtime.details(request)}
    find(runtime.title, python, runtime.packages)
    script = Path(__file__).resolve().with_name(runtime.worker)
    with tempfile.TemporaryDirectory(prefix="bake-") as scratch:
        folder = Path(scratch)
        question = folder / "request.json"
        question.write_text(json.dumps(asked), encoding="utf-8")
        # -I keeps the script's own folder off the import path: it has a module called vllm.
        run_script(
            runtime.title,
            python,
            ["-I", script, question, folder],
            folder=folder,
            timeout=timeout,
            variables=runtime.variables,
        )
        return read(runtime.title, request, folder)


def _check_model(runtime: Runtime, model: Path) -> None:
    if runtime.gguf and not model.is_file():
        raise CheckpointError(f"{runtime.title} reads a GGUF file", where=str(model))
    config = model / "config.json"
    if not runtime.gguf and not config.is_file():
        raise CheckpointError(f"{runtime.title} reads a checkpoint folder", where=str(config))


def as_json(request: RuntimeRequest) -> dict[str, Any]:
    """Return the request as the worker reads it, the model's path made absolute."""
    adapter = None if request.adapter is None else str(request.adapter.resolve())
    return {**asdict(request), "model": str(request.model.resolve()), "adapter": adapter}


def read(name: str, request: RuntimeRequest, folder: Path) -> RuntimeResult:
    """Return the result in the folder, once it is seen to answer this request."""
    answer = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    with np.load(folder / "logprobs.npz", allow_pickle=False) as arrays:
        tables = tuple(arrays[f"prompt_{i}"] for i in range(len(request.prompts)))
        bare = tuple(arrays[f"unadapted_{i}"] for i in range(request.unadapted))
    asked = (*request.prompts, *request.prompts[: request.unadapted])
    for prompt, table in zip(asked, (*tables, *bare), strict=True):
        if table.shape != (len(prompt), request.vocab_size):
            raise RuntimeFailed(f"{name} gave log-probabilities of shape {table.shape}")
        if not np.isfinite(table).all():
            raise RuntimeFailed(
                f"{name} gave log-probabilities that are not finite",
                why="a weight or a bias that the runtime never filled does that",
            )
    greedy = tuple(tuple(tokens) for tokens in answer["greedy"])
    if [len(tokens) for tokens in greedy] != [request.max_new_tokens] * len(request.prompts):
        raise RuntimeFailed(f"{name} generated {[len(tokens) for tokens in greedy]} tokens")
    return RuntimeResult(name, answer["version"], tables, greedy, answer["environment"], bare)
