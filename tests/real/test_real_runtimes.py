"""What vLLM and llama.cpp compute with the files, against hooks written by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from by_hand import lost, mean_kl
from smollm2_edits import Subject, tokens_of
from torch import Tensor

from bake.verify.runtimes.exchange import ask
from bake.verify.runtimes.llamacpp import LLAMA_CPP
from bake.verify.runtimes.request import RuntimeRequest
from bake.verify.runtimes.runtime import Runtime
from bake.verify.runtimes.vllm import VLLM

pytestmark = pytest.mark.real

MOST = 0.01
"""Of the effect: what bfloat16 may cost, in a runtime that computes in float32."""
MOST_WIDE = 0.05
"""The same where the other tensors are in 4 bits, and activations in 8 bits are multiplied."""
FLOORS = 3
"""How often what llama.cpp differs by on the base's own file may be lost."""
FEW = 1
"""How many of the texts vLLM is asked for: it fills a list of the whole vocabulary, value by value,
for every token, which takes longer than all else."""


def served(
    subject: Subject,
    runtime: Runtime,
    python: Path,
    model: Path,
    adapter: Path | None = None,
    count: int | None = None,
) -> Tensor:
    """Return what a runtime says of the first texts: [tokens, vocab]."""
    vocab = subject.base.shape[1]
    asked = RuntimeRequest(model, subject.files.texts[:count], 1, vocab, "float32", adapter)
    return torch.from_numpy(np.concatenate(ask(runtime, asked, python).prompt_logprobs))


@pytest.mark.parametrize("carrier", ["checkpoint", "lora"])
def test_vllm(
    carrier: str, subject: Subject, exported: Callable[..., Path], vllm_python: Path
) -> None:
    out = exported("ablation", carrier)
    files = (out, None) if carrier == "checkpoint" else (subject.files.checkpoint, out)
    few = tokens_of(subject.files.texts[:FEW])
    hooked, base = subject.hooked("ablation")[:few], subject.base[:few]
    found = lost(hooked, base, served(subject, VLLM, vllm_python, *files, count=FEW))
    print(f"vLLM, {carrier}: lost {found:.2e}")
    assert found <= MOST


@pytest.fixture(scope="module")
def plain(subject: Subject, llamacpp_python: Path) -> Tensor:
    """What llama.cpp makes of the base's own file."""
    answer = served(subject, LLAMA_CPP, llamacpp_python, subject.files.gguf)
    # It is the same model: far nearer to transformers' than any edit.
    assert mean_kl(subject.base, answer) < 0.02 * subject.effect("ablation")
    return answer


def test_llamacpp_serves_edited_tensors_of_a_wider_type(
    subject: Subject,
    plain: Tensor,
    exported: Callable[..., Path],
    llamacpp_python: Path,
) -> None:
    options = ("--gguf", subject.files.gguf, "--gguf-type", "Q8_0")
    file = exported("ablation", "gguf", *options) / subject.files.gguf.name
    hooked = subject.hooked("ablation")
    found = lost(hooked, subject.base, served(subject, LLAMA_CPP, llamacpp_python, file))
    floor = mean_kl(subject.base, plain) / subject.effect("ablation")
    print(f"llama.cpp, Q8_0: lost {found:.2e}, the runtime's own {floor:.2e}")
    assert found <= min(MOST_WIDE, FLOORS * floor)
    # The control: the base's own file has none of it.
    assert lost(hooked, subject.base, plain) > 0.9


def test_llamacpp_serves_a_control_vector(
    subject: Subject, plain: Tensor, exported: Callable[..., Path], llamacpp_python: Path
) -> None:
    vector = exported("offset", "control-vector") / "control-vector.gguf"
    answer = served(subject, LLAMA_CPP, llamacpp_python, subject.files.gguf, vector)
    hooked = subject.hooked("offset")
    found = lost(hooked, subject.base, answer)
    floor = mean_kl(subject.base, plain) / subject.effect("offset")
    print(f"llama.cpp, control vector: lost {found:.2e}, the runtime's own {floor:.2e}")
    assert found <= min(MOST_WIDE, FLOORS * floor)
    assert lost(hooked, subject.base, plain) > 0.9
