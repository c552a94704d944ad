"""How far a plan lies from what it is held against, and how far a broken one from the sound one.

A plan is judged in one of three ways, by what it promises. Each measures two things of a broken
plan: ``missed``, which is judged by the limit of the sound one, and ``moved``, how far the mistake
has taken it from the sound one. By the triangle inequality a plan that the mistake moves by
``enough`` lies beyond the limit, if the sound one does not. A smaller mistake may be overlooked
without anything being wrong with the comparison.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from bake.edits import Edit
from bake.verify.fixed_point import apart, distance
from bake.verify.limits import Limits
from bake.verify.metrics import largest_difference, mean_kl
from bake.verify.runs import Trace


@dataclass(frozen=True, eq=False)
class PlanMeasure(ABC):
    """How a plan is judged."""

    limit: float
    """What a sound plan may miss."""

    @property
    def enough(self) -> float:
        """How far a mistake has to move a plan so that it must be told."""
        return 2 * self.limit

    @abstractmethod
    def missed(self, broken: Trace) -> float:
        """Return how far a broken plan lies from what the sound one is held against."""

    @abstractmethod
    def moved(self, broken: Trace, sound: Trace) -> float:
        """Return how far it lies from the sound one, over the same tokens."""


def measure_of(limits: Limits, nulled: Sequence[Edit]) -> PlanMeasure:
    """Return how the plan of a verification is judged.

    Args:
        limits: what it may miss, and what that is counted from.
        nulled: the edits that are to have nothing left to do, of a plan that is nulling.
    """
    evidence = limits.evidence
    if limits.exactness == "nulling":
        return FixedPoint(limits.fixed_point, nulled)
    if limits.exactness == "relocated":
        return Share(limits.relocated, evidence.hooked.logits, evidence.base.logits)
    return Equality(limits.plan, evidence.meant.logits)


@dataclass(frozen=True, eq=False)
class Equality(PlanMeasure):
    """The same logits: the largest difference of any."""

    meant: Tensor

    @override
    def missed(self, broken: Trace) -> float:
        return largest_difference(broken.logits, self.meant[: len(broken.logits)])

    @override
    def moved(self, broken: Trace, sound: Trace) -> float:
        return largest_difference(broken.logits, sound.logits)


@dataclass(frozen=True, eq=False)
class Share(PlanMeasure):
    """The share of the effect that is lost: mean KL(hooked ‖ plan) over mean KL(hooked ‖ base).

    To second order a divergence is the square of a distance, so four limits are twice the distance.
    """

    hooked: Tensor
    base: Tensor

    @property
    @override
    def enough(self) -> float:
        return 4 * self.limit

    @override
    def missed(self, broken: Trace) -> float:
        return self._over_effect(self.hooked[: len(broken.logits)], broken)

    @override
    def moved(self, broken: Trace, sound: Trace) -> float:
        return self._over_effect(sound.logits, broken)

    def _over_effect(self, reference: Tensor, broken: Trace) -> float:
        count = len(broken.logits)
        effect = mean_kl(self.hooked[:count], self.base[:count])
        return mean_kl(reference, broken.logits) / effect if effect else 0.0


@dataclass(frozen=True, eq=False)
class FixedPoint(PlanMeasure):
    """What the edits would still do to the stream."""

    edits: Sequence[Edit]

    @override
    def missed(self, broken: Trace) -> float:
        return distance(self.edits, broken.streams)[0]

    @override
    def moved(self, broken: Trace, sound: Trace) -> float:
        return apart(self.edits, broken.streams, sound.streams)
