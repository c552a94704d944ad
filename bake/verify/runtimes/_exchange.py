"""The request and the result as files between two processes: JSON and an .npz, never a pickle."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bake.process import run_script
from bake.verify.runtimes.base import RuntimeFailed, RuntimeRequest, RuntimeResult


def serve(
    name: str,
    worker: str,
    request: RuntimeRequest,
    python: Path,
    *,
    timeout: float,
    variables: Mapping[str, str],
    extra: Mapping[str, Any] | None = None,
) -> RuntimeResult:
    """Return what the worker script beside this file computed with that interpreter.

    ``extra`` goes into the request as it is: what only this worker understands.

    Raises:
        RuntimeMissing, RuntimeFailed: as `run_script`; also RuntimeFailed when the answer does not
            fit the request or a log-probability is not finite.
    """
    script = Path(__file__).resolve().with_name(worker)
    with tempfile.TemporaryDirectory(prefix="bake-") as scratch:
        folder = Path(scratch)
        question = folder / "request.json"
        question.write_text(json.dumps({**as_json(request), **(extra or {})}), encoding="utf-8")
        # -I keeps the script's own folder off the import path: it has a module called vllm.
        run_script(
            name,
            python,
            ["-I", script, question, folder],
            folder=folder,
            timeout=timeout,
            variables=variables,
        )
        return read(name, request, folder)


def as_json(request: RuntimeRequest) -> dict[str, Any]:
    """Return the request as the worker reads it, the model's path made absolute."""
    return {
        "model": str(request.model.resolve()),
        "prompts": request.prompts,
        "max_new_tokens": request.max_new_tokens,
        "vocab_size": request.vocab_size,
        "dtype": request.dtype,
        "adapter": None if request.adapter is None else str(request.adapter.resolve()),
        "unadapted": request.unadapted,
    }


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
