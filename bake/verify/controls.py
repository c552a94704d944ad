"""Broken bakes that have to fail: a comparison that passes them could not see a mistake.

Each takes the baked checkpoint and spoils it as a careless tool would: a tensor keeps the value of
the base, a change has the wrong sign, a bias is left at zero, the output head stays tied to the
edited embedding. They are made from the two checkpoints and the record alone, without the fold.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bake.checkpoints import Checkpoint
from bake.families import Layout
from bake.verify.artifact import Baked


@dataclass(frozen=True, slots=True)
class Control:
    """One way to break a bake."""

    kind: str
    """``forgotten tensor``, ``flipped sign``, ``forgotten bias`` or ``tied head``."""
    tensor: str

    def tensors(self, base: Checkpoint, baked: Checkpoint, layout: Layout) -> dict[str, Tensor]:
        """Return the tensors of the broken bake that differ from the baked checkpoint's.

        Args:
            base: the base checkpoint.
            baked: the baked checkpoint.
            layout: that of the baked checkpoint.
        """
        if self.kind == "tied head":
            return {self.tensor: baked.read(layout.embed)}
        good = baked.read(self.tensor)
        known = self.tensor in base.tensors
        before = base.read(self.tensor) if known else torch.zeros_like(good)
        if self.kind == "flipped sign":
            wide = 2 * before.to(torch.float64) - good.to(torch.float64)
            return {self.tensor: wide.to(good.dtype)}
        return {self.tensor: before.to(good.dtype)}


def groups_of(
    artifact: Baked, base: Checkpoint, baked: Checkpoint, layout: Layout
) -> tuple[tuple[Control, ...], ...]:
    """Return the controls of each kind, in an order that the plan's digest decides.

    A kind that the plan gives no occasion for (no bias, no head that was tied) is left out.
    """
    chance = random.Random(artifact.plan_digest)
    plan = artifact.record.plan
    weights = [t.name for t in plan.tensors if _same_shape(t.name, base, baked)]
    biases = [b.name for b in plan.biases if b.name in baked.tensors]
    head = layout.unembed.weight
    untied = head in baked.tensors and head not in base.tensors
    groups = (
        [Control("forgotten tensor", name) for name in weights],
        [Control("flipped sign", name) for name in weights],
        [Control("forgotten bias", name) for name in biases],
        [Control("tied head", head)] if untied else [],
    )
    return tuple(tuple(chance.sample(group, len(group))) for group in groups if group)


def _same_shape(name: str, base: Checkpoint, baked: Checkpoint) -> bool:
    if name not in base.tensors or name not in baked.tensors:
        return False
    return base.tensors[name].shape == baked.tensors[name].shape


def changed(
    group: tuple[Control, ...], base: Checkpoint, baked: Checkpoint, layout: Layout
) -> Iterator[tuple[Control, dict[str, Tensor]]]:
    """Yield the controls of one kind whose tensors really differ from the baked ones."""
    for control in group:
        tensors = control.tensors(base, baked, layout)
        if any(not torch.equal(value, baked.read(name)) for name, value in tensors.items()):
            yield control, tensors
