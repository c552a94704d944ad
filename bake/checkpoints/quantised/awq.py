"""AWQ: ``qweight``, ``qzeros`` and ``scales`` in the layout of its matrix product ("gemm").

Mirrors autoawq's ``modules/linear/gemm.py`` and ``utils/packing_utils.py``: a row of ``qweight`` is
an input, and eight outputs share a word, in an order of their own.
"""

from collections.abc import Mapping
from typing import Any

from bake.checkpoints.quantised.coded import Coded
from bake.checkpoints.quantised.found import Found, beside, disagreeing
from bake.checkpoints.quantised.levels import integers
from bake.checkpoints.quantised.stored import Stored
from bake.checkpoints.quantised.words import Groups, GroupScales, InterleavedWords, ZeroPoints
from bake.errors import CheckpointError

_BITS = 4
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each field of a word holds (``AWQ_ORDER``)."""


def find(checkpoint: Stored, settings: Mapping[str, Any], dtype: str) -> Found:
    """Return the weights of a checkpoint whose configuration says ``awq``.

    Raises:
        CheckpointError: the configuration and the tensors disagree, or it is another layout.
    """
    said = settings.get("bits", settings.get("w_bit")), str(settings.get("version", "gemm")).lower()
    if said != (_BITS, "gemm"):
        raise CheckpointError(
            f"the weights are quantised by AWQ to {said[0]!r} bits in the layout {said[1]!r}",
            where=checkpoint.source,
            why="bake reads four bits in the layout 'gemm'",
            fix="start from the unquantised base",
        )
    names = [name for name in checkpoint.tensors if name.endswith(".qweight")]
    return Found(tuple(_coded(checkpoint, name, settings, dtype) for name in names))


def _coded(checkpoint: Stored, name: str, settings: Mapping[str, Any], dtype: str) -> Coded:
    module, tensors = name.removesuffix(".qweight"), checkpoint.tensors
    inputs, words = tensors[name].shape
    outputs = words * len(_ORDER)
    scales, zeros = tensors.get(f"{module}.scales"), tensors.get(f"{module}.qzeros")
    size = settings.get("group_size", settings.get("q_group_size", -1))
    each = inputs if size == -1 else int(size)
    groups = -(-inputs // each)
    if scales is None or scales.shape != (groups, outputs):
        raise disagreeing(checkpoint, "awq", f"{module} has no scales for groups of {each}")
    if zeros is None or zeros.shape != (groups, words):
        raise disagreeing(checkpoint, "awq", f"{module} has no zeros for groups of {each}")
    zero = ZeroPoints(checkpoint, zeros.name, _BITS, 0, _ORDER)
    return Coded(
        name=f"{module}.weight",
        shape=(outputs, inputs),
        dtype=dtype,
        format="AWQ",
        levels=integers(_BITS, 0),
        codes=InterleavedWords(checkpoint, name, _BITS, _ORDER),
        scales=GroupScales(
            checkpoint, scales.name, Groups(checkpoint, inputs, each), turned=True, zero=zero
        ),
        beside=beside(checkpoint, module, ("qzeros",)),
    )
