"""How edits without an exact fold are relocated, and what a finding says of it."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bake.checkpoints.dtypes import torch_dtype
from bake.plan.quotient import ERROR, MEANT, Gate
from bake.plan.relocate import stretch
from bake.plan.stream_fold import Relocated, Relocation, StreamFold

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


def into(
    fresh: Float[Tensor, "m d"], dtype: str, *, constants: bool, gate: Gate | None, size: float
) -> Relocation:
    """Return how edits are relocated into dimensions of their own, or computed.

    What a writer before a norm keeps beside, ε of its size, its norm sees: ε² is the roundoff.

    Args:
        fresh: the dimensions, as unit vectors.
        dtype: what the weights are stored in.
        constants: whether constants that no bias takes are read from the embedding.
        gate: of gated layers that may compute edits.
        size: what the embedding sets one dimension to for these.
    """
    roundoff = torch.finfo(torch_dtype(dtype, where="the embedding")).eps / 2
    least = 2.0 ** round(math.log2(math.sqrt(roundoff)))
    return Relocation(FREE, FREE, fresh, least, constants, gate, size)


def relocated(stream: StreamFold, edit: int, places: str) -> str:
    """Return what a finding says of an edit that is relocated.

    Args:
        stream: the folded stream.
        edit: its index.
        places: where it is folded into, in words.
    """
    words = f"{places}; relocated"
    computed = [one for one in stream.computed.values() if edit in one.edits]
    if computed:
        least, most = MEANT
        words += f": {max(one.count for one in computed)} neurons of a block apply it to what they "
        words += f"read, to {ERROR:.0e} of itself for a stream whose root mean square is between "
        words += f"{least:.3g} and {most:.4g}, in bfloat16 or float32 (in float16 gates overflow)"
    moved = [one for one in stream.relocated if one.hook.edit == edit]
    if moved:
        words += _before(moved)
    aside = [hook for hook in stream.aside if hook.edit == edit]
    if aside:
        first = min((hook.site for hook in aside), key=lambda site: site.order)
        words += f": behind {first} it is applied by what reads the stream, and the norms see what "
        words += "it removes as well"
    for one in stream.constants:
        if edit in one.edits:
            words += f": its constant, {one.size:.3g} long, is read from a dimension that the "
            words += f"embedding sets, and the norms behind {one.site} do not see it"
            break
    return words


def _before(moved: Sequence[Relocated]) -> str:
    scales = [stretch(one.carried.forward) for one in moved]
    least, most = min(low for low, _ in scales), max(high for _, high in scales)
    left = max(0.0 if one.cleared else one.carried.left for one in moved)
    site = max((one.hook.site for one in moved), key=lambda site: site.order)
    words = f": up to {site} the norms see a stream whose length is {least:.3g} "
    words += f"to {most:.3g} times the hooked one's, as much of it as lies along the edit"
    aside = max((one.carried.scale for one in moved if one.fresh), default=0.0)
    if aside:
        words += (
            f", and behind it {aside:.3g} times what the edit removes, in dimensions of its own"
        )
    if left:
        words += f", and {left:.3g} of the edit is left undone"
    return words
