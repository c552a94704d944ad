"""Tiny random models of every family table, as real transformers models and real checkpoints.

Sizes differ wherever a family lets them (hidden ≠ heads × head_dim ≠ kv_heads × head_dim ≠ inner ≠
vocab), so that a wrong axis fails by its shape; gains differ from 1 and have both signs, biases
differ from 0, and every branch moves the residual stream by about as much as it holds.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from core import CORE, WRAPPED
from moulds import Filling, Mould, Read, tensors_of
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from bake.affine import tolerance as product_tolerance
from bake.families import Layout, find_family, load_families, resolve

logging.disable_progress_bar()

_TOKENS = {"vocab_size": 56, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {
    **_TOKENS,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
# Rotary embeddings take an even share of a head, so NeoX's heads are 32 / 4 = 8 wide, 4 rotated.
_NEOX = {**_SIZES, "hidden_size": 32, "rotary_pct": 0.5}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {**_GROUPED, "model_type": "mistral", "sliding_window": None},
    "qwen2": {**_GROUPED, "model_type": "qwen2"},
    "qwen3": {**_GROUPED, "model_type": "qwen3", "attention_bias": True},
    "gemma": {**_GROUPED, "model_type": "gemma", "attention_bias": True},
    "gemma2": {
        **_GROUPED,
        "model_type": "gemma2",
        "attention_bias": True,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,  # shorter than the tests' sequences, so that it matters
    },
    "gemma3": {
        **_GROUPED,
        "model_type": "gemma3_text",
        "attention_bias": True,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {**_GROUPED, "model_type": "phi3"},
    "gpt2": {
        **_TOKENS,
        "model_type": "gpt2",
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 40,
        "n_positions": 64,
    },
    "gpt_neox": {**_NEOX, "model_type": "gpt_neox", "use_parallel_residual": True},
    "gpt_neox_sequential": {**_NEOX, "model_type": "gpt_neox", "use_parallel_residual": False},
    "olmo2": {**_GROUPED, "model_type": "olmo2", "attention_bias": True},
    "mixtral": {**_GROUPED, "model_type": "mixtral", "num_local_experts": 3},
    **{name: of.config for name, of in CORE.items()},
}
TABLES = {family.name: family for family in load_families()}
FAMILIES = tuple(name for name in CONFIGS if TABLES[name].tier == "served")
"""What the tests of every edit, carrier and runtime run over; ``test_core_families.py`` has the
others, one test a table."""

# What the edits are expected to do is written here by hand, from the classes of transformers, and
# shares nothing with the plan or the tables. First: which linear layers hold a bias.
ALL = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
ATTENTION = frozenset({"q", "k", "v", "o"})
NONE: frozenset[str] = frozenset()
BIASES = {
    "llama": ALL,
    "mistral": NONE,
    "qwen2": frozenset({"q", "k", "v"}),
    "qwen3": ATTENTION,
    "gemma": ATTENTION,
    "gemma2": ATTENTION,
    "gemma3": ATTENTION,
    "phi3": NONE,
    "gpt2": ALL,
    "gpt_neox": ALL,
    "gpt_neox_sequential": ALL,
    "olmo2": ATTENTION,
    "mixtral": NONE,
    "smollm3": ALL,  # of the core tables, the one that other tests widen
}
# The flag that an offset at ``attn_out`` opens, and how many layers of a block it gives a bias.
OPENED: dict[str, tuple[str, int]] = {}
OPENED_BY_MOST = ("attention_bias", 4)
POST_NORM = ("gemma2", "gemma3", "olmo2")  # a norm follows the writers
# It subtracts the mean, and has a bias.
LAYER_NORM = ("gpt2", "gpt_neox", "gpt_neox_sequential")
UNGATED = ("gpt2", "gpt_neox", "gpt_neox_sequential")
PARALLEL = ("gpt_neox",)  # both branches read what the block reads
MIXTURES = ("mixtral",)
SMALL = {**CORE, **WRAPPED}
TIED = ("gemma", "gemma2", "gemma3", "gpt2", *(name for name, of in SMALL.items() if of.tied))
GAIN_OFFSET = {"gemma": 1.0, "gemma2": 1.0, "gemma3": 1.0}  # their norms multiply by 1 + weight
GAIN_OFFSET |= {name: of.gain_offset for name, of in SMALL.items()}
# Gemma-2's softcapping exists in eager attention only, and grouped experts take no float64.
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def unbiased(family: str) -> dict[str, bool]:
    """Return the options that close the bias flags which ``CONFIGS`` opens."""
    return {key: False for key, value in CONFIGS[family].items() if key.endswith("_bias") and value}


def make_model(
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    tied: bool | None = None,
    square: bool = False,
    **overrides: Any,
) -> PreTrainedModel:
    """Return a random model in eval mode.

    Args:
        family: a key of ``CONFIGS``.
        seed: of the weights.
        dtype: of the weights; the values are drawn in float64 and rounded to it.
        tied: whether the output head is the embedding; the family's habit when None.
        square: whether heads × head_dim = hidden, which makes o_proj a square matrix.
        overrides: config keys to set otherwise.
    """
    chosen = WRAPPED[family].config if family in WRAPPED else CONFIGS[family]
    values = {**chosen, "tie_word_embeddings": family in TIED if tied is None else tied}
    if square and "head_dim" in values:
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    config = AutoConfig.for_model(**{**values, **overrides})
    # from_config, not model.to: buffers (Gemma's embedding scale) are made in the dtype's precision
    auto = AutoModelForImageTextToText if family in WRAPPED else AutoModelForCausalLM
    model = auto.from_config(config, dtype=dtype, **EAGER)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # a router that its class makes in float32
    generator = torch.Generator().manual_seed(seed)
    drawn: set[int] = set()  # a tied head is the embedding's own parameter
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in drawn:
                    drawn.add(id(parameter))
                    gain_offset = GAIN_OFFSET.get(family, 0.0)
                    parameter.copy_(_draw(module, name, parameter, gain_offset, generator))
            for name, buffer in module.named_buffers(recurse=False):
                if name in ("e_score_correction_bias", "expert_bias"):  # of which experts are asked
                    buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
                elif name == "layer_scalar":
                    buffer.copy_(0.5 + 0.4 * torch.rand(buffer.shape, generator=generator))
    return model.eval()


def _draw(
    module: nn.Module, name: str, like: Tensor, gain_offset: float, generator: torch.Generator
) -> Tensor:
    normal = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    if name == "bias":
        return 0.3 * normal
    if name == "e_score_correction_bias":  # which ERNIE's class keeps in float32 under another name
        return (0.1 * normal).to(torch.float32).to(torch.float64)
    if like.dim() == 1:
        magnitude = 0.5 + torch.rand(like.shape, generator=generator, dtype=torch.float64)
        return magnitude * normal.sign() - gain_offset
    if isinstance(module, nn.Embedding):
        # Gemma multiplies its embeddings by √hidden; a tied head reads them as they are.
        return normal / getattr(module, "scalar_embed_scale", 2.0)
    fan_in = like.shape[0] if isinstance(module, Conv1D) else like.shape[-1]
    # A factor above 1 makes up for what softmax and activations take away.
    return 1.5 * normal / fan_in**0.5


def write_checkpoint(
    model: PreTrainedModel, path: Path, *, max_shard_size: str | None = None
) -> None:
    """Write the model as ``save_pretrained`` does, in its own dtype, in one shard unless told."""
    model.save_pretrained(path, max_shard_size=max_shard_size or "1GB")


CONFIGURING = ("config.json", "generation_config.json", "model.safetensors.index.json")


def read(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a checkpoint, which has exactly the tensors that its class expects."""
    wrapped = "vision_config" in config_of(path)
    auto = AutoModelForImageTextToText if wrapped else AutoModelForCausalLM
    model, info = auto.from_pretrained(path, dtype=dtype, output_loading_info=True, **EAGER)
    assert not any(info.values()), info
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtype:  # a router that its class keeps in float32
            parameter.data = tensors_of(path).get(name, parameter.data).to(dtype)
    return model.eval()


