"""Read a PEFT LoRA adapter as sums: which module gets which factors, at which scale.

What PEFT computes for a module is read from ``peft/tuners/lora/layer.py`` (0.21): W + s B A with
s = alpha / r, or alpha / √r with ``use_rslora``; ranks and alphas by the first pattern that matches
the module's path (``peft/utils/other.py: get_pattern_key``). An adapter that is more than such a
sum, or that says anything unknown, is refused: nothing of it may be lost in silence.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bake.checkpoints import strictjson
from bake.checkpoints.adapter import FILES
from bake.errors import InputError

CONFIG, WEIGHTS = FILES
_PREFIX = "base_model.model."
# Embeddings have factors without ``.weight``.
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(embedding_(?P<table>[AB])|(?P<side>[AB])\.weight|B\.(?P<bias>bias))"
)

# Initialisations that set the factors alone. Others change the base's weights when PEFT loads them.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")

_IGNORED = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("peft_version", "lora_dropout", "target_modules", "exclude_modules", "layers_pattern"),
    *("layers_to_transform", "runtime_config", "ensure_weight_tying", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
)
"""Keys that say how an adapter was trained or found, and nothing of what it computes."""

_REFUSED = {
    "use_dora": "DoRA divides every column by a norm of its own: it is no sum of base and factors",
    "use_qalora": "QALoRA pools the inputs of its factors",
    "use_bdlora": "block-diagonal LoRA has another layout of factors",
    "alora_invocation_tokens": "an activated LoRA works on some tokens only",
    "layer_replication": "it repeats layers, and a checkpoint of the base has none to repeat",
    "target_parameters": "the factors of fused parameters have no module of their own",
    "trainable_token_indices": "it replaces single rows of the embedding",
    "megatron_config": "its layers are Megatron's",
    "arrow_config": "it routes between several adapters",
    "kasa_config": "it cuts singular values off the base",
    "monteclora_config": "it draws its factors",
    "velora_config": "it changes what its layers compute",
}


@dataclass(frozen=True, slots=True)
class Module:
    """The factors of one module; ``a`` and ``b`` are names of tensors in the file."""

    path: str
    is_table: bool
    rank: int
    scale: float
    a: str
    b: str
    bias: str | None
    """A trained bias of B, added to the module's output at the same scale."""


@dataclass(frozen=True, slots=True, eq=False)
class PeftAdapter:
    """An adapter whose every tensor has a meaning, none of them read yet.

    ``modules`` have factors; ``replaced`` are tensors stored whole (biases, saved modules), by the
    tensor of the model that they stand for; ``copies`` must equal the base's.
    """

    path: Path
    config: Mapping[str, Any]
    modules: tuple[Module, ...]
    replaced: Mapping[str, str]
    copies: Mapping[str, str]
    transposed: bool
    """``fan_in_fan_out``: layers store [in, out]."""
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    def read(self, name: str) -> Float[Tensor, "..."]:
        """Return one tensor of the adapter in float64.

        Raises:
            InputError: it holds values that are not finite.
        """
        from safetensors import safe_open

        with safe_open(self.path / WEIGHTS, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name).to(torch.float64)
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} holds NaN or infinity", where=str(self.path / WEIGHTS))
        return tensor


