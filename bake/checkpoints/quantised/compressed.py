"""``quant_method`` compressed-tensors: FP8, integers in bytes or words, NVFP4 and MXFP4.

Mirrors compressed-tensors' ``compressors`` and ``quantization/quant_config.py``. Its configuration
has groups of layers, each with targets and what their weights are; a layer's tensors have to be
what its group says.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bake.checkpoints.quantised.coded import Coded
from bake.checkpoints.quantised.fine_grained import CACHE
from bake.checkpoints.quantised.found import Found, beside, disagreeing
from bake.checkpoints.quantised.fp8 import DTYPES, coded_fp8
from bake.checkpoints.quantised.levels import e2m1, integers
from bake.checkpoints.quantised.nibbles import ExponentScales, Float8Scales, Nibbles
from bake.checkpoints.quantised.stored import Stored
from bake.checkpoints.quantised.words import Groups, GroupScales, RowWords, ZeroPoints

_METHOD = "compressed-tensors"
_BESIDE = (
    *("weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
    *("input_scale", "input_zero_point", "input_global_scale", "input_g_idx"),
)
_CODES = (".weight_packed", ".weight")


def find(checkpoint: Stored, settings: Mapping[str, Any], dtype: str) -> Found:
    """Return the weights of a checkpoint whose configuration says ``compressed-tensors``.

    Raises:
        CheckpointError: the configuration and the tensors disagree, or it names a scheme that bake
            does not read.
    """
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or settings.get("sparsity_config"):
        raise disagreeing(checkpoint, _METHOD, "it has no config_groups, or a sparsity_config")
    coded, loose = [], [name for name in checkpoint.tensors if name.endswith(CACHE)]
    for name in checkpoint.tensors:
        if not name.endswith(".weight_scale"):
            continue
        module = name.removesuffix(".weight_scale")
        weights = _weights(checkpoint, module, settings)
        coded.append(_reader(checkpoint, module, weights)(checkpoint, module, weights, dtype))
    return Found(tuple(coded), tuple(loose))


def _weights(checkpoint: Stored, module: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the configuration says of a layer's weights.

    Targets that are the layer's name come before expressions, and those before its class, as in
    compressed-tensors' ``utils/match.py: match_targets``.
    """
    if any(_matches(module, target) for target in settings.get("ignore") or ()):
        raise disagreeing(checkpoint, _METHOD, f"{module} is to be ignored, and is quantised")
    groups = [g for g in settings["config_groups"].values() if isinstance(g, Mapping)]
    exact = [g for g in groups if module in (g.get("targets") or ())]
    named = [g for g in groups if any(_matches(module, t) for t in g.get("targets") or ())]
    by_class = [g for g in groups if "Linear" in (g.get("targets") or ())]
    found = (exact or named or by_class)[:1]
    weights = found[0].get("weights") if found else None
    if not isinstance(weights, Mapping):
        raise disagreeing(checkpoint, _METHOD, f"{module} is quantised, and no group is about it")
    return weights


def _matches(module: str, target: Any) -> bool:
    if not isinstance(target, str):
        return False
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return module == target


_Reader = Callable[[Stored, str, Mapping[str, Any], str], Coded]


def _reader(checkpoint: Stored, module: str, weights: Mapping[str, Any]) -> _Reader:
    """Return what reads a layer's weight, by what the configuration says that it is.

    Raises:
        CheckpointError: bake reads no such weights, or the tensors are others.
    """
    tensors = checkpoint.tensors
    bits, kind, group = weights.get("num_bits"), weights.get("type"), weights.get("group_size")
    stored = next((tensors[module + end] for end in _CODES if module + end in tensors), None)
    dtype = "none" if stored is None else stored.dtype
    said = f"{bits} bits of {kind} in groups of {group}, and {module} is stored as {dtype}"
    if kind == "float" and bits == 8 and dtype in DTYPES:
        return _bytes
    if kind == "int" and bits == 8 and dtype == "I8" and weights.get("symmetric", True):
        return _bytes
    if kind == "int" and bits in (2, 4, 8) and dtype == "I32":
        return _words
    if kind == "float" and bits == 4 and dtype == "U8" and group in (16, 32):
        return _nvfp4 if group == 16 else _mxfp4
    raise disagreeing(checkpoint, _METHOD, f"its group says {said}")


def _bytes(checkpoint: Stored, module: str, weights: Mapping[str, Any], dtype: str) -> Coded:
    strategy, shape = weights.get("strategy"), checkpoint.tensors[f"{module}.weight"].shape
    block, group = weights.get("block_structure"), weights.get("group_size")
    sizes = {
        "tensor": None,
        "channel": (1, shape[-1]),
        "block": tuple(block) if block else None,
        "group": (1, int(group)) if group else None,
    }
    if f"{module}.weight_g_idx" in checkpoint.tensors:
        raise disagreeing(checkpoint, _METHOD, f"{module} has bytes in an order of groups")
    zero = f"{module}.weight_zero_point"
    if zero in checkpoint.tensors and bool(checkpoint.read(zero).to(torch.float32).any()):
        raise disagreeing(checkpoint, _METHOD, f"{module} is symmetric, and has zeros other than 0")
    if strategy not in sizes or (strategy in ("block", "group") and sizes[strategy] is None):
        raise disagreeing(checkpoint, _METHOD, f"{module} has scales by {strategy!r}")
    kind = "FP8" if weights["type"] == "float" else "INT8"
    return coded_fp8(
        checkpoint,
        (f"{module}.weight", f"{module}.weight_scale"),
        sizes[strategy],
        dtype,
        kind if strategy == "tensor" else f"{kind} by {strategy}",
        beside=beside(checkpoint, module, _BESIDE),
    )


