"""The methods: from the activations of two classes at one site to what an edit is made of.

The positive class has the concept, the negative one is the reference; every direction points from
negative to positive, and every map that transports takes the negative class to the positive one.
Write δ = μ₊ − μ₋ for the difference of the class means. A further method is one function here and
one row of ``METHODS``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from bake.directions import Role
from bake.edits import EditKind
from bake.errors import UsageError

_DEAD = 1e-4
"""The deviation at which ml-act's Gaussian and mean hooks leave a unit alone: their ``std_eps``."""


@dataclass(frozen=True, slots=True, eq=False)
class Classes:
    """Activations of both classes at one site, in float64, one row an example."""

    positive: Float[Tensor, "n d"]
    negative: Float[Tensor, "m d"]

    @property
    def difference(self) -> Float[Tensor, " d"]:
        """Return δ, the positive class's mean minus the negative one's."""
        return self.positive.mean(0) - self.negative.mean(0)

    @property
    def constant(self) -> bool:
        """Whether every example has the same activation, as a template's own token has at first."""
        first = self.positive[:1]
        return bool((self.positive == first).all()) and bool((self.negative == first).all())


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """What a method fitted at one site, in float64."""

    tensors: Mapping[Role, Tensor]
    probe: Float[Tensor, " d"]
    """The direction whose inner product with an activation is the site's score: what AUROC ranks.
    It is larger for the positive class."""


@dataclass(frozen=True, slots=True)
class Method:
    """One way to fit, and the edit that it is for."""

    title: str
    """The map in a few words, with its source."""
    fit: Callable[[Classes], Fitted | None]
    """None where the site holds nothing that the method could fit."""
    kind: EditKind
    paired: bool = False
    """Whether example i of one class belongs to example i of the other."""
    package: str | None = None
    """What has to be installed besides bake, by the name that Python imports."""
    says: str | None = None
    """What the method's own system does that the map leaves out, for plan, record and card."""

    def check(self) -> None:
        """Refuse before anything runs what could not be fitted.

        Raises:
            UsageError: the package is not installed.
        """
        if self.package is not None and find_spec(self.package) is None:
            raise UsageError(
                f"the method needs {self.package.replace('_', '-')}, which is not installed",
                fix="install bake-directions[fit], or choose another --method",
            )


def mean_difference(classes: Classes) -> Fitted | None:
    """Return δ (Marks and Tegmark 2023; CAA, arXiv 2312.06681; Arditi et al., 2406.11717)."""
    return _along(classes.difference, {Role.VECTOR: classes.difference})


def ace(classes: Classes) -> Fitted | None:
    """Return δ and the reference μ₋ of x ↦ x − P(x − μ₋) + α δ (arXiv 2411.09003)."""
    difference = classes.difference
    return _along(difference, {Role.VECTOR: difference, Role.MEAN: classes.negative.mean(0)})


def leace(classes: Classes) -> Fitted | None:
    """Return LEACE's oblique eraser, with concept-erasure's own defaults (arXiv 2306.03819)."""
    return _eraser(classes, "leace")


def orthogonal(classes: Classes) -> Fitted | None:
    """Return the orthogonal eraser of concept-erasure: onto the complement of δ."""
    return _eraser(classes, "orth")


def _eraser(classes: Classes, method: str) -> Fitted | None:
    from concept_erasure import LeaceEraser

    x = torch.cat([classes.positive, classes.negative])
    z = torch.cat([x.new_ones(len(classes.positive)), x.new_zeros(len(classes.negative))])
    # The eraser is the same at every scale, but the package's limits are numbers: small activations
    # would lose their covariance to shrinkage, and keep their concept.
    scale = x.std()
    eraser = LeaceEraser.fit(x / scale, z.unsqueeze(1), method=method)
    left, right = eraser.proj_left, eraser.proj_right
    if not bool(right.any()):
        return None
    # The sign of both factors is the SVD's; their product has none.
    sign = torch.sign(right[0] @ classes.difference)
    mean = scale * eraser.bias
    return Fitted(
        {Role.LEFT: sign * left, Role.RIGHT: sign * right, Role.MEAN: mean}, sign * right[0]
    )


def mean_act(classes: Classes) -> Fitted | None:
    """Return Mean-AcT's x + δ, on units that vary in both classes (arXiv 2410.23054)."""
    shift = torch.where(_varying(classes), classes.difference, 0.0)
    return _along(classes.difference, {Role.OFFSET: shift}) if bool(shift.any()) else None


def gaussian_act(classes: Classes) -> Fitted | None:
    """Return σ₊/σ₋ (x − μ₋) + μ₊ per unit, on units that vary in both classes.

    It is the optimal transport between two normal distributions; deviations have Bessel's
    correction, as ml-act's have.
    """
    varying = _varying(classes)
    ratio = torch.where(varying, classes.positive.std(0) / classes.negative.std(0), 1.0)
    target, source = classes.positive.mean(0), classes.negative.mean(0)
    shift = torch.where(varying, target - ratio * source, 0.0)
    return _along(classes.difference, {Role.SCALE: ratio, Role.OFFSET: shift})