def open_adapter(path: Path) -> PeftAdapter:
    """Return an adapter, every tensor of it accounted for.

    Raises:
        InputError: a file is missing or malformed, the adapter is more than base and factors, or
            a tensor has no known meaning.
    """
    config = _config(path)
    shapes = _shapes(path)
    pairs: dict[tuple[str, bool], dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in shapes:
        inner = name.removeprefix(_PREFIX)
        match = _FACTOR.fullmatch(inner)
        if inner == name or (match is None and "lora_" in inner):
            raise _unknown(path, name)
        if match is None:
            whole[inner] = name
            continue
        side = match["table"] or match["side"] or match["bias"]
        pairs.setdefault((match["module"], match["table"] is not None), {})[side] = name
    modules = tuple(
        _module(path, config, module, is_table, sides, shapes)
        for (module, is_table), sides in pairs.items()
    )
    if not modules:
        raise InputError("the adapter holds no factors", where=str(path / WEIGHTS))
    replaced, copies = _sorted_out(path, config, whole, {module.path for module in modules})
    transposed = bool(config.get("fan_in_fan_out", False))
    return PeftAdapter(path, config, modules, replaced, copies, transposed, shapes)


def _config(path: Path) -> dict[str, Any]:
    where = str(path / CONFIG)
    try:
        text = (path / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"this is no PEFT adapter: {CONFIG} cannot be read ({error})",
            where=str(path),
            fix=f"name a folder that holds {CONFIG} and {WEIGHTS}",
        ) from error
    config = strictjson.parse_object(text, where=where)
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"the adapter is of type {config.get('peft_type')!r}, and only LORA is a sum of base "
            "and factors",
            where=where,
        )
    for key, why in _REFUSED.items():
        if config.get(key):
            raise InputError(f"an adapter with {key} cannot be merged", where=where, why=why)
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise InputError(
            f"an adapter with init_lora_weights = {init!r} cannot be merged",
            where=where,
            why="PEFT changes the weights of the base when it loads such an adapter",
            fix="save it as a plain LoRA with PEFT's path_initial_model_for_weight_conversion",
        )
    known = {*_IGNORED, *_REFUSED, "peft_type", "init_lora_weights", "modules_to_save", "bias"}
    known |= {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias"}
    known |= {"fan_in_fan_out"}
    for key in config:
        if key not in known:
            raise InputError(
                f"bake does not know the key {key!r} of an adapter",
                where=where,
                why="it could change what the adapter computes",
                fix="remove it if it does not",
            )
    return config


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    if not (path / WEIGHTS).is_file():
        pickled = (path / "adapter_model.bin").is_file()
        raise InputError(
            f"there is no {WEIGHTS}",
            where=str(path),
            why="adapter_model.bin is a pickle, which can run code" if pickled else None,
            fix="load the adapter with PEFT and save it again",
        )
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path / WEIGHTS)) from error


def _module(
    path: Path,
    config: Mapping[str, Any],
    module: str,
    is_table: bool,
    sides: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> Module:
    where = str(path / WEIGHTS)
    if "A" not in sides or "B" not in sides:
        raise InputError(f"{module} has one factor and not the other", where=where)
    rank = _matching(config.get("rank_pattern"), module, config.get("r"))
    alpha = _matching(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise InputError(f"r = {rank!r} or lora_alpha = {alpha!r} is no number", where=str(path))
    a, b = shapes[sides["A"]], shapes[sides["B"]]
    if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
        raise InputError(
            f"the factors of {module} have shapes {list(a)} and {list(b)}, and {CONFIG} gives it "
            f"the rank {rank}",
            where=where,
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Module(module, is_table, rank, scale, sides["A"], sides["B"], sides.get("bias"))


def _matching(pattern: Any, module: str, default: Any) -> Any:
    """Return the value of the first key that is the module's path or an end of it."""
    if pattern is not None and not isinstance(pattern, dict):
        raise InputError(f"a pattern of an adapter is no object: {pattern!r}", where=CONFIG)
    for key, value in (pattern or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({key})$", module)
        except re.error as error:
            raise InputError(f"{key!r} is no regular expression: {error}", where=CONFIG) from error
        if matches:
            return value
    return default


def _sorted_out(
    path: Path, config: Mapping[str, Any], whole: Mapping[str, str], factored: set[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return tensors that replace the base's, and copies of it that PEFT saved beside factors."""
    saved = tuple(config.get("modules_to_save") or ())
    biases = config.get("bias", "none")
    replaced, copies = {}, {}
    for inner, name in whole.items():
        module, _, parameter = inner.rpartition(".")
        module = module.removesuffix(".base_layer")
        if parameter == "bias" and (
            biases == "all" or (biases == "lora_only" and module in factored)
        ):
            replaced[f"{module}.bias"] = name
        elif parameter == "weight" and inner.endswith(".base_layer.weight") and module in factored:
            copies[f"{module}.weight"] = name
        elif any(module == key or module.endswith(f".{key}") for key in saved):
            replaced[inner] = name
        else:
            raise _unknown(path, name)
    return replaced, copies


def _unknown(path: Path, name: str) -> InputError:
    return InputError(
        f"the adapter's tensor {name} has no meaning that bake knows",
        where=str(path / WEIGHTS),
        why="a tensor that is left out could be part of what the adapter does",
    )
