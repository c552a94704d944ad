"""Run inside another environment: `python -I _hf_worker.py request.json out/`.

It loads the checkpoint, and the adapter where there is one, as any user of transformers and PEFT
does. It imports nothing of bake, which that environment need not have.
"""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(request_path: Path, out: Path) -> None:
    """Serve the request and write `out/logprobs.npz`, then `out/result.json`."""
    import torch
    import transformers

    request = json.loads(request_path.read_text(encoding="utf-8"))
    dtype = getattr(torch, request["dtype"])
    config = transformers.AutoConfig.from_pretrained(request["model"])
    # The class that the files name: of some wrappers AutoModelForCausalLM leaves out the towers.
    named = getattr(transformers, (config.architectures or ("",))[0], None)
    loader: Any = named or transformers.AutoModelForCausalLM
    model: Any = loader.from_pretrained(request["model"], dtype=dtype)
    served = transformers
    if request.get("adapter"):
        import peft

        model = peft.PeftModel.from_pretrained(model, request["adapter"])
        served = peft
    model.eval()
    arrays: dict[str, Any] = {}
    greedy: list[list[int]] = []
    with torch.no_grad():
        for index, prompt in enumerate(request["prompts"]):
            table = logprobs(torch, model, prompt)
            if table.shape[1] != request["vocab_size"]:
                raise SystemExit(f"the model has {table.shape[1]} tokens")
            arrays[f"prompt_{index}"] = table
            if index < request["unadapted"]:
                with model.disable_adapter():
                    arrays[f"unadapted_{index}"] = logprobs(torch, model, prompt)
            greedy.append(continued(torch, model, prompt, request["max_new_tokens"]))
    np.savez(out / "logprobs.npz", **arrays)
    result = {
        "version": served.__version__,
        "greedy": greedy,
        "environment": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")


def logprobs(torch: Any, model: Any, prompt: list[int]) -> Any:
    """Return [tokens, vocab]: row t is log p(next token | the first t + 1 tokens)."""
    logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1).numpy()


def continued(torch: Any, model: Any, prompt: list[int], count: int) -> list[int]:
    """Return the greedy continuation, with the cache that a user's generation has."""
    made: list[int] = []
    tokens, cache = torch.tensor([prompt]), None
    for _ in range(count):
        answer = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        made.append(int(answer.logits[0, -1].argmax()))
        tokens = torch.tensor([[made[-1]]])
    return made


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
