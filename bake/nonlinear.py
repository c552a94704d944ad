"""Maps of activations that are not affine: what steering systems do and no weights compute.

Each is pointwise: it sees one token's activation. The reference hooks them, the plan refuses them
by name, and a least-squares fold can stand in for them.

| class              | map                                                 | used by               |
|--------------------|-----------------------------------------------------|-----------------------|
| ``Clamp``          | x + L(clamp(a) − a), a = [relu](R(x − μ))           | SAE features, capping |
| ``Masked``         | s ⊙ x + b where low < x < high, else x              | AcT with quantiles    |
| ``NormPreserving`` | h(x) ‖x‖ / ‖h(x)‖                                   | repeng's normalize    |
| ``Aimed``          | x − P x + ‖P x‖ v, v a unit vector in P's plane     | Angular Steering      |
| ``Gated``          | h(x) where the activation meets a condition, else x | gates on each token   |
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from bake.affine import AffineMap, DiagonalMap, LowRankMap, check_factors
from bake.errors import DirectionError, UsageError


class Nonlinear(ABC):
    """A map of ℝᵈ to itself that is not affine."""

    @property
    @abstractmethod
    def width(self) -> int:
        """The dimension d that the map acts on."""

    @abstractmethod
    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return h(x) for every row of x."""

    @property
    @abstractmethod
    def why(self) -> str:
        """Why it is no affine map, in one clause."""

    @property
    @abstractmethod
    def always(self) -> AffineMap | None:
        """The affine map that it is where its condition holds; None where there is none."""

    def to(self, *args: object, **kwargs: object) -> Self:
        """Return the map with its tensors moved as ``Tensor.to`` moves them."""
        moved = {
            field.name: value.to(*args, **kwargs)  # type: ignore[call-overload]
            for field in fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, field.name), Tensor | AffineMap | Nonlinear)
        }
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True, eq=False)
class Clamp(Nonlinear):
    """x ↦ x + L(clamp(a, low, high) − a) with a = R(x − μ), rectified where it is an encoder's.

    Rectified, a number of a counts where it is above its threshold, and is zero elsewhere: with
    zero as the threshold that is the ReLU, with another one the JumpReLU (arXiv 2407.14435).
    """

    left: Float[Tensor, "d k"]
    right: Float[Tensor, "k d"]
    mean: Float[Tensor, " d"]
    low: float
    """−∞ for no lower limit."""
    high: float
    """∞ for no upper one."""
    thresholds: tuple[float, ...] = ()
    """One for each number of a where it is rectified, none below zero; empty where it is not."""

    def __post_init__(self) -> None:
        width = self.mean.shape[0]
        rank = self.left.shape[-1]
        check_factors("a clamp", (self.left, (width, rank)), (self.right, (rank, width)))
        if self.thresholds and (len(self.thresholds) != rank or not min(self.thresholds) >= 0):
            raise DirectionError(
                f"the thresholds of a clamp of {rank} numbers are {self.thresholds}",
                fix="give one for each of them, and none below zero",
            )
        if not self.low <= self.high:
            raise UsageError(f"a clamp between {self.low:g} and {self.high:g} holds no value")

    @property
    @override
    def width(self) -> int:
        return self.mean.shape[0]

    @override
    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        active = (x - self.mean) @ self.right.T
        if self.thresholds:
            active = active.where(active > active.new_tensor(self.thresholds), 0.0)
        return x + (active.clamp(self.low, self.high) - active) @ self.left.T

    @property
    @override
    def why(self) -> str:
        if self.thresholds:
            return "the encoder's ReLU makes the change depend on whether the feature is active"
        return "what lies within the limits stays and what lies beyond is moved"

    @property
    @override
    def always(self) -> AffineMap | None:
        if self.thresholds or self.low != self.high:
            return None
        level = self.left.sum(dim=1) * self.low
        return LowRankMap(-self.left, self.right, self.left @ (self.right @ self.mean) + level)


