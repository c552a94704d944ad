"""Run in vLLM's environment: one engine, several adapters, each with a folder for its answer.

    python -I vllm_adapters.py WORKER request.json OUT

WORKER is bake's own `_vllm_worker.py`, whose functions do the work: what differs is that the engine
starts once. The request has `adapters`, a folder by name, and `adapter_rank`, the largest rank; and
`engine`, further arguments of the engine.
"""

import functools
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np


def main(worker_path: Path, request_path: Path, out: Path) -> None:
    """Write `OUT/<name>/logprobs.npz` and `OUT/<name>/result.json` for every adapter."""
    spec = importlib.util.spec_from_file_location("worker", worker_path)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    import vllm
    from vllm.lora.request import LoRARequest

    request = json.loads(request_path.read_text(encoding="utf-8"))
    given = {"LLM": functools.partial(vllm.LLM, **request["engine"])}
    engine = worker.start(SimpleNamespace(**given), request)
    for number, (name, folder) in enumerate(sorted(request["adapters"].items()), start=1):
        adapter = None if folder is None else LoRARequest(name, number, folder)

        def generate(prompts, sampling, adapter=adapter):
            inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
            return engine.generate(inputs, sampling, use_tqdm=False, lora_request=adapter)

        rows = worker.prefix_logprobs(vllm, generate, request["prompts"], request["vocab_size"])
        greedy = worker.greedy_tokens(vllm, generate, request["prompts"], request["max_new_tokens"])
        (out / name).mkdir()
        np.savez(out / name / "logprobs.npz", **{f"prompt_{i}": r for i, r in enumerate(rows)})
        result = {"version": vllm.__version__, "greedy": greedy, "environment": {}}
        (out / name / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
