"""The tolerances of every comparison, derived here once."""

import math

import torch

SAFETY = 8.0
FLOOR_FACTOR = 4.0
"""How far above its measured error in float32 the reference may err in float64, by the ratio of the
machine epsilons: the largest of all logits scatters by less."""

SHARE = 1e-9
"""Of an edit's effect, what a plan that is exact may miss it by where nothing is rounded."""
LOSS_FACTOR = 3.0
"""How many times what rounding alone costs of an edit its stored weights may cost. Both are means
over the same tokens of divergences of one size, each with other errors."""
RELOCATED_KL = 0.01
"""The share of an edit that a relocated plan may lose, unrounded, where nobody says how much."""
MOST_KL = 0.05
"""The share of an edit that may be lost where nobody says how much."""


def logit_tolerance(dtype: torch.dtype, *, layers: int, hidden: int, scale: float) -> float:
    """Return how far two evaluations of one function may lie apart in a logit.

    A product over d terms rounds with unit roundoff u (half the machine epsilon) at every step and
    errs by about u√d of its size, the signs being random. A token passes two branches a block and
    the output head, 2(L + 1) such stages whose errors add up at worst, on logits as large as
    ``scale``. The safety factor covers the products inside a branch (four or five).

    A verification adds what it measures of the model's own amplification: ``FLOOR_FACTOR`` times
    the reference's error in float32, scaled by the ratio of the machine epsilons.
    """
    roundoff = torch.finfo(dtype).eps / 2
    return SAFETY * roundoff * math.sqrt(hidden) * 2 * (layers + 1) * scale


def logprob_tolerance(dtype: torch.dtype, *, layers: int, hidden: int, scale: float) -> float:
    """Return how far two evaluations of one function may lie apart in a log-probability.

    A log-probability is a logit less the logarithm of a sum of exponentials, which moves by no more
    than the largest logit does: twice the tolerance of a logit.
    """
    return 2 * logit_tolerance(dtype, layers=layers, hidden=hidden, scale=scale)


def stream_tolerance(dtype: torch.dtype, *, layers: int, scale: float) -> float:
    """Return how far h(x) may lie from x where a bake made every write a fixed point of h.

    Every entry of a stored weight and of a sum is rounded by a share u of itself, so that a write
    errs by at most u of its norm along any direction, and 2(L + 1) writes add up on a stream of
    norm ``scale``. The safety factor covers rounding inside a write.
    """
    return SAFETY * torch.finfo(dtype).eps / 2 * 2 * (layers + 1) * scale


def fold_tolerance(terms: int, scale: float) -> float:
    """Return how far one folded value may lie from itself, computed on another processor.

    A product over n terms, summed in float64 in another order, errs by about u√n of its size.
    """
    return SAFETY * torch.finfo(torch.float64).eps / 2 * math.sqrt(terms) * scale
