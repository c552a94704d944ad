"""``Evidence``: what all runs of a verification came to."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bake.verify.decoded import Decoded
from bake.verify.greedy import Generated
from bake.verify.loss import Divergence, split
from bake.verify.metrics import Compared
from bake.verify.runs import Trace
from bake.verify.transcript import Transcript


@dataclass(frozen=True, slots=True)
class ControlRun:
    """One broken plan, in float64. Its logits are not kept: there may be many of them.

    Attributes:
        kind: of mistake.
        tensor: that is spoiled.
        value: how far it lies from what the plan is held against, as the plan is judged.
        limit: what a sound plan may.
        moved: how far it lies from the sound plan, by the same measure.
        enough: how much of that has to be told.
        kl: mean over tokens of KL(hooked ‖ broken) in nats, where stand-ins are worth something.
    """

    kind: str
    tensor: str
    value: float
    limit: float
    moved: float
    enough: float
    kl: float | None = None

    @property
    def faint(self) -> bool:
        """Whether it was not told, and moves the plan by no more than two sound ones may differ."""
        return self.value <= self.limit and self.moved <= self.enough


@dataclass(slots=True, eq=False)
class Evidence:
    """All runs of one verification."""

    transcript: Transcript
    base: Trace
    """The base model in float64."""
    hooked: Trace
    """The reference in float64: the base under hooks, or with an adapter at work."""
    planned: Trace
    """What the plan makes of the base, in float64: nothing of it is rounded."""
    meant: Trace
    """What the plan is held against: the hooked model; where stand-ins were fitted, these as
    hooks."""
    narrow: Trace
    """The reference in float32, whose distance from float64 shows what the model amplifies."""
    texts: dict[str, Generated]
    """Greedy text in float32 of ``base``, ``hooked`` (the reference) and ``baked`` (the files).
    Where none is scored, ``base`` has the first few, and behind these ``baked`` may end with the
    token with which it parts from ``hooked``."""
    stored: Trace | None = None
    """The artifact's own weights, in float32 or what is wider; None where it is no checkpoint."""
    missed: float = math.inf
    """max |Δlogit| of ``planned`` from ``meant``."""
    compared: dict[str, Compared] = field(default_factory=dict)
    """``base``, ``planned`` and ``stored`` beside the hooked model."""
    controls: list[ControlRun] = field(default_factory=list)
    system: Tensor | None = None
    """Logits in float64 under the hooks of the edits' own systems, where they are asked for."""
    decoded: Decoded | None = None
    """The weights of a GGUF, where the artifact was made from one of the base."""
    draws: list[Divergence] = field(default_factory=list)
    """The hooked base with its own weights moved by rounding, each a draw of its own."""
    seconds: float = 0.0
    """Spent in the models' own forward passes, by all runs."""

    @property
    def storage(self) -> tuple[Divergence, Divergence] | None:
        """The edit's effect, and what the stored weights lose of it; None where none were run."""
        if self.stored is not None:
            return self.divergence("base"), self.divergence("stored")
        return None if self.decoded is None else (self.decoded.effect, self.decoded.lost)

    def divergence(self, name: str) -> Divergence:
        """Return how far one of ``compared`` lies from the hooked model."""
        return split(torch.tensor(self.compared[name].kl), self.transcript.speaking)
