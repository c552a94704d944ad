"""AUROC: the probability that an example of one class scores above one of the other."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from bake.verify.interval import NORMAL, Interval

CHANCE = 0.5


def auroc(positive: Float[Tensor, " n"], negative: Float[Tensor, " m"]) -> Interval:
    """Return the AUROC of scores with its 95 % confidence interval; ties count a half.

    The interval is that of Newcombe (2006, "Confidence intervals for an effect size measure based
    on the Mann-Whitney statistic", part 2, method 5): every θ whose distance from the estimate is
    at most z standard errors at θ, with Hanley and McNeil's variance. It has a width at 1 as well.
    ``count`` is the number of examples of both classes.
    """
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive, right=False)
    upto = torch.searchsorted(ordered, positive, right=True)
    n, m = len(positive), len(negative)
    value = float((below + upto).sum()) / (2 * n * m)
    return Interval(value, _limit(value, 0.0, n, m), _limit(value, 1.0, n, m), n + m)


def _limit(value: float, end: float, n: int, m: int) -> float:
    """Return the θ between the estimate and an end of [0, 1] that is z standard errors away."""
    inside, outside = value, end
    for _ in range(60):  # halves the distance: below the resolution of a double
        middle = (inside + outside) / 2
        if abs(value - middle) <= NORMAL * _error(middle, n, m):
            inside = middle
        else:
            outside = middle
    return inside


def _error(theta: float, n: int, m: int) -> float:
    """Return the standard error of an AUROC that is θ in truth."""
    others = (n + m) / 2 - 1
    shape = 1 + others * ((1 - theta) / (2 - theta) + theta / (1 + theta))
    return math.sqrt(max(0.0, theta * (1 - theta) * shape / (n * m)))


def margin(positive: Float[Tensor, " n"], negative: Float[Tensor, " m"]) -> float:
    """Return the gap of the classes' mean scores in units of their spread (Cohen's d).

    Infinite where the classes have no spread and differ.
    """
    gap = float(positive.mean() - negative.mean())
    spread = math.sqrt(float(positive.var(correction=0) + negative.var(correction=0)) / 2)
    return gap / spread if spread else math.copysign(math.inf, gap) if gap else 0.0
