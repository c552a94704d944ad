"""How far two sets of logits lie apart token by token, and two streams point by point."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from bake.sites import Site

_AT_ONCE = 1 << 17  # logits that are looked at in float64 at a time: they stay in the cache
_SAMPLE = 1 << 19  # logits that a quantile is taken of: an even sample where there are more
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
    others: Mapping[str, Float[Tensor, "tokens vocab"]],
    *,
    hidden: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({}),
) -> dict[str, Compared]:
    """Return how far each of ``others`` lies from ``reference``, computed in float64.

    The reference's log-probabilities are computed once for all of them.

    Args:
        reference: logits of the hooked model, in any dtype.
        others: logits of the models that are compared with it, by name.
        hidden: final hidden states of both, [tokens, width]; without them the cosine is not known.
    """
    sums = {name: _Sums(reference) for name in others}
    for rows in _stretches(reference):
        x = reference[rows].to(torch.float64)
        ours = x, x.argmax(-1, keepdim=True), *_probabilities(x)
        for name, other in others.items():
            sums[name].add(ours, other[rows].to(torch.float64), rows.start)
    return {
        name: sums[name].compared(_scatter(reference, other), hidden.get(name))
        for name, other in others.items()
    }


class _Sums:
    """What one model's logits come to beside a reference's, a stretch of tokens after another."""

    def __init__(self, reference: Tensor) -> None:
        self.dlogit, self.dlogprob = _Spread(reference), _Spread(reference)
        self.kl: list[Tensor] = []
        self.top, self.tokens = 0, len(reference)

    def add(self, ours: tuple[Tensor, Tensor, Tensor, Tensor], y: Tensor, start: int) -> None:
        """Add a stretch: the reference's logits, most likely tokens, log p and p, and others."""
        x, best, log, p = ours
        self.dlogit.add((x - y).abs_(), start)
        apart = log - y.log_softmax(-1)
        self.kl.append(_kl(p, apart))
        self.dlogprob.add(apart.abs_(), start)
        self.top += int((y.gather(-1, best) == y.amax(-1, keepdim=True)).sum())

    def compared(
        self, points: tuple[tuple[float, float], ...], hidden: tuple[Tensor, Tensor] | None
    ) -> Compared:
        """Return all of it."""
        divergence, dlogit, dlogprob = torch.cat(self.kl), self.dlogit, self.dlogprob
        metrics = LogitMetrics(
            tokens=self.tokens,
            max_dlogit=dlogit.largest,
            mean_dlogit=dlogit.mean,
            p99_dlogit=dlogit.quantile(0.99),
            max_dlogprob=dlogprob.largest,
            mean_dlogprob=dlogprob.mean,
            p99_dlogprob=dlogprob.quantile(0.99),
            mean_kl=float(divergence.mean()),
            p95_kl=float(torch.quantile(divergence, 0.95)),
            max_kl=float(divergence.max()),
            same_top=self.top / self.tokens,
            cosine=math.nan if hidden is None else _least_cosine(*hidden),
        )
        return Compared(metrics, tuple(divergence.tolist()), points)


def _stretches(logits: Tensor) -> Iterator[slice]:
    """Yield a few rows at a time."""
    height = max(1, _AT_ONCE // logits.shape[1])
    for start in range(0, len(logits), height):
        yield slice(start, start + height)


def _probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithms of probabilities, and these."""
    log = logits.log_softmax(-1)
    return log, log.exp()


def _kl(p: Tensor, apart: Tensor) -> Tensor:
    """Return KL(p ‖ q) of every row in nats, from p and log p − log q."""
    # Rounding may leave a divergence of almost nothing below zero.
    return torch.bmm(p.unsqueeze(1), apart.unsqueeze(2)).flatten().clamp_(min=0.0)


class _Spread:
    """Largest, mean and quantiles of numbers that come in pieces."""

    def __init__(self, whole: Tensor) -> None:
        self.count, self.total, self.largest = 0, 0.0, 0.0
        self.stride = max(1, -(-whole.numel() // _SAMPLE))
        self.sample: list[Tensor] = []

    def add(self, values: Tensor, start: int) -> None:
        flat = values.flatten()
        # The sample is every n-th logit of all, so it starts where the last piece left off. It is a
        # copy: a view would keep the piece, and all pieces are as large as the logits.
        first = -(start * values.shape[1]) % self.stride
        self.sample.append(flat[first :: self.stride].clone())
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
    return max(
        float((x[rows].to(torch.float64) - y[rows].to(torch.float64)).abs_().max())
        for rows in _stretches(x)
    )


def divergences(
    reference: Float[Tensor, "tokens vocab"], others: Sequence[Float[Tensor, "tokens vocab"]]
) -> list[Float[Tensor, " tokens"]]:
    """Return KL(reference ‖ other) after every token in nats, from logits, of each of ``others``.

    The reference's log-probabilities are computed once for all of them.
    """
    found: list[list[Tensor]] = [[] for _ in others]
    for rows in _stretches(reference):
        log, p = _probabilities(reference[rows].to(torch.float64))
        for other, kl in zip(others, found, strict=True):
            kl.append(_kl(p, log - other[rows].to(torch.float64).log_softmax(-1)))
    return [torch.cat(kl) for kl in found]


def mean_kl(
    reference: Float[Tensor, "tokens vocab"], other: Float[Tensor, "tokens vocab"]
) -> float:
    """Return the mean over tokens of KL(reference ‖ other) in nats, from logits."""
    return float(divergences(reference, [other])[0].mean())


def stream_differences(
    reference: Mapping[Site, Tensor], other: Mapping[Site, Tensor], sites: Sequence[Site]
) -> tuple[float, ...]:
    """Return per site the rms over tokens of ‖x − y‖, relative to the rms of the reference."""
    found = []
    for site in sites:
        x, y = (t[site].to(torch.float64) for t in (reference, other))
        found.append(float((x - y).norm() / x.norm()))
    return tuple(found)
