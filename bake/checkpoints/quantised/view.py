"""A quantised checkpoint as the unquantised one that it was made of: names, shapes and values.

Whoever plans, folds, hooks or measures reads values. Here they are decoded as they are asked for,
under the names that the unquantised checkpoint has; the files as they are stay beside them
(``Checkpoint.stored``). What is stored as codes is recognised before any shape is compared with a
table, by configuration and tensors together.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bake.checkpoints.config import CONFIG, DELETE, patch_config
from bake.checkpoints.dtypes import BITS
from bake.checkpoints.header import TensorInfo
from bake.errors import CheckpointError

if TYPE_CHECKING:
    from bake.checkpoints.checkpoint import Checkpoint
    from bake.checkpoints.quantised.coded import Coded

KEYS = ("quantization_config", "compression_config")
"""Of a configuration, what says how the weights are quantised."""
BESIDE = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files that say it once more."""
_LEFT_ALONE = (
    *("ignore", "modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules"),
    "exclude_modules",
)
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# What no unquantised checkpoint has, and what none calls a tensor. Integers say nothing: GPT-NeoX
# keeps its attention mask in U8.
_CODES = ("F8_E4M3", "F8_E5M2", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")
_ENDS = (
    *("_scale_inv", "weight_scale", "weight_scale_2", "weight_packed"),
    *(".qweight", ".qzeros", "_blocks", ".absmax", ".SCB"),
)
_METHODS_SAID = "a configuration with quantization_config says how to read them"


def decoded(checkpoint: "Checkpoint") -> "Checkpoint":
    """Return a checkpoint whose quantised weights are decoded; itself where there are none.

    Of its files headers are read, and small tensors that say what is where.

    Raises:
        CheckpointError: bake does not read the format, or configuration and tensors disagree.
    """
    if checkpoint.stored is not None:
        return checkpoint
    key = next((key for key in KEYS if checkpoint.config.get(key) is not None), None)
    if key is None:
        _refuse_unsaid(checkpoint)
        return checkpoint
    # Here, because formats are read with torch, which a folder's headers are read without.
    from bake.checkpoints.quantised.registry import METHODS

    settings = checkpoint.config[key]
    method = str(settings.get("quant_method") if isinstance(settings, Mapping) else settings)
    if method not in METHODS:
        raise CheckpointError(
            f"the weights are quantised by {method!r}, which bake does not read",
            where=f"{checkpoint.source}: {CONFIG} {key}",
            why="an edit is folded into values, and these are codes",
            fix=f"name the unquantised base instead; read are {', '.join(METHODS)}",
        )
    dtype = dequantised_dtype(checkpoint.config)
    found = METHODS[method](checkpoint, settings, dtype)
    if not found.coded:
        raise CheckpointError(
            f"{CONFIG} says that the weights are quantised by {method}, and no tensor is",
            where=checkpoint.source,
            fix=f"fetch {CONFIG} again, or remove its {key} if the weights were dequantised",
        )
    parts = {name for coded in found.coded for name in coded.tensors} | set(found.loose)
    kept = {name: info for name, info in checkpoint.tensors.items() if name not in parts}
    _refuse_left(checkpoint, kept, method)
    by_codes = {coded.codes.name: _info(coded, checkpoint) for coded in found.coded}
    infos = (by_codes.get(name) or kept.get(name) for name in checkpoint.tensors)
    tensors = {info.name: info for info in infos if info is not None}
    text = patch_config(checkpoint.config_text, {key: DELETE})
    config = {k: v for k, v in checkpoint.config.items() if k != key}
    return replace(
        checkpoint,
        config=config,
        config_text=text,
        tensors=tensors,
        coded={coded.name: coded for coded in found.coded},
        stored=checkpoint,
    )


def _info(coded: "Coded", checkpoint: "Checkpoint") -> TensorInfo:
    """Return a weight's place: where its codes are, and as many bytes as it has dequantised."""
    size = math.prod(coded.shape) * BITS[coded.dtype] // 8
    return TensorInfo(
        coded.name, coded.dtype, coded.shape, checkpoint.tensors[coded.codes.name].shard, 0, size
    )


def dequantised_dtype(config: Mapping[str, Any]) -> str:
    """Return what values are stored in once they are decoded: the configuration's own type."""
    inner = config.get("text_config")
    parts = (config, inner if isinstance(inner, Mapping) else {})
    said = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    return next((_DTYPES[word] for word in said if word in _DTYPES), "BF16")


def left_alone(config: Mapping[str, Any], created: Iterable[str]) -> dict[str, Any]:
    """Return what a quantised configuration has to say of weights that are added in float.

    A list of modules that are not quantised has to name them, or a loader looks for their codes.

    Args:
        config: of the quantised base.
        created: names of the tensors that are added.
    """
    modules = [name.removesuffix(".weight") for name in created if name.endswith(".weight")]
    for key in KEYS:
        settings = config.get(key)
        if not isinstance(settings, Mapping):
            continue
        for word in _LEFT_ALONE:
            listed = settings.get(word)
            if isinstance(listed, list) and (more := [m for m in modules if m not in listed]):
                return {key: {**settings, word: [*listed, *more]}}
    return {}


def _refuse_unsaid(checkpoint: "Checkpoint") -> None:
    """Refuse codes that the configuration says nothing of."""
    _refuse_left(checkpoint, checkpoint.tensors, None)


def _refuse_left(
    checkpoint: "Checkpoint", tensors: Mapping[str, TensorInfo], method: str | None
) -> None:
    """Refuse tensors of codes, or of their scales, that no format has claimed."""
    for name, info in tensors.items():
        if info.dtype in _CODES or name.endswith(_ENDS):
            said = "says nothing of it" if method is None else f"says {method}, which has no such"
            raise CheckpointError(
                f"{name} ({info.dtype}) is a part of a quantised weight, and {CONFIG} {said}",
                where=checkpoint.source,
                why="which codes and scales belong together, and how, is not to be guessed",
                fix=f"name the unquantised base, or fetch {CONFIG} again: {_METHODS_SAID}",
            )
