"""GPTQ: ``qweight``, ``qzeros``, ``scales`` and ``g_idx``.

Mirrors auto-gptq's ``nn_modules/qlinear/qlinear_cuda_old.py`` and GPTQModel's ``TorchQuantLinear``:
a column of ``qweight`` is an output, its inputs lie below one another in words, and ``g_idx`` says
which group an input is in, in whatever order they were quantised (act-order). ``qzeros`` holds
zero − 1, and the zero itself where ``checkpoint_format`` is ``gptq_v2``.
"""

from collections.abc import Mapping
from typing import Any

from bake.checkpoints.quantised.coded import Coded
from bake.checkpoints.quantised.found import Found, beside, disagreeing
from bake.checkpoints.quantised.levels import integers
from bake.checkpoints.quantised.stored import Stored
from bake.checkpoints.quantised.words import ColumnWords, Groups, GroupScales, ZeroPoints
from bake.errors import CheckpointError

_PARTS = ("qzeros", "scales")
_LAYOUTS = ("gptq", "gptq_v2")
"""Of ``checkpoint_format``: others (marlin, bitblas) hold the same bits in another order."""


def find(checkpoint: Stored, settings: Mapping[str, Any], dtype: str) -> Found:
    """Return the weights of a checkpoint whose configuration says ``gptq``.

    Raises:
        CheckpointError: the configuration and the tensors disagree, the bits of a code may lie in
            two words, or it is another layout.
    """
    bits = settings.get("bits")
    if bits not in (2, 4, 8):
        raise CheckpointError(
            f"the weights are quantised by GPTQ to {bits!r} bits",
            where=checkpoint.source,
            why="bake reads codes of 2, 4 and 8 bits, which do not lie across two words",
            fix="start from the unquantised base",
        )
    if (layout := settings.get("checkpoint_format", "gptq")) not in _LAYOUTS:
        raise CheckpointError(
            f"the weights are quantised by GPTQ in the layout {layout!r}",
            where=checkpoint.source,
            why=f"bake reads {' and '.join(_LAYOUTS)}",
            fix="start from the unquantised base",
        )
    names = [name for name in checkpoint.tensors if name.endswith(".qweight")]
    return Found(tuple(_coded(checkpoint, name, settings, dtype) for name in names))


def _coded(checkpoint: Stored, name: str, settings: Mapping[str, Any], dtype: str) -> Coded:
    module, bits = name.removesuffix(".qweight"), int(settings["bits"])
    tensors, each = checkpoint.tensors, 32 // int(settings["bits"])
    missing = [part for part in _PARTS if f"{module}.{part}" not in tensors]
    if missing:
        raise disagreeing(checkpoint, "gptq", f"{module} has no {missing[0]}")
    words, outputs = tensors[name].shape
    inputs, scales = words * each, tensors[f"{module}.scales"].shape
    size = int(settings.get("group_size", -1))
    groups = Groups(checkpoint, inputs, size if size > 0 else inputs, f"{module}.g_idx")
    zeros = tensors[f"{module}.qzeros"].shape
    wanted = scales[0], -(-outputs // each)
    count = -(-inputs // groups.size)
    if scales != (count, outputs) or zeros != wanted:
        raise disagreeing(checkpoint, "gptq", f"{module} has scales of shape {list(scales)}")
    added = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    zero = ZeroPoints(checkpoint, f"{module}.qzeros", bits, added, tuple(range(each)))
    return Coded(
        name=f"{module}.weight",
        shape=(outputs, inputs),
        dtype=dtype,
        format=f"GPTQ of {bits} bits",
        levels=integers(bits, 0),
        codes=ColumnWords(checkpoint, name, bits, inputs),
        scales=GroupScales(checkpoint, f"{module}.scales", groups, turned=True, zero=zero),
        beside=beside(checkpoint, module, ("qzeros", "g_idx")),
    )
