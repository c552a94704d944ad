"""``Interval``: a mean with its 95 % confidence interval, of one model or of two compared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

NORMAL = 1.959964  # the 97.5 % point of the normal distribution: intervals hold 95 %


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    count: int

    def exponentiated(self) -> "Interval":
        """Return it as a perplexity, or a ratio of two, where it is of losses in nats."""
        value, low, high = (math.exp(x) for x in (self.value, self.low, self.high))
        return Interval(value, low, high, self.count)


def mean(values: Sequence[float]) -> Interval:
    """Return the mean of numbers, with the normal interval."""
    n = len(values)
    middle = sum(values) / n
    if n < 2:
        return Interval(middle, middle, middle, n)
    spread = math.sqrt(sum((value - middle) ** 2 for value in values) / (n - 1) / n)
    return Interval(middle, middle - NORMAL * spread, middle + NORMAL * spread, n)


def share(hits: Sequence[bool]) -> Interval:
    """Return a share with Wilson's interval (Wilson 1927), which holds at 0 and 1 as well."""
    n, p = len(hits), sum(hits) / len(hits)
    z2 = NORMAL**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half), n)


def mean_or_share(values: Sequence[float], *, unit: bool) -> Interval:
    """Return the mean of values; a share where they are all 0 or 1, and mean no and yes.

    Args:
        values: of each text.
        unit: whether no value lies outside of 0 and 1.
    """
    if unit and {*values} <= {0.0, 1.0}:
        return share([value == 1.0 for value in values])
    return mean(values)


def difference(first: Sequence[float], second: Sequence[float], *, unit: bool) -> Interval:
    """Return the mean of first − second, text by text.

    Values between 0 and 1 get the interval of Agresti and Min (2005, "Simple improved confidence
    intervals for comparing matched proportions"): with two texts more, on half of which the two
    differ one way and the other. Without, two models that agree on three texts would be equal.

    Args:
        first: of each text.
        second: of the same texts.
        unit: whether no value lies outside of 0 and 1.
    """
    apart = [a - b for a, b in zip(first, second, strict=True)]
    if not unit:
        return mean(apart)
    n, total = len(apart) + 2, sum(apart)
    spread = math.sqrt(sum(x * x for x in apart) + 1 - total * total / n) / n
    centre = total / n
    return Interval(
        total / len(apart), centre - NORMAL * spread, centre + NORMAL * spread, len(apart)
    )


def clustered(values: Sequence[Sequence[float]]) -> Interval:
    """Return the mean over all numbers, which come in groups that are not independent inside.

    The variance is that of the groups' sums about the mean (Liang and Zeger 1986), with the factor
    G / (G − 1) for G groups: tokens of one passage are wrong together.

    Args:
        values: the numbers of each group; two groups at least.
    """
    total = sum(map(sum, values))
    count, groups = sum(map(len, values)), len(values)
    middle = total / count
    squares = sum((sum(group) - middle * len(group)) ** 2 for group in values)
    spread = math.sqrt(squares * groups / (groups - 1)) / count
    return Interval(middle, middle - NORMAL * spread, middle + NORMAL * spread, count)
