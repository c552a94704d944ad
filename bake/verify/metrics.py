"""How far two sets of logits lie apart token by token, and two streams point by point."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bake.sites import Site

_AT_ONCE = 1 << 17  # logits that are looked at in float64 at a time: they stay in the cache
_SAMPLE = 1 << 22  # logits that a quantile is taken of: an even sample where there are more
POINTS = 1500
"""Logits in the scatter plot: an even sample."""


@dataclass(frozen=True, slots=True)
class LogitMetrics:
    """Differences of one model's logits from those of a reference."""

    tokens: int
    max_dlogit: float
    mean_dlogit: float
    p99_dlogit: float
    max_dlogprob: float
    mean_dlogprob: float
    p99_dlogprob: float
    mean_kl: float
    p95_kl: float
    max_kl: float
    same_top: float
    """Share of tokens after which both find the same token most likely."""
    cosine: float
    """Least cosine of the final hidden states (the last block's output) over all tokens."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Metrics, with what the plots show of them."""

    metrics: LogitMetrics
    kl: tuple[float, ...]
    """KL(reference ‖ other) after every token, in nats."""
    points: tuple[tuple[float, float], ...]
    """An even sample of logits: reference, other."""


def compare_logits(
    reference: Float[Tensor, "tokens vocab"],
    other: Float[Tensor, "tokens vocab"],
    *,
    hidden: tuple[Tensor, Tensor] | None = None,
) -> Compared:
    """Return how far ``other`` lies from ``reference``, computed in float64.

    Args:
        reference: logits of the hooked model, in any dtype.
        other: logits of the model that is compared with it.
        hidden: final hidden states of both, [tokens, width]; without them the cosine is not known.
    """
    dlogit, dlogprob, kl, top = _Spread(reference), _Spread(reference), [], 0
    for start, x, y in _pieces(reference, other):
        dlogit.add((x - y).abs(), start)
        p, q = x.log_softmax(-1), y.log_softmax(-1)
        dlogprob.add((p - q).abs(), start)
        kl.append(_kl(p, q))
        top += int((x.argmax(-1) == y.argmax(-1)).sum())
    divergence = torch.cat(kl)
    metrics = LogitMetrics(
        tokens=len(reference),
        max_dlogit=dlogit.largest,
        mean_dlogit=dlogit.mean,
        p99_dlogit=dlogit.quantile(0.99),
        max_dlogprob=dlogprob.largest,
        mean_dlogprob=dlogprob.mean,
        p99_dlogprob=dlogprob.quantile(0.99),
        mean_kl=float(divergence.mean()),
        p95_kl=float(torch.quantile(divergence, 0.95)),
        max_kl=float(divergence.max()),
        same_top=top / len(reference),
        cosine=math.nan if hidden is None else _least_cosine(*hidden),
    )
    return Compared(metrics, tuple(divergence.tolist()), _scatter(reference, other))


def _pieces(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield a few rows of both in float64, with the first one's index."""
    height = max(1, _AT_ONCE // x.shape[1])
    for start in range(0, len(x), height):
        rows = slice(start, start + height)
        yield start, x[rows].to(torch.float64), y[rows].to(torch.float64)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p ‖ q) of every row of log-probabilities, in nats."""
    # Rounding may leave a divergence of almost nothing below zero.
    return (p.exp() * (p - q)).sum(-1).clamp(min=0.0)


class _Spread:
    """Largest, mean and quantiles of numbers that come in pieces."""

    def __init__(self, whole: Tensor) -> None:
        self.count, self.total, self.largest = 0, 0.0, 0.0
        self.stride = max(1, -(-whole.numel() // _SAMPLE))
        self.sample: list[Tensor] = []

    def add(self, values: Tensor, start: int) -> None:
        flat = values.flatten()
        # The sample is every n-th logit of all, so it starts where the last piece left off.
        first = -(start * values.shape[1]) % self.stride
        self.sample.append(flat[first :: self.stride])
        self.count += flat.numel()
        self.total += float(flat.sum())
        self.largest = max(self.largest, float(flat.max()))

    @property
    def mean(self) -> float:
        return self.total / self.count

    def quantile(self, share: float) -> float:
        sample = torch.cat(self.sample)
        return float(sample.kthvalue(max(1, math.ceil(share * sample.numel()))).values)


def _scatter(reference: Tensor, other: Tensor) -> tuple[tuple[float, float], ...]:
    stride = max(1, -(-reference.numel() // POINTS))
    pairs = (t.flatten()[::stride].to(torch.float64).tolist() for t in (reference, other))
    return tuple(zip(*pairs, strict=True))


def _least_cosine(x: Tensor, y: Tensor) -> float:
    return float(torch.cosine_similarity(x.to(torch.float64), y.to(torch.float64), dim=-1).min())


def largest_difference(x: Tensor, y: Tensor) -> float:
    """Return max |x − y| in float64, without a float64 copy of the whole."""
    return max(float((a - b).abs().max()) for _, a, b in _pieces(x, y))


def divergences(
    reference: Float[Tensor, "tokens vocab"], other: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    """Return KL(reference ‖ other) after every token in nats, from logits."""
    pieces = _pieces(reference, other)
    return torch.cat([_kl(x.log_softmax(-1), y.log_softmax(-1)) for _, x, y in pieces])


def mean_kl(
    reference: Float[Tensor, "tokens vocab"], other: Float[Tensor, "tokens vocab"]
) -> float:
    """Return the mean over tokens of KL(reference ‖ other) in nats, from logits."""
    return float(divergences(reference, other).mean())


def stream_differences(
    reference: Mapping[Site, Tensor], other: Mapping[Site, Tensor], sites: Sequence[Site]
) -> tuple[float, ...]:
    """Return per site the rms over tokens of ‖x − y‖, relative to the rms of the reference."""
    found = []
    for site in sites:
        x, y = (t[site].to(torch.float64) for t in (reference, other))
        found.append(float((x - y).norm() / x.norm()))
    return tuple(found)
