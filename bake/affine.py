"""``AffineMap``: an immutable affine map of activations, x ↦ A x + b, in three forms.

``LowRankMap`` holds A = I + L R by its thin factors, ``DiagonalMap`` holds A = diag(s),
``DenseMap`` holds A. Activations are rows, so the linear part of a map acts on a batch as
``x @ A.T``. Maps are values: no device management, no model, no mutation. Arithmetic is float64
unless a map was moved by ``to``.

The design follows concept-erasure's ``LeaceEraser`` (thin factors, full matrix only on request)
and lineax's operators (an abstract contract, final leaves).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from bake.errors import DirectionError

EPSILON = 2.0**-52  # float64 machine epsilon
LARGEST = torch.finfo(torch.float32).max


def tolerance(width: int) -> float:
    """Return the relative error that a chain of float64 products over ``width`` terms may carry.

    Each dot product of d terms errs by at most d·ε relative to the sum of magnitudes; a map is the
    result of a handful of such products (orthonormalisation, an inverse, a composition), hence
    the factor of 64.
    """
    return 64 * width * EPSILON


class AffineMap(ABC):
    """An affine map x ↦ A x + b of ℝᵈ to itself; the contract of its three forms."""

    bias: Float[Tensor, " d"]
    """The constant b, [d]."""

    @property
    def width(self) -> int:
        """The dimension d that the map acts on."""
        return self.bias.shape[0]

    def __repr__(self) -> str:
        constant = "" if self.is_linear() else ", with a constant"
        return f"{type(self).__name__}(width {self.width}{constant})"

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return A x + b for every row of x."""
        return self.linear(x) + self.bias

    @abstractmethod
    def linear(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return A x for every row of x."""

    @abstractmethod
    def adjoint(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return Aᵀ x for every row of x: for a weight that reads x ↦ W x, the rows of W A."""

    @abstractmethod
    def delta_factors(self) -> tuple[Float[Tensor, "d k"], Float[Tensor, "k d"]]:
        """Return thin factors (L, R) with A − I = L R and k the rank of A − I."""

    @abstractmethod
    def with_bias(self, bias: Float[Tensor, " d"]) -> "AffineMap":
        """Return the map with the same linear part and another constant."""

    @abstractmethod
    def transpose(self) -> "AffineMap":
        """Return the linear map x ↦ Aᵀ x; the inverse of an orthogonal map's linear part."""

    @abstractmethod
    def scatter(self, indices: Tensor, width: int) -> "AffineMap":
        """Return the map of ℝʷⁱᵈᵗʰ that acts as this one on ``indices``, elsewhere as identity."""

    @abstractmethod
    def to(self, *args: object, **kwargs: object) -> "AffineMap":
        """Return the map with its tensors moved as ``Tensor.to`` moves them."""

    def without_bias(self) -> "AffineMap":
        """Return x ↦ A x, the map itself where it adds no constant."""
        return self if self.is_linear() else self.with_bias(torch.zeros_like(self.bias))

    def matrix(self) -> Float[Tensor, "d d"]:
        """Return A as a full matrix."""
        return self.linear(torch.eye(self.width, dtype=self.bias.dtype, device=self.bias.device)).T

    def after(self, first: "AffineMap") -> "AffineMap":
        """Return the composition x ↦ self(first(x)), in the thinnest form that holds it."""
        if self.width != first.width:
            raise DirectionError(f"cannot compose maps of widths {self.width} and {first.width}")
        bias = self(first.bias)
        # A translation has no linear part: the other map keeps its form, and its tensors.
        if isinstance(self, LowRankMap) and self.left.shape[1] == 0:
            return first.with_bias(bias)
        if isinstance(first, LowRankMap) and first.left.shape[1] == 0:
            return self.with_bias(bias)
        if isinstance(self, DiagonalMap) and isinstance(first, DiagonalMap):
            return DiagonalMap(self.scale * first.scale, bias)
        if isinstance(self, LowRankMap) and isinstance(first, LowRankMap):
            # (I + L1 R1)(I + L0 R0) = I + [L1, A1 L0] [R1; R0]
            left = torch.cat([self.left, self.linear(first.left.T).T], dim=1)
            right = torch.cat([self.right, first.right])
            if left.shape[1] < self.width:
                return LowRankMap(left, right, bias)
        return DenseMap(self.linear(first.matrix().T).T, bias)

    def is_linear(self) -> bool:
        """Whether the constant is zero."""
        return not bool(self.bias.any())

    def is_translation(self) -> bool:
        """Whether A is the identity, so that the map only adds its constant."""
        return _is_translation(self)

    def is_identity(self) -> bool:
        """Whether the map changes nothing."""
        return self.is_linear() and self.is_translation()

    def idempotence_error(self) -> float:
        """Return how far A² is from A, relative to the size of A: zero for a projection."""
        matrix = self.matrix()
        return _relative(matrix @ matrix - matrix, matrix)

    def is_idempotent(self) -> bool:
        """Whether A² = A, to rounding: applying the linear part again changes nothing."""
        return self.idempotence_error() <= tolerance(self.width)

    def is_orthogonal(self) -> bool:
        """Whether AᵀA = I, to rounding: the map keeps the norm of every difference."""
        left, right = self.delta_factors()
        # AᵀA − I = RᵀLᵀ + LR + RᵀLᵀLR vanishes outside span(L, Rᵀ): test it on a basis of that.
        basis, _ = torch.linalg.qr(torch.cat([left, right.T], dim=1))
        image = self.linear(basis.T)
        error = image @ image.T - basis.T @ basis
        return error.numel() == 0 or float(error.abs().max()) <= tolerance(self.width)

    def left_null(self) -> Float[Tensor, "m d"]:
        """Return orthonormal rows F with F A = 0: what of the output the map makes constant."""
        left, right = self.delta_factors()
        rank = left.shape[1]
        if rank == 0:
            return right
        # F(I + LR) = 0 puts F in the row space of R: F = cR with c(I + RL) = 0.
        core = torch.eye(rank, dtype=left.dtype, device=left.device) + right @ left
        u, singular, _ = torch.linalg.svd(core)
        # subtle: R L cancels against I, and each of its dot products errs by d·ε of the size of L.
        size = float(torch.linalg.vector_norm(left, dim=0).max())
        null = u[:, singular <= max(tolerance(self.width), self.width * EPSILON * size)]
        basis: Tensor = torch.linalg.qr((null.T @ right).T)[0]
        return basis.T


def check_factors(what: str, *factors: tuple[Tensor, tuple[int, ...]]) -> None:
    """Hold every tensor against its shape, a floating dtype and finite values.

    Raises:
        DirectionError: a tensor is of another shape or dtype, or holds NaN, infinity or a number
            beyond float32.
    """
    if any(tensor.shape != shape for tensor, shape in factors):
        found = ", ".join(str(list(tensor.shape)) for tensor, _ in factors)
        raise DirectionError(f"the factors of {what} do not fit each other: {found}")
    for tensor, _ in factors:
        if not tensor.is_floating_point():
            raise DirectionError(f"{what} needs floating-point factors, not {tensor.dtype}")
        check_size(what, tensor)


def check_size(what: str, tensor: Tensor) -> None:
    """Hold numbers against the largest that a checkpoint stores.

    Products of a few larger ones overflow float64, and then no property of a map can be told.

    Raises:
        DirectionError: a number is NaN, infinite or beyond float32.
    """
    largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0  # NaN if one is
    if not math.isfinite(largest):
        raise DirectionError(f"{what} has a factor that is not finite (NaN or infinity)")
    if largest > LARGEST:
        raise DirectionError(
            f"{what} holds {largest:.1e}",
            why=f"weights are stored in float32 at most, which ends at {LARGEST:.1e}",
            fix="give a smaller factor, or fit the direction again",
        )


def _relative(error: Tensor, of: Tensor) -> float:
    """Return the largest entry of ``error`` over that of ``of``, or over 1 where that is less."""
    return float(error.abs().max()) / max(1.0, float(of.abs().max()))


def thin_factors(matrix: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d k"], Float[Tensor, "k d"]]:
    """Return (L, R) with L R = matrix, k its numerical rank, and orthonormal rows in R."""
    u, singular, vh = torch.linalg.svd(matrix, full_matrices=False)
    scale = max(1.0, float(singular.max())) if singular.numel() else 1.0
    keep = singular > tolerance(matrix.shape[0]) * scale
    return u[:, keep] * singular[keep], vh[keep]


@lru_cache(maxsize=16)
def _is_translation(map_: AffineMap) -> bool:
    """Of the one map at all the experts of a mixture it is asked for each of them."""
    return map_.delta_factors()[0].shape[1] == 0


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LowRankMap(AffineMap):
    """x ↦ x + L(Rx) + b, for L [d, k], R [k, d], b [d]; k may be 0 (a translation)."""

    left: Float[Tensor, "d k"]
    right: Float[Tensor, "k d"]
    bias: Float[Tensor, " d"]

    def __post_init__(self) -> None:
        width, rank = self.bias.numel(), self.left.shape[-1]
        check_factors(
            "a low-rank map",
            (self.left, (width, rank)),
            (self.right, (rank, width)),
            (self.bias, (width,)),
        )

    @override
    def linear(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return ((x @ self.right.T) @ self.left.T).add_(x)

    @override
    def adjoint(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return ((x @ self.left) @ self.right).add_(x)

    @override
    def delta_factors(self) -> tuple[Float[Tensor, "d k"], Float[Tensor, "k d"]]:
        if self.left.shape[1] == 0:
            return self.left, self.right
        # The QR factors reduce the SVD of the d × d product to one of k × k.
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right.T)
        u, singular, vh = torch.linalg.svd(r_left @ r_right.T)
        scale = max(1.0, float(singular.max()))
        keep = singular > tolerance(self.width) * scale
        return q_left @ (u[:, keep] * singular[keep]), vh[keep] @ q_right.T

    @override
    def transpose(self) -> "LowRankMap":
        return LowRankMap(self.right.T, self.left.T, torch.zeros_like(self.bias))

    @override
    def with_bias(self, bias: Float[Tensor, " d"]) -> "LowRankMap":
        return LowRankMap(self.left, self.right, bias)

    @override
    def scatter(self, indices: Tensor, width: int) -> "LowRankMap":
        rank = self.left.shape[1]
        left = self.left.new_zeros(width, rank).index_copy(0, indices, self.left)
        right = self.right.new_zeros(rank, width).index_copy(1, indices, self.right)
        return LowRankMap(left, right, self.bias.new_zeros(width).index_copy(0, indices, self.bias))

    @override
    def to(self, *args: object, **kwargs: object) -> "LowRankMap":
        left, right, bias = (t.to(*args, **kwargs) for t in (self.left, self.right, self.bias))  # type: ignore[call-overload]
        return LowRankMap(left, right, bias)

    @override
    def idempotence_error(self) -> float:
        """Return ‖A² − A‖ = ‖L (I + R L) R‖ over max(1, ‖L R‖), without a d × d product."""
        if self.left.shape[1] == 0:
            return 0.0
        core = torch.eye(self.left.shape[1], dtype=self.left.dtype) + self.right @ self.left
        r_left = torch.linalg.qr(self.left)[1]
        r_right = torch.linalg.qr(self.right.T)[1]
        error, size = (
            float(torch.linalg.matrix_norm(m, ord=2))
            for m in (r_left @ core @ r_right.T, r_left @ r_right.T)
        )
        return error / max(1.0, size)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class DiagonalMap(AffineMap):
    """x ↦ s ⊙ x + b, for s [d], b [d]."""

    scale: Float[Tensor, " d"]
    bias: Float[Tensor, " d"]

    def __post_init__(self) -> None:
        width = self.bias.numel()
        check_factors("a diagonal map", (self.scale, (width,)), (self.bias, (width,)))

    @override
    def linear(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return x * self.scale

    @override
    def adjoint(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return x * self.scale

    @override
    def delta_factors(self) -> tuple[Float[Tensor, "d k"], Float[Tensor, "k d"]]:
        (changed,) = torch.nonzero(self.scale != 1, as_tuple=True)
        right = self.scale.new_zeros(changed.numel(), self.width)
        right[torch.arange(changed.numel()), changed] = 1
        return right.T * (self.scale[changed] - 1), right

    # What a scale tells at a glance takes the factors of a general map a d × d decomposition.

    @override
    def is_translation(self) -> bool:
        return bool((self.scale == 1).all())

    @override
    def idempotence_error(self) -> float:
        return _relative(self.scale * self.scale - self.scale, self.scale)

    @override
    def is_orthogonal(self) -> bool:
        return float((self.scale * self.scale - 1).abs().max()) <= tolerance(self.width)

    @override
    def left_null(self) -> Float[Tensor, "m d"]:
        (zero,) = torch.nonzero(self.scale.abs() <= tolerance(self.width), as_tuple=True)
        rows = self.scale.new_zeros(zero.numel(), self.width)
        rows[torch.arange(zero.numel()), zero] = 1
        return rows

    @override
    def transpose(self) -> "DiagonalMap":
        return DiagonalMap(self.scale, torch.zeros_like(self.bias))

    @override
    def with_bias(self, bias: Float[Tensor, " d"]) -> "DiagonalMap":
        return DiagonalMap(self.scale, bias)

    @override
    def scatter(self, indices: Tensor, width: int) -> "DiagonalMap":
        scale = self.scale.new_ones(width).index_copy(0, indices, self.scale)
        return DiagonalMap(scale, self.bias.new_zeros(width).index_copy(0, indices, self.bias))

    @override
    def to(self, *args: object, **kwargs: object) -> "DiagonalMap":
        scale, bias = (t.to(*args, **kwargs) for t in (self.scale, self.bias))  # type: ignore[call-overload]
        return DiagonalMap(scale, bias)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class DenseMap(AffineMap):
    """x ↦ A x + b, for A [d, d], b [d]."""

    full: Float[Tensor, "d d"]
    bias: Float[Tensor, " d"]

    def __post_init__(self) -> None:
        width = self.bias.numel()
        check_factors("a dense map", (self.full, (width, width)), (self.bias, (width,)))

    @override
    def linear(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return x @ self.full.T

    @override
    def adjoint(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return x @ self.full

    @override
    def matrix(self) -> Float[Tensor, "d d"]:
        return self.full

    @override
    def delta_factors(self) -> tuple[Float[Tensor, "d k"], Float[Tensor, "k d"]]:
        return thin_factors(self._change())

    def _change(self) -> Float[Tensor, "d d"]:
        return self.full - torch.eye(self.width, dtype=self.full.dtype, device=self.full.device)

    @override
    def is_translation(self) -> bool:
        # No entry exceeds the largest singular value, so most maps answer without the SVD.
        largest = float(self._change().abs().max())
        return largest <= tolerance(self.width) and AffineMap.is_translation(self)

    @override
    def is_orthogonal(self) -> bool:
        error = self.full.T @ self.full - torch.eye(self.width, dtype=self.full.dtype)
        return float(error.abs().max()) <= tolerance(self.width)

    @override
    def left_null(self) -> Float[Tensor, "m d"]:
        u, singular, _ = torch.linalg.svd(self.full)
        # subtle: as for thin factors; the size of A is what rounding scales with.
        size = float(singular.max())
        null: Tensor = u[:, singular <= max(tolerance(self.width), self.width * EPSILON * size)]
        return null.T

    @override
    def transpose(self) -> "DenseMap":
        return DenseMap(self.full.T, torch.zeros_like(self.bias))

    @override
    def with_bias(self, bias: Float[Tensor, " d"]) -> "DenseMap":
        return DenseMap(self.full, bias)

    @override
    def scatter(self, indices: Tensor, width: int) -> "DenseMap":
        full = torch.eye(width, dtype=self.full.dtype, device=self.full.device)
        full[indices.unsqueeze(1), indices.unsqueeze(0)] = self.full
        return DenseMap(full, self.bias.new_zeros(width).index_copy(0, indices, self.bias))

    @override
    def to(self, *args: object, **kwargs: object) -> "DenseMap":
        full, bias = (t.to(*args, **kwargs) for t in (self.full, self.bias))  # type: ignore[call-overload]
        return DenseMap(full, bias)


def chain(maps: Iterable[AffineMap], width: int) -> AffineMap:
    """Return the composition of maps in the order in which they are applied."""
    result: AffineMap | None = None
    for step in maps:
        result = step if result is None else step.after(result)
    return identity(width) if result is None else result


@cache
def identity(width: int) -> LowRankMap:
    """Return the map of ℝʷⁱᵈᵗʰ that changes nothing, the same one to all who ask."""
    return translation(torch.zeros(width, dtype=torch.float64))


def translation(shift: Float[Tensor, " d"]) -> LowRankMap:
    """Return x ↦ x + shift."""
    empty = shift.new_zeros(shift.shape[0], 0)
    return LowRankMap(empty, empty.T, shift)
