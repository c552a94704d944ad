"""``Limits``: what the rows of one verification are held to."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from bake.verify.evidence import Evidence
from bake.verify.fixed_point import distance
from bake.verify.inputs import Inputs
from bake.verify.loss import Divergence, mean_of, rounding_divergence
from bake.verify.metrics import largest_difference
from bake.verify.tolerance import (
    FLOOR_FACTOR,
    LOSS_FACTOR,
    MOST_KL,
    RELOCATED_KL,
    SHARE,
    logit_tolerance,
    logprob_tolerance,
    stream_tolerance,
)


@dataclass(frozen=True, eq=False)
class Limits:
    """What the rows of one verification are held to."""

    inputs: Inputs
    evidence: Evidence

    @property
    def exactness(self) -> str:
        """What the plan says of the artifact."""
        return self.inputs.artifact.exactness

    @cached_property
    def scale(self) -> float:
        """The largest logit of the hooked model."""
        return float(self.evidence.hooked.logits.abs().max())

    @cached_property
    def effect(self) -> float:
        """max |Δlogit| of hooked against base, in float64."""
        return largest_difference(self.evidence.hooked.logits, self.evidence.base.logits)

    @cached_property
    def rounding(self) -> float:
        """What rounding in float64 alone may move a logit by.

        To the general bound comes what this model makes of rounding: a token whose stream has a
        small variance before a norm amplifies it. float32 shows how much, and float64 rounds by
        another machine epsilon.
        """
        evidence, shape, scale = self.evidence, self.inputs.shape, self.scale
        bound = logit_tolerance(
            torch.float64, layers=shape.layers, hidden=shape.hidden, scale=scale
        )
        unit = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return bound + FLOOR_FACTOR * unit * evidence.amplified

    @property
    def plan(self) -> float:
        """What the planned model may differ by from the hooked one, in a logit."""
        return max(SHARE * self.effect, self.rounding)

    @property
    def relocated(self) -> float:
        """The share of the effect that a relocated plan may lose before anything is rounded."""
        most = self.inputs.most_kl
        return RELOCATED_KL if most is None else most

    @cached_property
    def fixed_point(self) -> float:
        """How far a nulling plan's stream may be from a fixed point of its edits."""
        _, scale = distance(self.inputs.nulled, self.evidence.held)
        return stream_tolerance(torch.float64, layers=self.inputs.shape.layers, scale=scale)

    @cached_property
    def arithmetic(self) -> float:
        """The KL that arithmetic in float32 may add, in nats."""
        shape, scale = self.inputs.shape, self.scale
        tolerance = logprob_tolerance(
            torch.float32, layers=shape.layers, hidden=shape.hidden, scale=scale
        )
        return rounding_divergence(tolerance)

    @property
    def floor(self) -> Divergence:
        """What rounding of the same weights costs where nothing is edited; zero where none is."""
        draws = self.evidence.draws
        return mean_of(draws) if draws else Divergence(0.0, 0.0)

    @property
    def most(self) -> float:
        """The share of the effect that may be lost, whatever the floor is."""
        return MOST_KL if self.inputs.most_kl is None else self.inputs.most_kl

    def loss(self, effect: Divergence, *floors: float) -> float | None:
        """Return the share of the effect that storage and runtime may lose, or None.

        Args:
            effect: of the edit, over the tokens that are compared.
            floors: shares of it that are lost where nothing was edited.
        """
        if self.exactness == "nulling":
            # Another function than the hooked one, which is said, and no loss.
            return self.inputs.most_kl
        if self.exactness != "exact":
            return self.most
        slack = self.arithmetic / effect.largest if effect.largest else math.inf
        if slack >= 1:
            return math.inf  # no edit is told from none here, which the control says
        return min(self.most, LOSS_FACTOR * sum(floors) + slack)
