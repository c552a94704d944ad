"""Run inside vLLM's own environment, as a script: `python -I _vllm_worker.py request.json out/`.

It imports nothing of bake, which that environment need not have. `-I` keeps this folder off the
import path, where a sibling file is called vllm.py.
"""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

EXIT_MISSING = 90  # the exit status by which the parent tells "not installed" from "failed"


def main(request_path: Path, out: Path) -> int:
    """Serve the request and write `out/logprobs.npz`, then `out/result.json`."""
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        print(error, file=sys.stderr)
        return EXIT_MISSING
    request = json.loads(request_path.read_text(encoding="utf-8"))
    engine = start(vllm, request)
    served = engine.llm_engine.model_config.get_vocab_size()
    if served != request["vocab_size"]:
        raise SystemExit(f"the model has {served} tokens, not {request['vocab_size']}")
    rows = prompt_logprobs(vllm, engine, request["prompts"], request["vocab_size"])
    greedy = greedy_tokens(vllm, engine, request["prompts"], request["max_new_tokens"])
    arrays: dict[str, Any] = {f"prompt_{i}": row for i, row in enumerate(rows)}
    np.savez(out / "logprobs.npz", **arrays)
    result = {"version": vllm.__version__, "greedy": greedy, "environment": environment()}
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


def start(vllm: Any, request: dict[str, Any]) -> Any:
    """Return the engine: eager, in this process, reusing no earlier work."""
    longest = max(len(prompt) for prompt in request["prompts"])
    return vllm.LLM(
        request["model"],
        dtype=request["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1024**3,
        max_model_len=longest + request["max_new_tokens"],
        max_logprobs=request["vocab_size"],
        logprobs_mode="raw_logprobs",
        seed=0,
    )


def prompt_logprobs(
    vllm: Any, engine: Any, prompts: list[list[int]], vocab_size: int
) -> list[npt.NDArray[np.float32]]:
    """Return per prompt [tokens, vocab]: row t is log p(next token | the first t + 1 tokens)."""
    sampling = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=1,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=-1,
        logprobs=-1,
        flat_logprobs=True,
    )
    outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    tables = []
    for prompt, output in zip(prompts, outputs, strict=True):
        table = np.full((len(prompt), vocab_size), np.nan, dtype=np.float32)
        # Position 0 of the prompt's list is empty, since nothing predicts the first token. What
        # follows the whole prompt is the first generated token's row.
        for t in range(1, len(prompt)):
            fill(table[t - 1], output.prompt_logprobs, t)
        fill(table[-1], output.outputs[0].logprobs, 0)
        tables.append(table)
    return tables


def fill(row: npt.NDArray[np.float32], flat: Any, position: int) -> None:
    """Write one position of vLLM's flat (token, log-probability) lists into a vocabulary row."""
    part = slice(flat.start_indices[position], flat.end_indices[position])
    row[flat.token_ids[part]] = flat.logprobs[part]


def greedy_tokens(
    vllm: Any, engine: Any, prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """Return the arg-max continuation of every prompt; an end-of-text token does not end it."""
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=max_new_tokens, ignore_eos=True, detokenize=False
    )
    outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def environment() -> dict[str, str]:
    """Return versions that a report states beside the numbers."""
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
