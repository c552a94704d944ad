"""``sweep``: one method at every site, what each is worth on examples it has not seen, the best."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bake.directions import Direction
from bake.errors import VerificationFailed
from bake.fit.auroc import CHANCE, auroc, margin
from bake.fit.methods import Classes, Fitted, Method
from bake.fit.split import Part, Split
from bake.progress import Progress, Tally
from bake.sites import Site
from bake.verify.interval import Interval

Activations = Mapping[Site, Float[Tensor, "n d"]]
"""Of one class: a row an example, at each site."""


@dataclass(frozen=True, slots=True, eq=False)
class SiteFit:
    """What was fitted at one site, and how well it tells the classes apart."""

    site: Site
    fitted: Fitted
    chosen_by: Interval
    """AUROC on the examples that choose the site."""
    margin: float
    """Gap of the classes' mean scores on them, in units of their spread: decides between equals."""
    gap: float
    """What of the fitted vector takes one class's mean to the other's: (δ·p)/(p·p), p the probe."""

    @property
    def direction(self) -> Direction:
        """Return it as an item of a file."""
        return Direction(self.fitted.tensors, self.site.layer, str(self.site))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"site": str(self.site), "auroc": _numbers(self.chosen_by), "margin": self.margin}


@dataclass(frozen=True, slots=True, eq=False)
class Sweep:
    """One method over all sites."""

    fits: tuple[SiteFit, ...]
    """In the order in which the sites were asked for."""
    left_out: tuple[Site, ...]
    """Where nothing could be fitted: every example has the same activation, or no unit varies."""
    best: SiteFit
    judged: Interval
    """AUROC of the best on examples that neither fitted nor chose it."""
    split: Split

    @property
    def separates(self) -> bool:
        """Whether the best tells the classes apart better than chance: the interval lies above."""
        return self.judged.low > CHANCE

    @property
    def verdict(self) -> str:
        """What the judged AUROC means, in one line."""
        found = f"AUROC {told(self.judged)} on {self.split.judge} examples that chose nothing"
        if self.separates:
            return f"{self.best.site} tells the classes apart: {found}"
        return f"nothing tells the classes apart better than chance: {self.best.site} has {found}"

    def failure(self) -> VerificationFailed | None:
        """Return what makes the fit worthless, or None."""
        if self.separates:
            return None
        return VerificationFailed(
            self.verdict,
            why=f"chance is {CHANCE:g}, and the interval does not lie above it; the best of "
            f"{len(self.fits)} sites was taken by other examples",
            fix="give more examples, classes that differ in the concept alone, or other sites "
            "with --at; nothing was written",
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "sites": [fit.to_json() for fit in self.fits],
            "left_out": [str(site) for site in self.left_out],
            "best": str(self.best.site),
            "auroc": _numbers(self.judged),
            "separates": self.separates,
            "examples": {
                name: [len(part.positive), len(part.negative)]
                for name, part in (
                    ("fit", self.split.fit),
                    ("choose", self.split.choose),
                    ("judge", self.split.judge),
                )
            },
        }


def told(interval: Interval) -> str:
    """Return an AUROC with its interval in words."""
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def sweep(
    method: Method,
    positive: Activations,
    negative: Activations,
    parts: Split,
    *,
    progress: Progress | None = None,
) -> Sweep:
    """Fit at every site and choose the best.

    One site is widened to float64 at a time. The best has the highest AUROC on the examples that
    choose, and of several the largest margin; the first
    site of equals.

    Args:
        method: how.
        positive: of the class that has the concept, in any floating type.
        negative: of the reference.
        parts: which rows do what.
        progress: told of every site.

    Raises:
        VerificationFailed: every example has the same activation at all sites.
    """
    tally = Tally(len(positive), progress)
    fits: list[SiteFit] = []
    left_out: list[Site] = []
    for site, rows in positive.items():
        found = _fit(site, method, rows, negative[site], parts)
        if found is None:
            left_out.append(site)
        else:
            fits.append(found)
        tally.advance(1)
    if not fits:
        raise VerificationFailed(
            "nothing can be fitted: the classes do not differ at any site",
            why="every example has the same activation there",
            fix="look behind the first block, or at another --position",
        )
    best = max(fits, key=lambda fit: (fit.chosen_by.value, fit.margin))
    judge = _classes(positive[best.site], negative[best.site], parts.judge)
    return Sweep(tuple(fits), tuple(left_out), best, auroc(*_scores(best.fitted, judge)), parts)


def _fit(
    site: Site, method: Method, positive: Tensor, negative: Tensor, parts: Split
) -> SiteFit | None:
    seen = _classes(positive, negative, parts.fit)
    fitted = None if seen.constant else method.fit(seen)
    if fitted is None:
        return None
    scores = _scores(fitted, _classes(positive, negative, parts.choose))
    probe = fitted.probe
    gap = float((seen.difference @ probe) / (probe @ probe))
    return SiteFit(site, fitted, auroc(*scores), margin(*scores), gap)


def _classes(positive: Tensor, negative: Tensor, part: Part) -> Classes:
    """Return the rows of a part in float64."""
    return Classes(
        positive[list(part.positive)].to(torch.float64),
        negative[list(part.negative)].to(torch.float64),
    )


def _scores(fitted: Fitted, classes: Classes) -> tuple[Tensor, Tensor]:
    return classes.positive @ fitted.probe, classes.negative @ fitted.probe


def _numbers(found: Interval) -> dict[str, Any]:
    return {"value": found.value, "low": found.low, "high": found.high, "examples": found.count}