def linear_act(classes: Classes) -> Fitted | None:
    """Return Linear-AcT's w ⊙ x + b: least squares over the optimal coupling of each unit.

    In one dimension the optimal coupling joins equal quantiles, so that w is the covariance of the
    two sorted samples over the source's variance, and b takes the source's mean to the target's.
    Classes of different sizes are joined by their quantile functions, which for equal ones is the
    pairing of sorted values. A unit that is constant in the source is shifted.
    """
    source, target = classes.negative, classes.positive
    middle, wanted = source.mean(0), target.mean(0)
    weights, i, j = _coupling(len(source), len(target))
    x, y = source.sort(dim=0).values - middle, target.sort(dim=0).values - wanted
    joint = torch.einsum("k,kd,kd->d", weights, x[i], y[j])
    spread = (x * x).mean(0)
    varies = (source != source[:1]).any(0)
    factor = torch.where(varies, joint / torch.where(varies, spread, 1.0), 1.0)
    return _along(classes.difference, {Role.SCALE: factor, Role.OFFSET: wanted - factor * middle})


def pca_diff(classes: Classes) -> Fitted | None:
    """Return the first principal component of the pairs' differences, as repeng's ``pca_diff``.

    repeng hands the differences to scikit-learn's PCA, which subtracts their mean first: what is
    found is how the pairs differ from one another, and not what they have in common.
    """
    differences = classes.positive - classes.negative
    return _component(differences - differences.mean(0), classes)


def pca_center(classes: Classes) -> Fitted | None:
    """Return the first principal component about the pairs' middles, as repeng's ``pca_center``.

    Both halves of a pair lie opposite each other, so that the mean is zero and nothing is lost.
    """
    return _component((classes.positive - classes.negative) / 2, classes)


def _component(rows: Tensor, classes: Classes) -> Fitted | None:
    """Return the unit vector along which rows vary most, with repeng's sign.

    More pairs have the larger projection in the positive class than in the negative one. Where as
    many have it either way, which leaves repeng's sign to chance, the means decide.
    """
    if not bool(rows.any()):
        return None
    vector = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    gaps = (classes.positive - classes.negative) @ vector
    votes = (gaps > 0).sum() - (gaps < 0).sum()
    sign = -1.0 if votes < 0 or (votes == 0 and gaps.mean() < 0) else 1.0
    return Fitted({Role.VECTOR: sign * vector}, sign * vector)


def _along(difference: Tensor, tensors: Mapping[Role, Tensor]) -> Fitted | None:
    return Fitted(tensors, difference) if bool(difference.any()) else None


def _varying(classes: Classes) -> Tensor:
    return (classes.positive.std(0) > _DEAD) & (classes.negative.std(0) > _DEAD)


def _coupling(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of the optimal coupling of n and m sorted values, and whom each joins."""
    steps = torch.cat([torch.arange(n) * m, torch.arange(m) * n, torch.tensor([n * m])])
    steps = torch.unique(steps)  # in units of 1/(n m): the quantiles at which a side steps
    weights = steps.diff().to(torch.float64) / (n * m)
    return weights, steps[:-1] // m, steps[:-1] // n


_QUANTILES = (
    "ml-act leaves units outside the range of its fit alone (quantiles_src = q_0_100, its "
    "default); this is the map for all values, its q_all"
)
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "mean-difference": Method(
            "x + c (μ₊ − μ₋), CAA and others", mean_difference, EditKind.OFFSET
        ),
        "ace": Method("x − P(x − μ₋) + α (μ₊ − μ₋), affine editing", ace, EditKind.AFFINE),
        "leace": Method("x − L R (x − μ), LEACE", leace, EditKind.ERASE, package="concept_erasure"),
        "orthogonal": Method(
            "x − U Uᵀ (x − μ), orthogonal erasure",
            orthogonal,
            EditKind.ERASE,
            package="concept_erasure",
        ),
        "mean-act": Method("x + (μ₊ − μ₋), Mean-AcT", mean_act, EditKind.OFFSET),
        "gaussian-act": Method("σ₊/σ₋ ⊙ (x − μ₋) + μ₊, Gaussian-AcT", gaussian_act, EditKind.SCALE),
        "linear-act": Method("w ⊙ x + b, Linear-AcT", linear_act, EditKind.SCALE, says=_QUANTILES),
        "pca-diff": Method(
            "x + c v, v of the centred differences (repeng)", pca_diff, EditKind.OFFSET, paired=True
        ),
        "pca-center": Method(
            "x + c v, v about the pairs' middles (repeng)", pca_center, EditKind.OFFSET, paired=True
        ),
    }
)
