"""``quant_method`` modelopt: FP8 and NVFP4 as NVIDIA's Model Optimizer exports them.

Mirrors vLLM's ``quantization/modelopt.py``: ``weight`` beside ``weight_scale`` and, of NVFP4,
``weight_scale_2``, all of which multiply.
"""

from collections.abc import Mapping
from typing import Any

from bake.checkpoints.quantised.coded import Coded
from bake.checkpoints.quantised.fine_grained import CACHE
from bake.checkpoints.quantised.found import Found, beside, disagreeing
from bake.checkpoints.quantised.fp8 import DTYPES, coded_fp8
from bake.checkpoints.quantised.levels import e2m1
from bake.checkpoints.quantised.nibbles import Float8Scales, Nibbles
from bake.checkpoints.quantised.stored import Stored

_GROUP = 16


def find(checkpoint: Stored, settings: Mapping[str, Any], dtype: str) -> Found:
    """Return the weights of a checkpoint whose configuration says ``modelopt``.

    Raises:
        CheckpointError: the configuration and the tensors disagree.
    """
    algorithm = settings.get("quant_algo")
    coded, loose = [], [name for name in checkpoint.tensors if name.endswith(CACHE)]
    for name in checkpoint.tensors:
        if not name.endswith(".weight_scale"):
            continue
        module = name.removesuffix(".weight_scale")
        weight = checkpoint.tensors.get(f"{module}.weight")
        stored = "none" if weight is None else weight.dtype
        if algorithm == "FP8" and stored in DTYPES:
            others = beside(checkpoint, module, ("input_scale",))
            names = f"{module}.weight", name
            coded.append(coded_fp8(checkpoint, names, None, dtype, "FP8", beside=others))
        elif algorithm == "NVFP4" and stored == "U8":
            coded.append(_nvfp4(checkpoint, module, dtype))
        else:
            said = f"it says {algorithm!r}, and {module} is stored as {stored}"
            raise disagreeing(checkpoint, "modelopt", said)
    return Found(tuple(coded), tuple(loose))


def _nvfp4(checkpoint: Stored, module: str, dtype: str) -> Coded:
    tensors, names = checkpoint.tensors, [f"{module}.weight_scale", f"{module}.weight_scale_2"]
    rows, packed = tensors[f"{module}.weight"].shape
    if names[1] not in tensors or tensors[names[0]].shape != (rows, -(-2 * packed // _GROUP)):
        raise disagreeing(checkpoint, "modelopt", f"{module} has other scales than NVFP4's")
    scales = Float8Scales(checkpoint, names[0], names[1], _GROUP, divided=False)
    codes, others = (
        Nibbles(checkpoint, f"{module}.weight"),
        beside(checkpoint, module, ("weight_scale_2", "input_scale")),
    )
    shape = rows, 2 * packed
    return Coded(f"{module}.weight", shape, dtype, "NVFP4", e2m1(), codes, scales, others)
