"""Transformers, vLLM and llama.cpp compute the same function of a checkpoint with every bias."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from install import GgufConverter
from reference import Reference, first_disagreement, largest_difference, reference_logprobs
from tiny_checkpoints import EOS, HIDDEN, LAYERS, VOCAB, exchange_tokens, tiny_llama, tiny_qwen3
from tiny_checkpoints import write as write_checkpoint
from transformers import PreTrainedModel

from bake.converter import convert
from bake.process import RuntimeFailed
from bake.verify.runtimes.exchange import ask
from bake.verify.runtimes.llamacpp import LLAMA_CPP
from bake.verify.runtimes.request import RuntimeRequest, RuntimeResult
from bake.verify.runtimes.vllm import VLLM

pytestmark = pytest.mark.runtimes

# float32's epsilon × dot products in a row (two branches per layer) × terms of each: 9.2e-5.
TOLERANCE = torch.finfo(torch.float32).eps * 2 * LAYERS * HIDDEN
# What the smallest change in these tests has to move, so that the tolerance can tell it.
VISIBLE = 100 * TOLERANCE
NEW_TOKENS = 64

Serve = Callable[[Path], RuntimeResult]


def prompts() -> tuple[tuple[int, ...], ...]:
    """Eight prompts of 1 to 16 tokens, the first of them the beginning-of-text token."""
    chance = random.Random(1)
    lengths = (0, 1, 3, 5, 7, 9, 12, 15)
    return tuple((1, *chance.choices(range(EOS + 1, VOCAB), k=k)) for k in lengths)


PROMPTS = prompts()


def request_for(model: Path, dtype: str = "float32") -> RuntimeRequest:
    return RuntimeRequest(model, PROMPTS, NEW_TOKENS, VOCAB, dtype)


def reference_of(model: PreTrainedModel) -> Reference:
    return reference_logprobs(model, PROMPTS, NEW_TOKENS)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """A Llama whose most frequent greedy token is the end-of-text token, which must not end it."""
    model = tiny_llama(seed=3)
    frequent, _ = Counter(sum(reference_of(model).greedy, ())).most_common(1)[0]
    exchange_tokens(model, frequent, EOS)
    return model


@pytest.fixture(scope="module")
def broken_llama(llama: PreTrainedModel) -> PreTrainedModel:
    """The same Llama with one bias zeroed."""
    model = tiny_llama(seed=3)
    model.load_state_dict(llama.state_dict())
    torch.nn.init.zeros_(model.get_parameter("model.layers.1.mlp.down_proj.bias"))
    return model


@pytest.fixture(scope="module")
def reference(llama: PreTrainedModel) -> Reference:
    return reference_of(llama)


@pytest.fixture(scope="module", params=["vLLM", "llama.cpp"])
def serve(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Serve a checkpoint folder in the runtime, through the converter where it wants a GGUF."""
    if request.param == "vLLM":
        python: Path = request.getfixturevalue("vllm_python")
        return lambda folder: ask(VLLM, request_for(folder), python)
    python = request.getfixturevalue("llamacpp_python")
    converter: GgufConverter = request.getfixturevalue("gguf_converter")
    out = tmp_path_factory.mktemp("gguf")

    def convert_and_run(folder: Path) -> RuntimeResult:
        gguf = out / f"{folder.name}.gguf"
        convert(folder, gguf, converter=converter.script, python=converter.python)
        return ask(LLAMA_CPP, request_for(gguf), python)

    return convert_and_run


@pytest.fixture(scope="module")
def served(
    serve: Serve, llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> RuntimeResult:
    return serve(write_checkpoint(llama, tmp_path_factory.mktemp("llama")))


def test_log_probabilities_agree_with_transformers(
    served: RuntimeResult, reference: Reference
) -> None:
    assert largest_difference(reference, served) <= TOLERANCE
    # The effect: a different model is far away, so agreement says something.
    assert largest_difference(reference_of(tiny_llama(seed=4)), served) > 1


def test_greedy_tokens_agree_with_transformers(
    served: RuntimeResult, reference: Reference, broken_llama: PreTrainedModel
) -> None:
    assert first_disagreement(reference, served, TOLERANCE) is None
    # No choice of this model is so close that the comparison could have passed it over, the text
    # is not one token repeated, and it goes on behind the end-of-text token.
    assert min(map(min, reference.margins)) > 2 * TOLERANCE
    assert all(len(set(tokens)) > 16 for tokens in served.greedy)
    assert any(EOS in tokens[:-1] for tokens in served.greedy)
    assert first_disagreement(reference_of(broken_llama), served, TOLERANCE) is not None


def test_a_zeroed_bias_is_seen(
    serve: Serve, reference: Reference, broken_llama: PreTrainedModel, tmp_path: Path
) -> None:
    result = serve(write_checkpoint(broken_llama, tmp_path / "broken"))
    assert largest_difference(reference_of(broken_llama), result) <= TOLERANCE
    assert largest_difference(reference, result) > VISIBLE
    assert first_disagreement(reference, result, TOLERANCE) is not None


def test_result_says_what_served(served: RuntimeResult) -> None:
    assert served.name in ("vLLM", "llama.cpp")
    assert served.version[0].isdigit()
    assert served.environment["python"].startswith("3.")


def test_a_half_precision_cache_is_seen(
    llama: PreTrainedModel,
    reference: Reference,
    llamacpp_python: Path,
    gguf_converter: GgufConverter,
    tmp_path: Path,
) -> None:
    """The request's dtype reaches llama.cpp's K/V cache, and costs what half precision costs."""
    gguf = tmp_path / "llama.gguf"
    folder = write_checkpoint(llama, tmp_path / "llama")
    convert(folder, gguf, converter=gguf_converter.script, python=gguf_converter.python)
    result = ask(LLAMA_CPP, request_for(gguf, "float16"), llamacpp_python)
    difference = largest_difference(reference, result)
    assert TOLERANCE < difference < TOLERANCE * 2**13  # float16 has 13 bits less than float32


@pytest.fixture(scope="module")
def qwen3() -> PreTrainedModel:
    """A Qwen3 with a bias in o_proj, which transformers honours."""
    return tiny_qwen3(seed=5)


def test_vllm_loses_the_output_bias_of_qwen3(
    qwen3: PreTrainedModel, vllm_python: Path, tmp_path: Path
) -> None:
    """Why bake refuses this bias: vLLM drops it and says nothing."""
    result = ask(VLLM, request_for(write_checkpoint(qwen3, tmp_path / "qwen3")), vllm_python)
    assert largest_difference(reference_of(qwen3), result) > VISIBLE
    for layer in qwen3.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
    assert largest_difference(reference_of(qwen3), result) <= TOLERANCE


def test_llamacpp_refuses_the_output_bias_of_qwen3(
    llamacpp_python: Path, gguf_converter: GgufConverter, tmp_path: Path
) -> None:
    """The converter lets the bias pass; the loader counts one tensor too many per layer."""
    folder = write_checkpoint(tiny_qwen3(seed=5), tmp_path / "qwen3")
    gguf = tmp_path / "qwen3.gguf"
    convert(folder, gguf, converter=gguf_converter.script, python=gguf_converter.python)
    with pytest.raises(RuntimeFailed, match="wrong number of tensors") as failure:
        ask(LLAMA_CPP, request_for(gguf), llamacpp_python)
    assert "llama.cpp failed with " in str(failure.value)
