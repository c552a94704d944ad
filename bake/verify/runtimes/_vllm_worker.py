"""Run inside vLLM's own environment, as a script: `python -I _vllm_worker.py request.json out/`.

It imports nothing of bake, which that environment need not have. `-I` keeps this folder off the
import path, where a sibling file is called vllm.py.
"""

import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def main(request_path: Path, out: Path) -> None:
    """Serve the request and write `out/logprobs.npz`, then `out/result.json`."""
    import vllm

    request = json.loads(request_path.read_text(encoding="utf-8"))
    engine = start(vllm, request)
    served = engine.llm_engine.model_config.get_vocab_size()
    if served != request["vocab_size"]:
        raise SystemExit(f"the model has {served} tokens, not {request['vocab_size']}")
    generate = generator(engine, request)
    # subtle: with an adapter vLLM wraps the head, and its wrapper (lora/layers/logits_processor.py)
    # knows the requests of a step, not the positions of a prompt: prompt_logprobs crashes there.
    table = prompt_logprobs if request["adapter"] is None else prefix_logprobs
    rows = table(vllm, generate, request["prompts"], request["vocab_size"])
    greedy = greedy_tokens(vllm, generate, request["prompts"], request["max_new_tokens"])
    arrays: dict[str, Any] = {f"prompt_{i}": row for i, row in enumerate(rows)}
    if request["unadapted"]:
        # The engine is the same one: what a request does not name is not applied to it.
        asked = request["prompts"][: request["unadapted"]]
        bare = table(
            vllm, generator(engine, {**request, "adapter": None}), asked, request["vocab_size"]
        )
        arrays |= {f"unadapted_{i}": row for i, row in enumerate(bare)}
    np.savez(out / "logprobs.npz", **arrays)
    result = {"version": vllm.__version__, "greedy": greedy, "environment": environment()}
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")


def start(vllm: Any, request: dict[str, Any]) -> Any:
    """Return the engine: eager, in this process, reusing no earlier work."""
    longest = max(len(prompt) for prompt in request["prompts"])
    adapter = {}
    if request["adapter"] is not None:
        adapter = {"enable_lora": True, "max_lora_rank": request["adapter_rank"], "max_loras": 1}
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
        **adapter,
    )


def generator(engine: Any, request: dict[str, Any]) -> Callable[..., Any]:
    """Return what generates from token ids, with the adapter where there is one."""
    adapter = None
    if request["adapter"] is not None:
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest("adapter", 1, request["adapter"])

    def generate(prompts: list[list[int]], sampling: Any) -> Any:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return engine.generate(inputs, sampling, use_tqdm=False, lora_request=adapter)

    return generate


def greedily(vllm: Any, count: int, **more: Any) -> Any:
    """Return how to sample: the most likely token, also after the end of a text."""
    return vllm.SamplingParams(
        temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False, **more
    )


def prompt_logprobs(
    vllm: Any, generate: Callable[..., Any], prompts: list[list[int]], vocab_size: int
) -> list[npt.NDArray[np.float32]]:
    """Return per prompt [tokens, vocab]: row t is log p(next token | the first t + 1 tokens)."""
    whole = {"prompt_logprobs": -1, "logprobs": -1, "flat_logprobs": True}
    outputs = generate(prompts, greedily(vllm, 1, **whole))
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


def prefix_logprobs(
    vllm: Any, generate: Callable[..., Any], prompts: list[list[int]], vocab_size: int
) -> list[npt.NDArray[np.float32]]:
    """Return the same tables from a request for every position: one token after each prefix."""
    sampling = greedily(vllm, 1, logprobs=-1, flat_logprobs=True)
    tables = []
    for prompt in prompts:
        outputs = generate([prompt[:t] for t in range(1, len(prompt) + 1)], sampling)
        table = np.full((len(prompt), vocab_size), np.nan, dtype=np.float32)
        for row, output in zip(table, outputs, strict=True):
            fill(row, output.outputs[0].logprobs, 0)
        tables.append(table)
    return tables


def fill(row: npt.NDArray[np.float32], flat: Any, position: int) -> None:
    """Write one position of vLLM's flat (token, log-probability) lists into a vocabulary row."""
    part = slice(flat.start_indices[position], flat.end_indices[position])
    row[flat.token_ids[part]] = flat.logprobs[part]


def greedy_tokens(
    vllm: Any, generate: Callable[..., Any], prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """Return the arg-max continuation of every prompt; an end-of-text token does not end it."""
    outputs = generate(prompts, greedily(vllm, max_new_tokens))
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
    main(Path(sys.argv[1]), Path(sys.argv[2]))
