"""Reduced-rank ridge regression from accumulated moments: Δ ≈ W a + c in float64.

The moments of a stream of tokens are all that is kept, so that memory does not grow with the text:
[f + 1, f + 1] for the inputs with a one appended, and [d, f + 1] with the targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

RIDGES = tuple(10.0**power for power in range(-8, 1))
"""Penalties that are tried, as shares of the inputs' mean square."""

_NOISE = 1e-6  # of the fitted variance: what float32 activations leave of directions without signal


class Moments:
    """Second moments of inputs and targets, summed over tokens.

    Args:
        inputs: f, the width of what is regressed on.
        targets: d, the width of what is predicted.
        constant: whether a constant is fitted as well.
    """

    def __init__(self, inputs: int, targets: int, *, constant: bool) -> None:
        width = inputs + constant
        self.constant = constant
        self.count = 0
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.cross = torch.zeros(targets, width, dtype=torch.float64)
        self.power = torch.zeros((), dtype=torch.float64)
        self.total = torch.zeros(targets, dtype=torch.float64)

    def add(self, inputs: Float[Tensor, "n f"], targets: Float[Tensor, "n d"]) -> None:
        """Add some tokens."""
        rows, aims = inputs.double(), targets.double()
        if self.constant:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        self.gram += rows.T @ rows
        self.cross += aims.T @ rows
        self.power += aims.square().sum()
        self.total += aims.sum(dim=0)
        self.count += len(rows)

    def residual(self, solution: Float[Tensor, "d w"]) -> float:
        """Return Σ ‖Δ − W [a; 1]‖² over the tokens."""
        inner = (solution @ self.gram * solution).sum() - 2 * (solution * self.cross).sum()
        return float(self.power + inner)

    def variance(self) -> float:
        """Return Σ ‖Δ − Δ̄‖², or Σ ‖Δ‖² where no constant is fitted: what a fit may explain."""
        if not self.constant:
            return float(self.power)
        return float(self.power - self.total.square().sum() / max(self.count, 1))


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """Δ ≈ left (right a) + constant."""

    left: Float[Tensor, "d k"]
    right: Float[Tensor, "k f"]
    constant: Float[Tensor, " d"] | None
    ridge: float
    r2: float
    """Explained share of the variance on tokens that the fit has not seen."""

    @property
    def rank(self) -> int:
        """k."""
        return self.left.shape[1]


def regress(
    fit: Moments, unseen: Moments, *, rank: int, ridges: Sequence[float] = RIDGES
) -> Solution | None:
    """Return the map of at most ``rank`` that predicts unseen targets best, or None.

    Of the minimisers of Σ ‖Δ − W a − c‖² + λ ‖W‖² for every λ, cut to the leading directions of
    what they predict (reduced-rank regression), the one with the least error on ``unseen`` is
    taken. None where none of them is better there than a constant.
    """
    best: Solution | None = None
    for ridge in ridges:
        found = _solve(fit, ridge, rank)
        if found is None:
            continue
        basis, whole = found
        cut = basis @ (basis.T @ whole)
        if fit.constant:
            cut[:, -1] = whole[:, -1]  # a constant is no part of the rank
        variance = unseen.variance()
        r2 = 1 - unseen.residual(cut) / variance if variance > 0 else 0.0
        if best is None or r2 > best.r2:
            width = whole.shape[1] - fit.constant
            right = basis.T @ whole[:, :width]
            constant = whole[:, -1].clone() if fit.constant else None
            best = Solution(basis, right, constant, ridge, r2)
    return best if best is not None and best.r2 > 0 else None


def _solve(fit: Moments, ridge: float, rank: int) -> tuple[Tensor, Tensor] | None:
    """Return an orthonormal basis of the leading predicted directions, and the whole solution."""
    width = fit.gram.shape[0] - fit.constant
    scale = float(fit.gram.diagonal()[:width].mean())
    if scale <= 0:
        return None
    penalty = fit.gram.new_zeros(fit.gram.shape[0])
    penalty[:width] = ridge * scale
    factor, info = torch.linalg.cholesky_ex(fit.gram + torch.diag(penalty))
    if int(info):  # fewer tokens than inputs, and a penalty below rounding
        return None
    whole = torch.cholesky_solve(fit.cross.T, factor).T
    values, vectors = torch.linalg.eigh(_predicted(fit, whole, width))
    keep = values > _NOISE * values[-1].clamp(min=0)
    count = min(rank, int(keep.sum()))
    if count == 0 or float(values[-1]) <= 0:
        return None
    return vectors[:, -count:].flip(1), whole


def _predicted(fit: Moments, whole: Tensor, width: int) -> Tensor:
    """Return the second moment of W a; centred, where a constant takes the mean."""
    gram = fit.gram[:width, :width]
    if fit.constant:
        mean = fit.gram[:width, -1]
        gram = gram - torch.outer(mean, mean) / max(fit.count, 1)
    moment: Tensor = whole[:, :width] @ gram @ whole[:, :width].T
    return moment