def _words(checkpoint: Stored, module: str, weights: Mapping[str, Any], dtype: str) -> Coded:
    bits, tensors = int(weights["num_bits"]), checkpoint.tensors
    packed, scale = tensors[f"{module}.weight_packed"].shape, tensors[f"{module}.weight_scale"]
    if f"{module}.weight_shape" not in tensors:
        raise disagreeing(checkpoint, _METHOD, f"{module} has no weight_shape")
    size = weights.get("group_size")
    shape = _words_shape(checkpoint, module, bits, int(size) if size and size > 0 else None)
    each = int(size) if size and size > 0 else shape[-1]
    groups = -(-shape[-1] // each)
    if packed != (shape[0], -(-shape[1] // (32 // bits))) or scale.shape != (shape[0], groups):
        raise disagreeing(checkpoint, _METHOD, f"{module} of {shape} has other numbers of codes")
    in_order = Groups(checkpoint, shape[1], each, f"{module}.weight_g_idx")
    lowest, zero = -(1 << (bits - 1)), None
    if not weights.get("symmetric", True):
        if f"{module}.weight_zero_point" not in tensors:
            raise disagreeing(checkpoint, _METHOD, f"{module} has no weight_zero_point")
        stored = tensors[f"{module}.weight_zero_point"]
        if stored.dtype != "I32" or stored.shape != (-(-shape[0] // (32 // bits)), groups):
            said = f"{module} has zeros {stored.dtype} {list(stored.shape)}, which are no words"
            raise disagreeing(checkpoint, _METHOD, said)
        zero = ZeroPoints(checkpoint, f"{module}.weight_zero_point", bits, lowest, None)
    return Coded(
        name=f"{module}.weight",
        shape=shape,
        dtype=dtype,
        format=f"W{bits}A16",
        levels=integers(bits, lowest),
        codes=RowWords(checkpoint, f"{module}.weight_packed", bits, shape[1]),
        scales=GroupScales(checkpoint, scale.name, in_order, turned=False, zero=zero),
        beside=beside(checkpoint, module, _BESIDE),
    )


def _words_shape(checkpoint: Stored, module: str, bits: int, group: int | None) -> tuple[int, ...]:
    """Return the shape of a weight, by the headers where words and groups are full."""
    tensors, each = checkpoint.tensors, 32 // bits
    (rows, words), scale = (
        tensors[f"{module}.weight_packed"].shape,
        tensors[f"{module}.weight_scale"],
    )
    if group is not None and len(scale.shape) == 2 and scale.shape[1] * group == words * each:
        return rows, words * each
    return tuple(checkpoint.read(f"{module}.weight_shape").tolist())


def _nvfp4(checkpoint: Stored, module: str, weights: Mapping[str, Any], dtype: str) -> Coded:
    scale, factor = f"{module}.weight_scale", f"{module}.weight_global_scale"
    if factor not in checkpoint.tensors:
        raise disagreeing(checkpoint, _METHOD, f"{module} has no weight_global_scale")
    shape = _fp4_shape(checkpoint, module, 16)
    scales = Float8Scales(checkpoint, scale, factor, 16, divided=True)
    return _fp4(checkpoint, module, shape, dtype, "NVFP4", scales)


def _mxfp4(checkpoint: Stored, module: str, weights: Mapping[str, Any], dtype: str) -> Coded:
    shape = _fp4_shape(checkpoint, module, 32)
    if (stored := checkpoint.tensors[f"{module}.weight_scale"].dtype) != "U8":
        raise disagreeing(checkpoint, _METHOD, f"{module} has exponents stored as {stored}")
    scales = ExponentScales(checkpoint, f"{module}.weight_scale", 32)
    return _fp4(checkpoint, module, shape, dtype, "MXFP4", scales)


def _fp4_shape(checkpoint: Stored, module: str, group: int) -> tuple[int, ...]:
    tensors = checkpoint.tensors
    rows, packed = tensors[f"{module}.weight_packed"].shape
    if tensors[f"{module}.weight_scale"].shape != (rows, -(-2 * packed // group)):
        raise disagreeing(checkpoint, _METHOD, f"{module} has other scales than groups of {group}")
    return rows, 2 * packed


def _fp4(
    checkpoint: Stored,
    module: str,
    shape: tuple[int, ...],
    dtype: str,
    title: str,
    scales: Float8Scales | ExponentScales,
) -> Coded:
    codes = Nibbles(checkpoint, f"{module}.weight_packed")
    others = beside(checkpoint, module, _BESIDE)
    return Coded(f"{module}.weight", shape, dtype, title, e2m1(), codes, scales, others)
