"""The main job, end to end: the baked quickstart in vLLM and llama.cpp equals hooks."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from install import GgufConverter
from reference import Reference, largest_difference, reference_logprobs
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bake.checkpoints import open_checkpoint
from bake.converter import convert
from bake.steer import steered
from bake.verify.artifact import open_baked
from bake.verify.models import layout_of
from bake.verify.runtimes.exchange import ask
from bake.verify.runtimes.llamacpp import LLAMA_CPP
from bake.verify.runtimes.request import RuntimeRequest, RuntimeResult
from bake.verify.runtimes.vllm import VLLM

pytestmark = pytest.mark.runtimes

RECIPES = Path(__file__).parents[2] / "recipes"
TOLERANCE = 1e-4  # nats, in float32: what the project promises
NEW_TOKENS = 64


@dataclass(frozen=True)
class Main:
    """The baked quickstart, and what hooks on the base model compute."""

    out: Path
    prompts: tuple[tuple[int, ...], ...]
    vocab: int
    hooked: Reference
    base: Reference

    def request(self, model: Path) -> RuntimeRequest:
        return RuntimeRequest(model, self.prompts, NEW_TOKENS, self.vocab, "float32")


@pytest.fixture(scope="module", params=["quickstart.toml", "quickstart-offset.toml"])
def main(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Main:
    """Bake as a user does, and steer the base model by hooks."""
    out = tmp_path_factory.mktemp("main") / "out"
    command = [sys.executable, "-m", "bake", "export", str(RECIPES / request.param)]
    subprocess.run([*command, "--out", str(out), "-q"], check=True)
    folder = RECIPES / "quickstart" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = (RECIPES / "quickstart" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    prompts = tuple(tuple(tokenizer(text).input_ids) for text in texts)
    assert len(prompts) == 8
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    checkpoint = open_checkpoint(folder)
    base = reference_logprobs(model, prompts, NEW_TOKENS)
    with steered(model, layout_of(checkpoint), open_baked(out).edits):
        hooked = reference_logprobs(model, prompts, NEW_TOKENS)
    return Main(out, prompts, int(checkpoint.config["vocab_size"]), hooked, base)


@pytest.fixture(scope="module", params=["vLLM", "llama.cpp"])
def served(
    request: pytest.FixtureRequest, main: Main, tmp_path_factory: pytest.TempPathFactory
) -> RuntimeResult:
    if request.param == "vLLM":
        return ask(VLLM, main.request(main.out), request.getfixturevalue("vllm_python"))
    converter: GgufConverter = request.getfixturevalue("gguf_converter")
    gguf = tmp_path_factory.mktemp("gguf") / "quickstart.gguf"
    convert(main.out, gguf, converter=converter.script, python=converter.python)
    return ask(LLAMA_CPP, main.request(gguf), request.getfixturevalue("llamacpp_python"))


def test_baked_model_in_the_runtime_equals_the_hooked_base(
    main: Main, served: RuntimeResult
) -> None:
    difference = largest_difference(main.hooked, served)
    print(f"{served.name}: max |Δ log p| = {difference:.2e} nats")
    assert difference <= TOLERANCE
    # The effect: the base model is far away.
    assert largest_difference(main.base, served) > 0.5


def test_greedy_tokens_equal_those_of_the_hooked_base(main: Main, served: RuntimeResult) -> None:
    assert all(len(tokens) == NEW_TOKENS for tokens in served.greedy)
    assert served.greedy == main.hooked.greedy
    assert served.greedy != main.base.greedy
