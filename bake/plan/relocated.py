"""How edits without an exact fold are relocated, and what a finding says of it."""

import math
from collections.abc import Sequence

import torch

from bake.checkpoints.dtypes import torch_dtype
from bake.plan.relocate import stretch
from bake.plan.stream import Relocated, Relocation

LEAST = 2.0**-6
"""α in place at least: a checkpoint in float32 may be served in bfloat16."""
FREE = 0.375
"""α where nothing of the edit is left. The norms before the edit miss 1 − α² of the component's
energy, those behind it have α² too much: from a quarter to a half the sum is flat."""


def in_place(dtype: str) -> Relocation:
    """Return how edits are relocated in the stream's own dimensions.

    α of an edit is left, and what is read is rounded 1 / α times as coarsely: α = √u makes the two
    equal, u being the unit roundoff of what the weights are stored in.
    """
    roundoff = torch.finfo(torch_dtype(dtype, where="the embedding")).eps / 2
    return Relocation(max(LEAST, math.sqrt(roundoff)), FREE)


def relocated(moved: Sequence[Relocated], places: str) -> str:
    """Return what a finding says of an edit that is relocated.

    Args:
        moved: its hooks without an exact fold.
        places: where it is folded into, in words.
    """
    scales = [stretch(one.carried.forward) for one in moved]
    least, most = min(low for low, _ in scales), max(high for _, high in scales)
    left = max(0.0 if one.cleared else one.carried.left for one in moved)
    site = max((one.hook.site for one in moved), key=lambda site: site.order)
    words = f"{places}; relocated: up to {site} the norms see a stream whose length is {least:.3g} "
    words += f"to {most:.3g} times the hooked one's, as much of it as lies along the edit"
    aside = max((one.carried.scale for one in moved if one.fresh), default=0.0)
    if aside:
        words += (
            f", and behind it {aside:.3g} times what the edit removes, in dimensions of its own"
        )
    if left:
        words += f", and {left:.3g} of the edit is left undone"
    return words