def load(
    path: Path,
    dtype: torch.dtype = torch.float64,
    read: Read = read,
    changed: Mapping[str, Tensor] | None = None,
) -> PreTrainedModel:
    """Return the model that ``read`` makes of a checkpoint, with other values in some tensors.

    It reads the first one of each configuration, index and header. What it makes of them does not
    depend on values, so those of any other are put into a copy.
    """
    header = tuple(tuple(found.items()) for found in header_of(path))
    shards = tuple(shard.name for shard in sorted(path.glob("*.safetensors")))
    texts = tuple((side.name, side.read_bytes()) for side in sorted(path.glob("*.json")))
    key = (read, dtype, header, shards, tuple(text for text in texts if text[0] in CONFIGURING))
    if key not in _READ:
        model = read(path, dtype)
        filling = Filling.seen(model, path, read)
        _READ[key] = None if filling is None else (Mould(model), filling)
        if changed is None:
            return model
    found = _READ[key]
    if found is None:
        assert changed is None, "transformers computes with the values of this file"
        return read(path, dtype)
    mould, filling = found
    model = mould.cast()
    model.config.name_or_path = model.name_or_path = str(path)
    filling.fill(model, {**tensors_of(path), **(changed or {})})
    return model


_READ: dict[Any, tuple[Mould, Filling] | None] = {}
"""What transformers made of a configuration and a header; None where it computes with values."""


def config_of(path: Path) -> dict[str, Any]:
    """Return the config.json of a checkpoint."""
    config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return config


def header_of(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shape and the dtype of every tensor of a checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():
                assert name not in shapes, f"{name} is in two shards"
                tensor = file.get_slice(name)
                shapes[name], dtypes[name] = tuple(tensor.get_shape()), tensor.get_dtype()
    return shapes, dtypes


def layout_of(path: Path) -> Layout:
    """Return the layout of a checkpoint, from its config.json and its tensor headers."""
    config = config_of(path)
    return resolve(find_family(config), config, *header_of(path))


def tokens(*, batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    """Return random token ids [batch, length], without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, _TOKENS["vocab_size"], (batch, length), generator=generator)


def tolerance(model: PreTrainedModel) -> float:
    """Return the relative error that rounding may leave in a model's float64 output.

    Every branch is a chain of products over at most the widest axis, and their errors add up.
    """
    widest = max(max(parameter.shape) for parameter in model.parameters())
    return 2 * model.config.num_hidden_layers * product_tolerance(widest)
