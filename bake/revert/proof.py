"""Whether a base is the one that an artifact was made of.

The layout of a base says nothing of its weights. A record holds the sha256 of every edited tensor
as the base has it, which decides. Records of earlier versions do not; but the base's tensors have
to lead to the artifact's: folding is deterministic, so the same base gives the same bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bake.affine import EPSILON
from bake.artifact.base_digests import refuse_other_base
from bake.artifact.carrier import KINDS
from bake.checkpoints import Checkpoint, Producer
from bake.errors import InputError
from bake.outputs.checkpoint import planned_tensors
from bake.progress import Progress
from bake.revert.plan import recompiled, same_updates
from bake.revert.record import Revertible

_FACTOR = 8  # two sums and their roundings, and a margin of two


@dataclass(frozen=True, slots=True)
class Proof:
    """What baking a base again has shown.

    Attributes:
        proven: whether it gives the artifact.
        note: what there is to say where it does not say it outright.
    """

    proven: bool
    note: str | None = None


def prove_base(
    baked: Revertible,
    base: Checkpoint,
    artifact: Checkpoint,
    progress: Progress | None = None,
) -> Proof:
    """Compare a base's tensors with the recorded hashes, or fold the recorded edits into it.

    Args:
        baked: the artifact.
        base: the base that may be the recorded one.
        artifact: its checkpoint.
        progress: called with the bytes of tensors that are compared and their total.

    Raises:
        InputError: a tensor is another one, or leads to another than the artifact's.
    """
    if baked.record.base_tensors:
        refuse_other_base(baked.record.base_tensors, base, progress)
        return Proof(True)
    if (reason := _unprovable(baked)) is not None:
        return Proof(False, reason)
    plan = recompiled(baked, base)
    if not same_updates(baked, plan):
        made, here = baked.record.bake, _version()
        return Proof(
            False,
            f"not proven to be the recorded base: bake {here} compiles another plan than the "
            f"recorded one, made by bake {made}; the edited tensors are those of the named base",
        )
    replace, new = planned_tensors(plan, base)
    produced = {**replace, **{name: tensor.produce for name, tensor in new.items()}}
    total, done, apart = sum(artifact.tensors[name].nbytes for name in produced), 0, 0
    for name, produce in produced.items():
        apart += _compare(name, produce, base, artifact)
        done += artifact.tensors[name].nbytes
        if progress is not None:
            progress(done, total)
    if apart:
        return Proof(
            False,
            f"not proven to the last bit to be the recorded base: {apart:,} values of the edit "
            "come out one rounding step apart, as sums in another order do on another machine; "
            "the edited tensors are those of the named base",
        )
    return Proof(True)


def _unprovable(baked: Revertible) -> str | None:
    """Return why the edit cannot be folded again, or None."""
    if KINDS[baked.record.kind].exported:
        return None
    return (
        "not proven to be the recorded base, since a merge keeps no copy of its adapter: the "
        "merged tensors are those of the named base"
    )


def _compare(name: str, produce: Producer, base: Checkpoint, artifact: Checkpoint) -> int:
    """Return how many values differ, refused where another order of summation cannot explain it.

    The errors of a float64 sum of d terms add up to about √d·2⁻⁵² of their size. That changes a
    rounding only where a value lies that close to the middle of two neighbours, which of n values
    befalls about n·√d·2⁻⁵²/ε, with ε the spacing of the storage type: none at all in bfloat16, and
    a few in the largest tensors of float32.
    """
    info = artifact.tensors[name]
    start, differing, furthest = 0, 0, 0
    for tile in produce():
        stop = start + tile.shape[0]
        found = artifact.read_rows(name, start, stop)
        unequal = (tile != found) & ~(tile.isnan() & found.isnan())
        differing += int(unequal.sum())
        if bool(unequal.any()):
            furthest = max(furthest, _steps(tile[unequal], found[unequal]))
        start = stop
    elements = max(1, info.nbytes // max(1, info.torch_dtype.itemsize))
    spacing = torch.finfo(info.torch_dtype).eps
    terms = max(info.shape, default=1) ** 0.5
    allowed = int(elements * terms * EPSILON / spacing * _FACTOR)
    if differing > allowed or furthest > 1:
        raise InputError(
            f"the recorded edit of this base does not give the artifact: {name} differs in "
            f"{differing:,} of {elements:,} values",
            where=base.source,
            why="the base's weights are not those that the artifact was made of, or the "
            "artifact's were changed since",
            fix="name the base that the record names, or download the artifact again",
        )
    return differing


def _steps(a: Tensor, b: Tensor) -> int:
    """Return 1 where all values are neighbours of each other in their type, else 2."""
    return 1 if bool((torch.nextafter(a, b) == b).all()) else 2


def _version() -> str:
    from bake import __version__

    return __version__
