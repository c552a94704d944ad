"""A quantised base, edited and written back in its format: vLLM loads it and computes its values.

vLLM's processor build has kernels for W4A16 among the formats that bake writes; they compute in
bfloat16, which the bound allows for.
"""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import recipe_text, run
from quantising import quantise

from bake.checkpoints import open_checkpoint
from bake.checkpoints.quantised.view import decoded
from bake.verify.models import load
from bake.verify.runtimes.exchange import ask
from bake.verify.runtimes.request import RuntimeRequest
from bake.verify.runtimes.vllm import VLLM

pytestmark = pytest.mark.runtimes

PROMPT = (3, 14, 15, 9, 26, 5)
_NEAR = 0.2
"""In nats: three blocks in bfloat16. An edit moves log-probabilities by several times as much."""
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": False,
    "mlp_bias": False,
}


def values(folder: Path) -> torch.Tensor:
    """Return the log-probabilities of what the files stand for, in float32."""
    model = load(decoded(open_checkpoint(folder)), torch.float32, hooked=False).model
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0]
    return torch.log_softmax(logits, dim=-1)


def test_vllm_computes_what_the_codes_stand_for(vllm_python: Path, tmp_path: Path) -> None:
    model = tiny.make_model("llama", dtype=torch.bfloat16, **_SIZES)
    tiny.write_checkpoint(model, tmp_path / "plain")
    base = quantise(tmp_path / "plain", tmp_path / "base", "W4A16", size=32)
    np.save(tmp_path / "mood.npy", np.random.default_rng(0).standard_normal(64))
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(recipe_text(base), encoding="utf-8")
    assert run("export", recipe, "--out", out, "--allow", "approximate").exit_code == 0
    request = RuntimeRequest(out, (PROMPT,), 1, model.config.vocab_size, "bfloat16")
    served = torch.tensor(ask(VLLM, request, vllm_python, timeout=600).prompt_logprobs[0])
    edited, unedited = values(out)[: len(served)], values(base)[: len(served)]
    assert float((served - edited).abs().max()) < _NEAR
    assert float((served - unedited).abs().max()) > 3 * _NEAR
