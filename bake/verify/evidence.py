"""``Evidence``: what all runs of a verification came to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bake.sites import Site
from bake.verify.decoded import Decoded
from bake.verify.greedy import Generated
from bake.verify.leak import Leak
from bake.verify.loss import Divergence, split
from bake.verify.metrics import Compared, compare_logits, stream_differences
from bake.verify.rows import Row
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
    """What all runs of one verification came to.

    Logits are gigabytes. Those that everything is held against are kept; of any other run what is
    said of it, and no more.
    """

    transcript: Transcript
    base: Trace
    """The base model in float64; its logits alone."""
    hooked: Trace
    """The reference in float64: the base under hooks, or with an adapter at work."""
    meant: Trace
    """What the plan is held against: the hooked model; where stand-ins were fitted, these as
    hooks."""
    sites: tuple[Site, ...]
    """Where their streams are compared, in forward order."""
    texts: dict[str, Generated]
    """Greedy text in float32 of ``base``, ``hooked`` (the reference) and ``baked`` (the files).
    Where none is scored, ``base`` has the first few, and behind these ``baked`` may end with the
    token with which it parts from ``hooked``."""
    amplified: float = math.inf
    """max |Δlogit| of the reference in float32 from that in float64: it shows what the model makes
    of rounding."""
    missed: float = math.inf
    """max |Δlogit| of the planned model, of which nothing is rounded, from ``meant``."""
    held: Mapping[Site, Tensor] = field(default_factory=dict)
    """The planned model's stream where edits are that are to have nothing left to do."""
    compared: dict[str, Compared] = field(default_factory=dict)
    """``base``, ``planned`` (in float64) and ``stored`` (in float32 or what is wider; of a
    checkpoint alone) beside the hooked model."""
    apart: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """How far the streams of the same models lie from the hooked one's, per site of ``sites``."""
    leaks: tuple[Leak, ...] = ()
    """What every writer adds along the edited directions, in base and planned model."""
    controls: list[ControlRun] = field(default_factory=list)
    system: tuple[Row, ...] = ()
    """How far the plan is from what the edits' own systems do, where that is asked for."""
    decoded: Decoded | None = None
    """The weights of a GGUF, where the artifact was made from one of the base."""
    draws: list[Divergence] = field(default_factory=list)
    """The hooked base with its own weights moved by rounding, each a draw of its own."""
    seconds: float = 0.0
    """Spent in the models' own forward passes, by all runs."""

    @property
    def storage(self) -> tuple[Divergence, Divergence] | None:
        """The edit's effect, and what the stored weights lose of it; None where none were run."""
        if "stored" in self.compared:
            return self.divergence("base"), self.divergence("stored")
        return None if self.decoded is None else (self.decoded.effect, self.decoded.lost)

    def add(self, name: str, trace: Trace) -> None:
        """Compare a run with the hooked model: its logits, and the streams that it recorded."""
        sites = [site for site in self.sites if site in trace.streams]
        ours, theirs = self.hooked.streams, trace.streams
        last = [(name, (ours[site], theirs[site])) for site in sites[-1:]]
        self.compared |= compare_logits(self.hooked.logits, {name: trace.logits}, hidden=dict(last))
        self.apart[name] = stream_differences(ours, theirs, sites)

    def divergence(self, name: str) -> Divergence:
        """Return how far one of ``compared`` lies from the hooked model."""
        return split(torch.tensor(self.compared[name].kl), self.transcript.speaking)
