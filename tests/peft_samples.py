"""Random adapters of random kinds, as PEFT writes them, for real classes of many architectures."""

import json
import random
import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch
from adapters import peft_warnings
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from bake.verify.precision import double_precision

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
STATE = {"state_size": 4, "conv_kernel": 3, "expand": 2, "time_step_rank": 3}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**GROUPED, "model_type": "llama", "attention_bias": True},
    "gpt2": {**SIZES, "model_type": "gpt2", "n_inner": 24},
    "gpt_neox": {**SIZES, "model_type": "gpt_neox", "rotary_pct": 0.5},
    "mamba": {**SIZES, **STATE, "model_type": "mamba"},
    "falcon": {**SIZES, "model_type": "falcon", "new_decoder_architecture": False, "bias": True},
    "bloom": {**SIZES, "model_type": "bloom"},
    "opt": {**SIZES, "model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 12},
    "phi3": {**GROUPED, "model_type": "phi3"},
    "gemma3_text": {**GROUPED, "model_type": "gemma3_text", "head_dim": 4, "layer_types": None},
    "mixtral": {**GROUPED, "model_type": "mixtral", "num_local_experts": 3},
    "qwen2_moe": {
        **GROUPED,
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 12,
    },
    "qwen3_moe": {
        **GROUPED,
        "model_type": "qwen3_moe",
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "head_dim": 4,
    },
    "stablelm": {**GROUPED, "model_type": "stablelm", "use_qkv_bias": True},
    "olmo2": {**GROUPED, "model_type": "olmo2"},
    "mpt": {
        "model_type": "mpt",
        "d_model": 16,
        "n_heads": 4,
        "n_layers": 2,
        "vocab_size": 40,
        "expansion_ratio": 2,
        "max_seq_len": 64,
    },
}
TOKENS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
EAGER = {"attn_implementation": "eager"}


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A tiny model on disk and in memory."""

    path: Path
    model: Any
    logits: Tensor

    def copy(self) -> Any:
        """Return a model like it, to be changed."""
        return _mould(self).cast()


@cache
def _mould(base: Base) -> tiny.Mould:
    return tiny.Mould(base.model)


def load(path: Path) -> Any:
    """Return a checkpoint's model in float64."""
    return tiny.load(path, torch.float64, read)


def read(path: Path, dtype: torch.dtype) -> Any:
    """Return a checkpoint's model, whatever its class takes."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, experts_implementation="eager", **EAGER
        )
    except (TypeError, ValueError):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **EAGER)
    return model.eval()


def logits_of(model: Any) -> Tensor:
    with torch.no_grad(), double_precision():
        found: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found.double()


def base_of(architecture: str, tied: bool, layout: str, folder: Path) -> Base:
    """Return a base in one of the forms that files have."""
    return _base(architecture, tied, layout, folder)


LAYOUTS = ("plain", "sharded", "both stored", "under the head", "without the prefix")


@cache
def _base(architecture: str, tied: bool, layout: str, folder: Path) -> Base:
    config = AutoConfig.for_model(**ARCHITECTURES[architecture], tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    seen: set[int] = set()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if id(p) in seen:
                continue
            seen.add(id(p))
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1 and not name.endswith(("A_log", "conv1d.weight")):
                p.copy_(0.35 * noise)
            else:
                p.add_(0.2 * noise)
    path = folder / f"{architecture}-{tied}-{layout.replace(' ', '_')}"
    model.save_pretrained(path, max_shard_size="20KB" if layout == "sharded" else "1GB")
    _laid_out(model, path, tied, layout)
    loaded = load(path)
    return Base(path, loaded, logits_of(loaded))


def _laid_out(model: Any, path: Path, tied: bool, layout: str) -> None:
    """Store the weights as some files of the Hub have them."""
    file = path / "model.safetensors"
    if layout in ("plain", "sharded"):
        return
    tensors = load_file(file)
    if tied and layout in ("both stored", "under the head"):
        ((target, source), *_) = model.all_tied_weights_keys.items()
        if source not in tensors:
            return
        tensors[target] = tensors[source].clone()
        if layout == "under the head":
            del tensors[source]
    if layout == "without the prefix":
        prefix = f"{model.base_model_prefix}."
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def leaves(model: Any) -> list[str]:
    """Return the paths of the layers that PEFT adapts."""
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, Conv1D)
    # ``peft/tuners/tuners_utils.py: _check_lora_target_modules_mamba`` refuses these.
    barred = ("out_proj", "conv1d") if model.config.model_type == "mamba" else ()
    found = [path for path, module in model.named_modules() if isinstance(module, kinds)]
    return [path for path in found if not path.endswith(barred)]


def _some(draw: random.Random, items: list[str], most: int) -> list[str]:
    return draw.sample(items, min(len(items), draw.randint(1, most)))


def _tokens(draw: random.Random, tables: list[str]) -> list[int] | dict[str, list[int]]:
    """Return some of the tokens that are run, for the embedding or by the tables' names."""
    words = sorted({*TOKENS.flatten().tolist()})
    by_name = {name: draw.sample(words, 4) for name in draw.sample(tables, min(len(tables), 2))}
    return draw.choice([draw.sample(words, 3), draw.sample(words, 5), by_name])


