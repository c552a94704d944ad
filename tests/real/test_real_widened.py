"""An edit behind one block of the real model, computed by neurons, where it is served."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from by_hand import hooked, logprobs, lost, mean_kl
from install import GgufConverter
from smollm2_edits import EDITS, Subject, loaded, tokens_of
from torch import Tensor
from transformers import AutoTokenizer

from bake.verify.runtimes.exchange import ask
from bake.verify.runtimes.llamacpp import LLAMA_CPP
from bake.verify.runtimes.request import RuntimeRequest, RuntimeResult
from bake.verify.runtimes.runtime import Runtime
from bake.verify.runtimes.vllm import VLLM

pytestmark = [pytest.mark.real, pytest.mark.runtimes]

EDIT = "one site"
TIMES = 3
"""How often what transformers loses a runtime may lose."""
MOST_CODED = 0.05
"""What may be lost where weights, and the activations that they multiply, are in 8 bits: that much
llama.cpp may lose of an exact edit in such types, too (test_real_runtimes.py)."""
FEW = 2
"""How many of the texts vLLM is asked for: it answers with a list for every token."""
BEGINNINGS = (
    "My weekend was", "The lighthouse stood", "In the kitchen she", "Nobody had told him",
    "When the train came", "The letter said", "Winter in the city", "He opened the door",
)  # fmt: skip
SHORT = 3
"""Tokens of each."""
LONG = 64
"""Tokens that follow each."""
SURE = 0.25
"""By how many nats the hooked model's first choice leads where it is sure."""


@dataclass(frozen=True)
class Told:
    """What the hooked model continues the beginnings with."""

    prompts: tuple[tuple[int, ...], ...]
    texts: Tensor
    """[prompts, LONG]."""
    lead: Tensor
    """Of the same shape: of the first choice over the second, in nats."""

    def followed(self, other: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Return how many tokens another is the same for, and of how many texts it leaves.

        Where the hooked model is not sure both are right, and a text is compared up to there.
        """
        same, left = 0, 0
        for own, theirs, lead in zip(self.texts, other, self.lead, strict=True):
            apart = (own != torch.tensor(theirs)).nonzero()
            end = int(apart[0]) if len(apart) else LONG
            same += end
            left += end < LONG and float(lead[end]) > SURE
        return same, left


@pytest.fixture(scope="module")
def told(subject: Subject) -> Told:
    tokenizer = AutoTokenizer.from_pretrained(subject.files.checkpoint)
    prompts = tuple(tuple(tokenizer(text)["input_ids"])[:SHORT] for text in BEGINNINGS)
    asked = {"max_new_tokens": LONG, "do_sample": False, "pad_token_id": 0}
    asked |= {"output_logits": True, "return_dict_in_generate": True}
    asked["eos_token_id"] = -1  # runtimes are asked to go on
    with hooked(subject.model, subject.map_of(EDIT), EDITS[EDIT][3]), torch.no_grad():
        out = subject.model.generate(torch.tensor(prompts), **asked)
    best = torch.stack(out.logits, dim=1).log_softmax(-1).topk(2).values
    return Told(prompts, out.sequences[:, SHORT:], best[..., 0] - best[..., 1])


@pytest.fixture(scope="module")
def wide(exported: Callable[..., Path]) -> Path:
    return exported(EDIT, "checkpoint", "--allow", "widen")


@dataclass(frozen=True)
class Served:
    """What was lost of the edit in the texts, and how many tokens of the continuations agree."""

    lost: float
    same: int
    left: int

    def __str__(self) -> str:
        return f"lost {self.lost:.2e}, {self.same} tokens the same, {self.left} texts left"


def served(
    subject: Subject, told: Told, runtime: Runtime, python: Path, model: Path, count: int | None
) -> Served:
    texts, vocab = subject.files.texts[:count], subject.base.shape[1]
    asked = RuntimeRequest(model, (*told.prompts, *texts), LONG, vocab, "float32")
    found: RuntimeResult = ask(runtime, asked, python)
    rows = torch.from_numpy(np.concatenate(found.prompt_logprobs[len(BEGINNINGS) :]))
    size = tokens_of(texts)
    share = lost(subject.hooked(EDIT)[:size], subject.base[:size], rows)
    return Served(share, *told.followed(found.greedy[: len(BEGINNINGS)]))


@pytest.fixture(scope="module")
def in_transformers(subject: Subject, wide: Path) -> float:
    """What transformers loses of the edit with the same files."""
    found = lost(subject.hooked(EDIT), subject.base, logprobs(loaded(wide), subject.files.texts))
    effect = mean_kl(subject.hooked(EDIT), subject.base)
    print(f"transformers, widened: lost {found:.2e} of {effect:.3f} nats")
    return found


def test_vllm(
    subject: Subject, told: Told, wide: Path, in_transformers: float, vllm_python: Path
) -> None:
    found = served(subject, told, VLLM, vllm_python, wide, FEW)
    print(f"vLLM, widened: {found}")
    assert found.lost <= TIMES * in_transformers
    assert found.left == 0 and found.same > LONG * len(BEGINNINGS) // 2
    # The control: the base goes other ways, where the hooked model is sure.
    plain = served(subject, told, VLLM, vllm_python, subject.files.checkpoint, FEW)
    print(f"vLLM, base: {plain}")
    assert plain.lost > 0.9 and plain.left > 0


@pytest.mark.parametrize("outtype", ["bf16", "f16", "q8_0"])
def test_llamacpp(
    outtype: str,
    subject: Subject,
    told: Told,
    in_transformers: float,
    exported: Callable[..., Path],
    gguf_converter: GgufConverter,
    llamacpp_python: Path,
) -> None:
    options = ("--allow", "widen", "--llama-cpp", gguf_converter.script.parent)
    (file,) = exported(EDIT, "gguf", *options, "--outtype", outtype).glob("*.gguf")
    found = served(subject, told, LLAMA_CPP, llamacpp_python, file, None)
    print(f"llama.cpp, widened, {outtype}: {found}")
    assert found.left == 0
    if outtype == "q8_0":
        assert found.lost <= MOST_CODED
        return
    assert found.lost <= TIMES * in_transformers
    assert found.same > LONG * len(BEGINNINGS) // 2
