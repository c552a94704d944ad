"""What the runtimes do with adapters that bake refuses for them, and why it does."""

from collections.abc import Callable
from pathlib import Path

import pytest
from exporting import written
from install import GgufConverter
from reference import largest_difference
from subject import (
    BROKEN,
    STREAM,
    TOLERANCE,
    Z,
    direction,
    request,
    served_adapters,
    subject_at,
)
from tiny_checkpoints import converted, plain_llama, tiny_gemma2, tiny_gemma3, tiny_gpt2
from transformers import PreTrainedModel

from bake.affine import translation
from bake.errors import InexactPlan
from bake.process import RuntimeFailed
from bake.verify.runtimes.exchange import ask
from bake.verify.runtimes.llamacpp import LLAMA_CPP
from bake.verify.runtimes.vllm import VLLM

pytestmark = pytest.mark.runtimes

EMBEDDING = [("offset", translation(3 * direction()), "embed")]


def test_an_embedding_adapter_of_a_tied_model_in_llamacpp(
    llamacpp_python: Path, gguf_converter: GgufConverter, tmp_path: Path
) -> None:
    """It kills the tied file, and is exact over the copy that is written beside it."""
    base = subject_at(plain_llama(tied=True), tmp_path / "model")
    tied = converted(base.model, base.checkpoint.path, gguf_converter)
    out = written("gguf-lora", base.plan(STREAM), base.checkpoint, tmp_path / "out", gguf=tied).path
    adapter = out / "lora.gguf"
    base.check(STREAM, ask(LLAMA_CPP, request(out / "base.gguf", adapter), llamacpp_python))
    # The controls: the copy by itself is the base, and the tied file kills the process.
    bare = ask(LLAMA_CPP, request(out / "base.gguf"), llamacpp_python)
    assert largest_difference(base.plain, bare) <= TOLERANCE
    base.misses(STREAM, bare)
    with pytest.raises(RuntimeFailed, match="signal SIGABRT"):
        ask(LLAMA_CPP, request(tied, adapter), llamacpp_python)


def test_llamacpp_multiplies_the_rows_of_an_embedding_adapter(
    llamacpp_python: Path, gguf_converter: GgufConverter, tmp_path: Path
) -> None:
    """Gemma's embedding is scaled by the root of its width, and so is what an adapter adds."""
    base = subject_at(tiny_gemma3(tied=False), tmp_path / "model")
    file = converted(base.model, base.checkpoint.path, gguf_converter)
    plan = base.plan(EMBEDDING, targets=("llama.cpp",))
    adapter = written("gguf-lora", plan, base.checkpoint, tmp_path / "out").path
    base.check(EMBEDDING, ask(LLAMA_CPP, request(file, adapter / "lora.gguf"), llamacpp_python))


VLLM_REFUSES: dict[str, tuple[Callable[[], PreTrainedModel], list, str, str]] = {
    "Gemma 2's embedding": (
        tiny_gemma2,
        EMBEDDING,
        "no adapter of the embedding in Gemma2ForCausalLM",
        "expected target modules in",
    ),
    "Gemma 3's embedding": (
        tiny_gemma3,
        EMBEDDING,
        "no adapter of the embedding in Gemma3ForCausalLM",
        "expected target modules in",
    ),
    "GPT-2": (tiny_gpt2, Z, "no adapters for GPT2LMHeadModel", "does not support LoRA"),
}


@pytest.mark.parametrize("case", VLLM_REFUSES)
def test_vllm_refuses_what_the_plan_refuses(case: str, vllm_python: Path, tmp_path: Path) -> None:
    """PEFT takes each of these adapters."""
    make, specs, planned, served = VLLM_REFUSES[case]
    base = subject_at(make(), tmp_path / "model")
    wanted = base.plan(specs, targets=("transformers", "vllm"))
    with pytest.raises(InexactPlan, match=planned):
        written("lora", wanted, base.checkpoint, tmp_path / "none")
    adapter = written("lora", base.plan(specs), base.checkpoint, tmp_path / "out").path
    with pytest.raises(RuntimeFailed, match=served):
        ask(VLLM, request(base.checkpoint.path, adapter), vllm_python)


def test_vllm_leaves_the_multiplier_off_an_embedding_adapter(
    vllm_python: Path, tmp_path: Path
) -> None:
    """Its general backend takes the adapter that its class for Gemma refuses, and says nothing.

    What it computes is another edit: the offset without the embedding's multiplier.
    """
    base = subject_at(tiny_gemma2(), tmp_path / "model")
    adapter = written("lora", base.plan(EMBEDDING), base.checkpoint, tmp_path / "out").path
    (tmp_path / "engine").mkdir()
    served = served_adapters(
        base,
        {"embedding": adapter},
        vllm_python,
        tmp_path / "engine",
        model_impl="transformers",
    )["embedding"]
    base.misses(EMBEDDING, served)
    multiplier = base.layout.embed_multiplier
    unscaled = [("offset", translation(3 / multiplier * direction()), "embed")]
    assert largest_difference(base.hooked(unscaled), served) <= TOLERANCE
    assert largest_difference(base.plain, served) > BROKEN
