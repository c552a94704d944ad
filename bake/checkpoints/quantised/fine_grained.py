"""``quant_method`` fp8 and fbgemm_fp8: FP8 weights beside ``weight_scale_inv`` or ``weight_scale``.

Mirrors transformers' ``integrations/finegrained_fp8.py``; the blocks are counted from the first row
and column, as DeepSeek's own kernel does, so that the last ones may be short. (transformers derives
their size from the number of scales and refuses a matrix that is no whole number of blocks.)
"""

from collections.abc import Mapping
from typing import Any

from bake.checkpoints.quantised.coded import Coded
from bake.checkpoints.quantised.found import Found, beside, disagreeing
from bake.checkpoints.quantised.fp8 import DTYPES, coded_fp8
from bake.checkpoints.quantised.stored import Stored

_SCALES = ("_scale_inv", "_scale")
_BESIDE = ("input_scale", "activation_scale", "input_scale_ub")
CACHE = (".k_scale", ".v_scale", ".kv_scale", ".q_scale", ".prob_scale", ".output_scale")
"""Tensors of a cache, or of what a layer gives, that stands in fewer bits."""


def find(checkpoint: Stored, settings: Mapping[str, Any], dtype: str) -> Found:
    """Return the FP8 weights of a checkpoint.

    Raises:
        CheckpointError: the configuration and the tensors disagree.
    """
    method, size = str(settings["quant_method"]), settings.get("weight_block_size")
    coded, loose = [], []
    if size is not None and not _is_size(size):
        raise disagreeing(checkpoint, method, f"weight_block_size is {size!r}")
    each = None if size is None else (int(size[0]), int(size[1]))
    for name, info in checkpoint.tensors.items():
        if name.endswith(CACHE):
            loose.append(name)
        if info.dtype in DTYPES and len(info.shape) >= 2:
            scale = next((name + end for end in _SCALES if name + end in checkpoint.tensors), None)
            if scale is None:
                raise disagreeing(checkpoint, method, f"{name} is {info.dtype}, and has no scale")
            coded.append(_coded(checkpoint, (name, scale), each, dtype, settings))
    return Found(tuple(coded), tuple(loose))


def _is_size(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)


def _coded(
    checkpoint: Stored,
    names: tuple[str, str],
    size: tuple[int, int] | None,
    dtype: str,
    settings: Mapping[str, Any],
) -> Coded:
    weight, scale = names
    shape, held = checkpoint.tensors[weight].shape, checkpoint.tensors[scale].shape
    title = "FP8" if size is None else "block FP8"
    if size is None and held and held[-1] == 1 and held[:-1] == shape[:-1]:
        size = (1, shape[-1])  # fbgemm: a scale for each output
        title = "FP8 by channel"
    others = beside(checkpoint, weight.rpartition(".")[0], _BESIDE)
    power = settings.get("scale_fmt") == "ue8m0"
    return coded_fp8(checkpoint, names, size, dtype, title, power=power, beside=others)
