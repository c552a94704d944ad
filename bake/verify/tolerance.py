"""The tolerances of every comparison, derived here once."""

import math

import torch

SAFETY = 8.0
FLOOR_FACTOR = 4.0
"""How far above the noise floor a baked model may lie in the serving dtype. The hooked model rounds
activations; the baked one rounds activations and, once, the edited weights to the same number of
bits. Two sources of one size make √2 of one in the mean; 4 covers the maximum over all logits."""


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