@dataclass(frozen=True, slots=True, eq=False)
class Masked(Nonlinear):
    """x ↦ s ⊙ x + b where low < x < high, channel by channel, and x elsewhere."""

    scale: Float[Tensor, " d"]
    bias: Float[Tensor, " d"]
    low: Float[Tensor, " d"]
    high: Float[Tensor, " d"]

    def __post_init__(self) -> None:
        if len({*map(len, (self.scale, self.bias, self.low, self.high))}) > 1:
            raise DirectionError("scale, bias and limits of a masked map differ in their widths")

    @property
    @override
    def width(self) -> int:
        return self.scale.shape[0]

    @override
    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return torch.where((self.low < x) & (x < self.high), self.scale * x + self.bias, x)

    @property
    @override
    def why(self) -> str:
        return "each channel is mapped between two quantiles only, and what lies beyond stays"

    @property
    @override
    def always(self) -> AffineMap | None:
        return DiagonalMap(self.scale, self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class NormPreserving(Nonlinear):
    """x ↦ h(x) ‖x‖ / ‖h(x)‖; where h(x) is zero it stays so."""

    map: AffineMap

    @property
    @override
    def width(self) -> int:
        return self.map.width

    @override
    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        y = self.map(x)
        before, after = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (x, y))
        return torch.where(after > 0, y * (before / after.where(after > 0, 1.0)), y)

    @property
    @override
    def why(self) -> str:
        return "every activation is scaled back to its own norm, by a factor of its own"

    @property
    @override
    def always(self) -> AffineMap | None:
        return self.map


@dataclass(frozen=True, slots=True, eq=False)
class Aimed(Nonlinear):
    """x ↦ x − P x + ‖P x‖ v: the component in a plane, turned to v with the length that it had."""

    plane: Float[Tensor, "2 d"]
    """Two orthonormal rows."""
    aim: Float[Tensor, " d"]
    """v, a unit vector in the plane."""

    @property
    @override
    def width(self) -> int:
        return self.aim.shape[0]

    @override
    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        inside = x @ self.plane.T
        length = torch.linalg.vector_norm(inside, dim=-1, keepdim=True)
        turned: Tensor = x - inside @ self.plane + length * self.aim
        return turned

    @property
    @override
    def why(self) -> str:
        return "each token is turned to one angle, by as much as it lacks of it"

    @property
    @override
    def always(self) -> AffineMap | None:
        return None


class Measure(StrEnum):
    """What of an activation a condition is put to."""

    PROJECTION = "projection"
    """v·x / ‖v‖."""
    COSINE = "cosine"
    """v·x / (‖v‖ ‖x‖)."""


@dataclass(frozen=True, slots=True, eq=False)
class Gated(Nonlinear):
    """x ↦ h(x) where a measure of x lies above, or below, a threshold, and x elsewhere."""

    map: AffineMap | NormPreserving | Masked | Aimed
    vector: Float[Tensor, " d"]
    threshold: float
    above: bool
    measure: Measure

    def __post_init__(self) -> None:
        if self.vector.shape != (self.map.width,) or not bool(self.vector.any()):
            raise DirectionError(
                f"the condition's vector is {list(self.vector.shape)}, or zero, where "
                f"[{self.map.width}] is meant"
            )

    @property
    @override
    def width(self) -> int:
        return self.map.width

    @override
    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        found = self._measured(x)
        met = found > self.threshold if self.above else found < self.threshold
        return torch.where(met.unsqueeze(-1), self.map(x), x)

    def _measured(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        along: Tensor = x @ (self.vector / torch.linalg.vector_norm(self.vector))
        if self.measure is Measure.PROJECTION:
            return along
        cosine: Tensor = along / torch.linalg.vector_norm(x, dim=-1)
        return cosine

    @property
    @override
    def why(self) -> str:
        return "whether it acts depends on the activation"

    @property
    @override
    def always(self) -> AffineMap | None:
        return self.map if isinstance(self.map, AffineMap) else self.map.always
