"""GGUF files that bake edits, in llama.cpp: they equal hooks, and load in the types they had.

The bases are made by llama.cpp's own converter from tiny checkpoints.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from install import GgufConverter
from reference import Reference, first_disagreement, largest_difference, reference_logprobs
from tiny_checkpoints import HIDDEN, SHAPE, VOCAB, randomised, tiny_llama, write
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from bake.affine import AffineMap, LowRankMap
from bake.checkpoints import Checkpoint, open_checkpoint
from bake.checkpoints.ggml import VARIABLE, load_ggml
from bake.checkpoints.gguf_codec import decode, encode
from bake.checkpoints.gguf_types import BY_NAME
from bake.edits import Edit, EditKind
from bake.families import Layout
from bake.outputs.checkpoint import export_checkpoint
from bake.outputs.gguf import export_gguf
from bake.outputs.gguf_convert import convert_checkpoint
from bake.plan import Plan, compile_plan
from bake.sites import expand
from bake.steer import steered
from bake.verify.compare import layout_of
from bake.verify.runtimes import llamacpp
from bake.verify.runtimes.base import RuntimeRequest, RuntimeResult
from bake.verify.runtimes.converter import convert

pytestmark = pytest.mark.runtimes

TOLERANCE = 1e-4  # nats, in float32: what the project promises
NEW_TOKENS = 16
PROMPTS = ((1,), (1, 17, 200, 45, 9), tuple(range(1, 60, 5)))


def tiny_gemma2() -> PreTrainedModel:
    shape = {**SHAPE, "tie_word_embeddings": True, "attention_bias": False}
    config = Gemma2Config(
        **shape, query_pre_attn_scalar=32, sliding_window=128, attn_implementation="eager"
    )
    return randomised(Gemma2ForCausalLM(config), 11)


def tiny_gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=3,
        n_head=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    return randomised(GPT2LMHeadModel(config), 12)


def tiny_mixtral() -> PreTrainedModel:
    shape = {key: value for key, value in SHAPE.items() if key != "attention_bias"}
    config = MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2)
    return randomised(MixtralForCausalLM(config), 13)


def direction(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(HIDDEN, generator=generator, dtype=torch.float64)
    return vector / vector.norm()


def ablation(constant: float = 0.0, seed: int = 0) -> AffineMap:
    unit = direction(seed)
    return LowRankMap(-unit[:, None], unit[None], constant * unit)


@dataclass(frozen=True)
class Case:
    make: Callable[[], PreTrainedModel]
    edits: Sequence[tuple[str, AffineMap, str | list[str]]]
    allow: tuple[str, ...] = ()


def queries() -> AffineMap:
    generator = torch.Generator().manual_seed(5)
    factors = torch.randn(2, 4 * 32, generator=generator, dtype=torch.float64) / 8
    return LowRankMap(factors.T.contiguous(), factors, torch.zeros(128, dtype=torch.float64))


CASES = {
    "Llama": Case(
        lambda: tiny_llama(seed=3),
        # The stream, a constant at the queries (permuted weight and bias), and module outputs.
        [("affine", ablation(0.8), "resid"), ("linear", queries(), "q.1")],
    ),
    "Gemma 2": Case(tiny_gemma2, [("ablate", ablation(), ["attn_out.*", "mlp_out.*"])]),
    "GPT-2": Case(tiny_gpt2, [("affine", ablation(0.8), "resid")]),
    "Mixtral": Case(
        tiny_mixtral, [("affine", ablation(0.8), "resid"), ("linear", queries(), "q.2")]
    ),
}


@dataclass(frozen=True, eq=False)
class Base:
    """A tiny model on disk, its plan, its GGUF in float32, and what it computes under hooks."""

    checkpoint: Checkpoint
    layout: Layout
    plan: Plan
    edits: tuple[Edit, ...]
    file: Path
    model: PreTrainedModel
    plain: Reference
    hooked: Reference


@pytest.fixture(scope="module", params=CASES)
def base(
    request: pytest.FixtureRequest,
    gguf_converter: GgufConverter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Base:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("base")
    model = case.make()
    checkpoint = open_checkpoint(written(model, folder / "model"))
    layout = layout_of(checkpoint)
    edits = tuple(
        Edit(EditKind(kind), "c", expand(at, layers=layout.layers, stream=layout.stream), map_)
        for kind, map_, at in case.edits
    )
    plan = compile_plan(
        edits,
        layout,
        gain=lambda name: checkpoint.read(name).to(torch.float64),
        config=checkpoint.config,
        targets=("llama.cpp",),
    )
    file = folder / "base.gguf"
    convert(checkpoint.path, file, converter=gguf_converter.script, python=gguf_converter.python)
    plain = reference_logprobs(model, PROMPTS, NEW_TOKENS)
    with steered(model, layout, edits):
        hooked = reference_logprobs(model, PROMPTS, NEW_TOKENS)
    return Base(checkpoint, layout, plan, edits, file, model, plain, hooked)


def written(model: PreTrainedModel, folder: Path) -> Path:
    """Save the model with a vocabulary that its own converter takes."""
    write(model, folder)
    if isinstance(model, GPT2LMHeadModel):
        (folder / "tokenizer.model").unlink()
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["n_ctx"] = config["n_positions"]
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        byte_level_tokenizer(folder)
    return folder


def byte_level_tokenizer(folder: Path) -> None:
    """Write the byte-level tokenizer of VOCAB tokens that GPT-2's converter recognises."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *alphabet]
    words += [a + b for a in alphabet for b in alphabet][: VOCAB - len(words)]
    merges = [(word[0], word[1]) for word in words[3 + len(alphabet) :]]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def serve(file: Path, python: Path) -> RuntimeResult:
    return llamacpp.run(RuntimeRequest(file, PROMPTS, NEW_TOKENS, VOCAB, "float32"), python)


def export(base: Base, file: Path, out: Path, **options: Any) -> Path:
    artifact = export_gguf(base.plan, base.checkpoint, file, out, record={}, **options)
    return artifact.path / file.name


def test_edited_float32_file_equals_hooks(
    base: Base, llamacpp_python: Path, tmp_path: Path
) -> None:
    result = serve(export(base, base.file, tmp_path / "out"), llamacpp_python)
    assert largest_difference(base.hooked, result) <= TOLERANCE
    assert first_disagreement(base.hooked, result, TOLERANCE) is None
    # The effect, and the control: the unedited file is far away from the hooks and is the base.
    assert largest_difference(base.plain, result) > 0.05
    control = serve(base.file, llamacpp_python)
    assert largest_difference(base.plain, control) <= TOLERANCE
    assert largest_difference(base.hooked, control) > 0.05