def options_of(base: Base, draw: random.Random) -> dict[str, Any]:
    """Return a random configuration of a LoRA."""
    paths = leaves(base.model)
    names = sorted({path.rpartition(".")[2] for path in paths})
    chosen = _some(draw, names, 4)
    options: dict[str, Any] = {"r": draw.randint(1, 6), "lora_alpha": draw.choice([2, 5, 8])}
    options["target_modules"] = draw.choice(
        [
            chosen,
            chosen,
            _some(draw, paths, 3),
            "all-linear",
            rf".*\.({'|'.join(map(re.escape, chosen))})",
        ]
    )
    inner = [path.rpartition(".")[0].rpartition(".")[2] for path in paths]
    plain = sorted({n for n in inner if n and not n.isdigit()} | set(names))
    norms = [p for p, m in base.model.named_modules() if "Norm" in type(m).__name__]
    saved = plain + sorted({path.rpartition(".")[2] for path in norms})
    tables = [n for n in names if any(w in n for w in ("embed", "wte", "lm_head"))]
    extras: dict[str, Any] = {
        "use_rslora": True,
        "use_dora": True,
        "lora_bias": True,
        "bias": draw.choice(["all", "lora_only"]),
        "rank_pattern": {draw.choice(chosen): draw.randint(1, 4)},
        "alpha_pattern": {rf".*\.{re.escape(draw.choice(chosen))}": 3},
        "layers_to_transform": draw.choice([0, [1], [0, 1]]),
        "exclude_modules": draw.choice([[draw.choice(names)], rf".*\.0\..*{draw.choice(names)}"]),
        "modules_to_save": _some(draw, saved, 2),
        "ensure_weight_tying": True,
        "fan_in_fan_out": True,
        "init_lora_weights": draw.choice(["gaussian", "orthogonal"]),
        "trainable_token_indices": _tokens(draw, tables),
    }
    for key in draw.sample(sorted(extras), draw.choice([0, 1, 1, 2, 3])):
        options[key] = extras[key]
    if tables and draw.random() < 0.25 and isinstance(options["target_modules"], list):
        options["target_modules"] = sorted({*options["target_modules"], *_some(draw, tables, 2)})
    stacks = [n for n, p in base.model.named_parameters() if p.dim() == 3 and "experts" in n]
    if stacks and draw.random() < 0.5:
        options["target_parameters"] = sorted({n.split(".", 3)[3] for n in _some(draw, stacks, 2)})
    return options


def trained(base: Base, out: Path, options: dict[str, Any], draw: random.Random) -> Path | None:
    """Write an adapter as PEFT does after a training; None where PEFT refuses to make it."""
    from peft import LoraConfig, get_peft_model

    generator = torch.Generator().manual_seed(draw.randint(0, 9999))
    with peft_warnings():
        try:
            model = get_peft_model(base.copy(), LoraConfig(**options))
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
            return None
        with torch.no_grad():
            seen: set[int] = set()
            for parameter in model.parameters():
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.3 * noise)
        model.create_or_update_model_card = lambda folder: None  # which takes longer than the rest
        model.save_pretrained(out, save_embedding_layers=draw.choice([True, False, False, "auto"]))
    file = out / "adapter_model.safetensors"
    kind = draw.choice([torch.float32, torch.float32, torch.bfloat16])
    save_file({n: t.to(kind).contiguous() for n, t in load_file(file).items()}, file)
    if draw.random() < 0.2:
        _old(out / "adapter_config.json")
    return out


def _old(path: Path) -> None:
    """Let a configuration have the keys of old versions, which ask for nothing."""
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "enable_lora": None, "merge_weights": False}))


def drop(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def unread(base: Base, adapter: Path) -> bool:
    """Whether PEFT's own model never calls one of its layers, or cannot compute at all.

    No sum of weights is that. Asked of the model at work, and of nothing that bake reads off its
    source: OPT's positions, for one, are looked up by an attention mask that PEFT's layer takes for
    indices.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    with peft_warnings():
        try:
            model = PeftModel.from_pretrained(base.copy(), str(adapter))
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
            return False
    called: set[str] = set()
    layers = [path for path, module in model.named_modules() if isinstance(module, LoraLayer)]
    for path in layers:
        model.get_submodule(path).register_forward_hook(
            lambda *_, path=path: called.add(path)  # type: ignore[misc]
        )
    try:
        logits_of(model.double().eval())
    except (RuntimeError, TypeError, IndexError, ValueError, AttributeError):
        return True
    return not called.issuperset(layers)


def sample(seed: int, architecture: str, folder: Path) -> str:
    """Merge one random adapter, and return what came of it.

    Args:
        seed: of everything that is random.
        architecture: a key of ``ARCHITECTURES``.
        folder: for the bases, which are made once, and for the rest.

    Raises:
        AssertionError: the merge is neither what PEFT computes nor refused.
    """
    from peft import PeftModel

    from bake.checkpoints import open_checkpoint
    from bake.errors import BakeError
    from bake.merge.merge import merge_adapter

    draw = random.Random(seed)
    base = base_of(architecture, draw.random() < 0.5, draw.choice(LAYOUTS), folder)
    adapter, out = folder / "adapter", folder / "out"
    drop(adapter)
    drop(out)
    # What PEFT refuses to make is drawn again: every sample is an adapter.
    options = options_of(base, draw)
    while trained(base, adapter, options, draw) is None:
        options = options_of(base, draw)
    try:
        merge_adapter(adapter, open_checkpoint(base.path), out)
    except BakeError as error:
        assert error.what and not out.exists()
        return "not read" if unread(base, adapter) else f"refused: {error.what}"
    with peft_warnings():
        model = PeftModel.from_pretrained(base.copy(), str(adapter), autocast_adapter_dtype=False)
    want = logits_of(model.eval())
    effect = float((want - base.logits).abs().max())
    error_ = float((logits_of(load(out)) - want).abs().max())
    # An adapter that hardly moves the logits is held to the rounding of the stored weights.
    least = 1e-2 * float(base.logits.abs().max())
    assert error_ <= 1e-5 * max(effect, least), (seed, architecture, base.path.name, options)
    return "merged" if effect > least else "hardly moves"
