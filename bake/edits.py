"""``Edit``: one map at some sites, the value that the plan and the reference share.

One constructor per kind of edit. Each takes fitted vectors in any floating dtype, as tensors, NumPy
arrays or lists, checks them and returns float64 maps; nothing here knows a model.

| kind     | map                                | used by                                       |
|----------|------------------------------------|-----------------------------------------------|
| ablate   | x − s U Uᵀ x, U orthonormal        | directional ablation (arXiv 2406.11717)       |
| affine   | x − P(x − μ) + α r                 | affine concept editing (arXiv 2411.09003)     |
| erase    | x − L R (x − μ), R L = I           | LEACE (arXiv 2306.03819)                      |
| offset   | k x + c v, k = 1 but for styles    | CAA (arXiv 2312.06681), ITI, style vectors    |
| scale    | s ⊙ x + b                          | AcT (arXiv 2410.23054), AurA                  |
| rotate   | Q x, Q orthogonal                  | rotations, reflections                        |
| linear   | A x + b                            | learned maps                                  |
| update   | W + u vᵀ, on a weight              | ROME (arXiv 2202.05262)                       |

``clamp``, ``masked-scale``, ``norm-preserving`` and ``gate`` are no affine maps, and no weights
compute them: see ``bake.nonlinear``.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from bake.affine import (
    AffineMap,
    DenseMap,
    DiagonalMap,
    LowRankMap,
    check_factors,
    check_size,
    identity,
    translation,
)
from bake.errors import DirectionError
from bake.nonlinear import Nonlinear
from bake.positions import Positions
from bake.sites import Site, summary

# Fitted artifacts are stored in float32 at best: what is idempotent or orthogonal to this error was
# meant to be so, and is restored to it in float64; what is further away is taken as it is.
STORAGE_TOLERANCE = 1e-4


class EditKind(StrEnum):
    """The kinds of edit a recipe can ask for."""

    ABLATE = "ablate"
    AFFINE = "affine"
    ERASE = "erase"
    OFFSET = "offset"
    SCALE = "scale"
    ROTATE = "rotate"
    LINEAR = "linear"
    UPDATE = "update"
    CLAMP = "clamp"
    MASKED_SCALE = "masked-scale"
    NORM_PRESERVING = "norm-preserving"
    GATE = "gate"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class WeightUpdate:
    """A ready update of one weight: y = W x becomes y = (W + left right) x."""

    left: Float[Tensor, "out k"]
    right: Float[Tensor, "k in"]

    def __post_init__(self) -> None:
        outer, rank, inner = self.left.shape[0], self.left.shape[-1], self.right.shape[-1]
        check_factors("an update", (self.left, (outer, rank)), (self.right, (rank, inner)))

    def __repr__(self) -> str:
        outer, inner = self.left.shape[0], self.right.shape[-1]
        return f"WeightUpdate({outer}×{inner}, rank {self.left.shape[-1]})"


@dataclass(frozen=True, slots=True, eq=False)
class Own:
    """How the system that an edit comes from applies it itself, where weights apply it always."""

    positions: Positions
    map: Nonlinear | None = None
    """What it applies there; None for the edit's own map."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Edit:
    """One map, applied at each of some sites.

    A ``WeightUpdate`` stands at the output site of the weight that it changes (``attn_out.l``,
    ``mlp_out.l``, ``q.l``, ``k.l``, ``v.l``, ``mlp_gate.l``, ``mlp_up.l``). Where several edits
    meet at one site, they apply in the order in which they are listed.
    """

    kind: EditKind
    concept: str
    sites: tuple[Site, ...]
    map: AffineMap | WeightUpdate | Nonlinear
    own: Own | None = None
    """What the system does otherwise than always and everywhere; None where nothing is known."""
    inner: EditKind | None = None
    """The kind of the map inside a gate or inside what keeps the norm, as a recipe's ``map``."""

    def __repr__(self) -> str:
        return f"Edit({self.kind} {self.concept} at {summary(self.sites)}: {self.map!r})"


def ablate(vectors: Float[Tensor, "*k d"] | ArrayLike, *, strength: float = 1.0) -> LowRankMap:
    """Return x ↦ x − s U Uᵀ x, with U an orthonormal basis of the vectors, [d] or [k, d].

    Raises:
        DirectionError: a vector is zero or not finite, or the vectors are linearly dependent.
    """
    basis = orthonormal(vectors)
    return LowRankMap(-strength * basis.T, basis, basis.new_zeros(basis.shape[1]))


def affine(
    vectors: Float[Tensor, "*k d"] | ArrayLike,
    *,
    mean: Float[Tensor, " d"] | ArrayLike | None = None,
    alpha: float = 0.0,
    strength: float = 1.0,
) -> LowRankMap:
    """Return x ↦ x − P(x − μ) + α r: the component along the vectors becomes that of μ + α r.

    P is the orthogonal projector onto the span of the vectors, μ is ``mean`` (zero when absent) and
    r the vector as it was fitted, not normalised, so that α = 1 moves by one difference of class
    means; with several vectors r is their sum. ``strength`` s blends: x ↦ x + s (h(x) − x).

    Raises:
        DirectionError: as for ``ablate``, or a mean of another width.
    """
    basis = orthonormal(vectors)
    raw = _matrix(vectors, "a direction").sum(dim=0)
    target = alpha * raw
    if mean is not None:
        target = target + basis.T @ (basis @ _vector(mean, "the mean", basis.shape[1]))
    return LowRankMap(-strength * basis.T, basis, strength * target)


def erase(
    left: Float[Tensor, "d k"] | ArrayLike,
    right: Float[Tensor, "k d"] | ArrayLike,
    *,
    mean: Float[Tensor, " d"] | ArrayLike | None = None,
    strength: float = 1.0,
) -> LowRankMap:
    """Return x ↦ x − s L R (x − μ), LEACE's oblique projection.

    A pair of factors with R L = I to storage precision is restored to R L = I in float64, so that
    the map is idempotent; factors that are further away (LEACE with a constrained trace) are taken
    as they are, and the plan refuses them where idempotence is needed.

    Raises:
        DirectionError: factors of different shapes, not finite, or whose product is zero.
    """
    left64, right64 = (
        _matrix(left, "the left factor", columns=True),
        _matrix(right, "the right factor"),
    )
    if not (left64.any() and right64.any()):
        return identity(right64.shape[1])  # of rank zero: the fit found nothing to erase
    if left64.shape != right64.T.shape:
        raise DirectionError(
            "an eraser's factors do not fit: "
            f"left {list(left64.shape)}, right {list(right64.shape)}",
            fix="left is [d, k] and right is [k, d]",
        )
    left64, right64 = LowRankMap(
        left64, right64, right64.new_zeros(right64.shape[1])
    ).delta_factors()
    if left64.shape[1] == 0:
        raise DirectionError("an eraser erases nothing: its factors multiply to zero")
    gram = right64 @ left64
    if float((gram - torch.eye(gram.shape[0], dtype=gram.dtype)).abs().max()) <= STORAGE_TOLERANCE:
        left64 = left64 @ torch.linalg.inv(gram)
    shift = right64.new_zeros(right64.shape[1])
    if mean is not None:
        shift = left64 @ (right64 @ _vector(mean, "the mean", right64.shape[1]))
    return LowRankMap(-strength * left64, right64, strength * shift)


def offset(
    vector: Float[Tensor, " d"] | ArrayLike, *, coefficient: float = 1.0, keep: float = 1.0
) -> LowRankMap | DiagonalMap:
    """Return x ↦ k x + c v; k, what is kept of the activation, is 1 but for style vectors.

    Raises:
        DirectionError: the vector is zero or not finite.
    """
    direction = _vector(vector, "a direction")
    _refuse_zeros(direction.any())
    if keep != 1:
        return DiagonalMap(torch.full_like(direction, keep), coefficient * direction)
    return translation(coefficient * direction)


def scale(
    factor: Float[Tensor, " d"] | ArrayLike, *, shift: Float[Tensor, " d"] | ArrayLike | None = None
) -> DiagonalMap:
    """Return x ↦ s ⊙ x + b, per channel or neuron.

    Raises:
        DirectionError: values that are not finite, or widths that differ.
    """
    factor64 = _vector(factor, "the scale")
    if shift is None:
        return DiagonalMap(factor64, torch.zeros_like(factor64))
    return DiagonalMap(factor64, _vector(shift, "the shift", factor64.shape[0]))


def rotate(matrix: Float[Tensor, "d d"] | ArrayLike) -> DenseMap:
    """Return x ↦ Q x for the orthogonal matrix nearest to ``matrix``.

    Raises:
        DirectionError: the matrix is not square, or not orthogonal to storage precision.
    """
    given = _square(matrix, "a rotation")
    u, _, vh = torch.linalg.svd(given)
    nearest = u @ vh
    error = float((given - nearest).abs().max())
    if error > STORAGE_TOLERANCE:
        raise DirectionError(
            f"the matrix of a rotation is not orthogonal: it is {error:.1e} from the nearest one",
            fix='use kind = "linear" for a map that is no rotation',
        )
    return DenseMap(nearest, nearest.new_zeros(nearest.shape[0]))


def rotate_plane(plane: Float[Tensor, "2 d"] | ArrayLike, *, degrees: float) -> LowRankMap:
    """Return the rotation by an angle in the plane of two vectors, from the first to the second.

    Raises:
        DirectionError: the vectors are not two, or span no plane.
    """
    basis = orthonormal(plane)
    if basis.shape[0] != 2:
        raise DirectionError(f"a plane is spanned by two directions, not by {basis.shape[0]}")
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[cosine - 1, -sine], [sine, cosine - 1]], dtype=torch.float64)
    return LowRankMap(basis.T @ turn, basis, basis.new_zeros(basis.shape[1]))


def reflect(vector: Float[Tensor, " d"] | ArrayLike) -> LowRankMap:
    """Return the Householder reflection x ↦ x − 2 r rᵀ x, r the unit vector.

    Raises:
        DirectionError: the vector is zero or not finite.
    """
    return ablate(vector, strength=2.0)


def linear(
    matrix: Float[Tensor, "d d"] | ArrayLike,
    *,
    shift: Float[Tensor, " d"] | ArrayLike | None = None,
) -> DenseMap:
    """Return x ↦ A x + b.

    Raises:
        DirectionError: values that are not finite, or a matrix that is not square.
    """
    full = _square(matrix, "a linear edit")
    bias = full.new_zeros(full.shape[0])
    return DenseMap(full, bias if shift is None else _vector(shift, "the shift", full.shape[0]))


def linear_factors(
    left: Float[Tensor, "d k"] | ArrayLike,
    right: Float[Tensor, "k d"] | ArrayLike,
    *,
    shift: Float[Tensor, " d"] | ArrayLike | None = None,
    strength: float = 1.0,
) -> LowRankMap:
    """Return x ↦ x + s (L R x + b), a linear map of low rank beside the identity.

    Raises:
        DirectionError: values that are not finite, or factors that do not fit.
    """
    outer, inner = (
        _matrix(left, "the left factor", columns=True),
        _matrix(right, "the right factor"),
    )
    bias = inner.new_zeros(inner.shape[1])
    if shift is not None:
        bias = _vector(shift, "the shift", inner.shape[1])
    return LowRankMap(strength * outer, inner, strength * bias)


def update(
    left: Float[Tensor, "*k out"] | ArrayLike, right: Float[Tensor, "*k in"] | ArrayLike
) -> WeightUpdate:
    """Return the weight update W + Σ left_i right_iᵀ, as ROME stores it: vectors of one row each.

    Raises:
        DirectionError: different numbers of left and right vectors, or values that are not finite.
    """
    outer, inner = _matrix(left, "the left vector"), _matrix(right, "the right vector")
    if outer.shape[0] != inner.shape[0]:
        raise DirectionError(
            f"an update has {outer.shape[0]} left and {inner.shape[0]} right vectors",
            fix="give one right vector for every left one",
        )
    return WeightUpdate(outer.T, inner)


def orthonormal(vectors: Float[Tensor, "*k d"] | ArrayLike) -> Float[Tensor, "k d"]:
    """Return an orthonormal basis, as rows, of the span of the vectors, [d] or [k, d].

    The first basis vector keeps the direction and sign of the first vector.

    Raises:
        DirectionError: a vector is zero or not finite, or the vectors are linearly dependent.
    """
    rows = _matrix(vectors, "a direction")
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    _refuse_zeros((norms > 0).all())
    if rows.shape[0] > rows.shape[1]:
        raise DirectionError(f"{rows.shape[0]} directions of width {rows.shape[1]} are dependent")
    basis, triangle = torch.linalg.qr((rows / norms).T)
    pivots = torch.diagonal(triangle)
    if float(pivots.abs().min()) <= STORAGE_TOLERANCE:
        raise DirectionError(
            "the directions of a subspace are linearly dependent",
            why=f"one is only {float(pivots.abs().min()):.1e} of its length off the others' span",
            fix="drop the directions that repeat others",
        )
    signed: Tensor = basis * pivots.sign()
    return signed.T


def _matrix(values: ArrayLike, what: str, *, columns: bool = False) -> Tensor:
    """Return a vector or a matrix as a matrix, [k, d]; one of columns [d, k] as it is."""
    rows = _finite(values, what)
    if rows.dim() not in (1, 2):
        raise DirectionError(f"{what} is no vector or matrix: its shape is {list(rows.shape)}")
    return rows.unsqueeze(int(columns)) if rows.dim() == 1 else rows


def _square(values: ArrayLike, what: str) -> Tensor:
    full = _finite(values, f"the matrix of {what}")
    if full.dim() != 2 or full.shape[0] != full.shape[1]:
        raise DirectionError(f"{what} needs a square matrix, not {list(full.shape)}")
    return full


def _vector(values: ArrayLike, what: str, width: int | None = None) -> Tensor:
    vector = _finite(values, what)
    if vector.dim() != 1:
        raise DirectionError(f"{what} is no vector: its shape is {list(vector.shape)}")
    if width is not None and vector.shape[0] != width:
        raise DirectionError(f"{what} has width {vector.shape[0]} where {width} is meant")
    return vector


def _refuse_zeros(nonzero: Tensor) -> None:
    if not bool(nonzero):
        raise DirectionError("a direction is zero", fix="fit it again, or name another layer")


def _finite(values: ArrayLike, what: str) -> Tensor:
    """Return a tensor, an array or a list of numbers in float64 on the processor."""
    try:
        if isinstance(values, list | tuple):  # whose whole numbers are meant as any others
            values = np.asarray(values, dtype=np.float64)
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DirectionError(f"{what} is no tensor, array or list of numbers: {error}") from error
    if not tensor.is_floating_point():
        raise DirectionError(f"{what} holds {tensor.dtype} values where floats are meant")
    if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
        raise DirectionError(
            f"{what} holds values that are not finite (NaN or infinity), or none at all",
            fix="look at it with `bake directions FILE` and fit it again",
        )
    check_size(what, tensor)
    return tensor.detach().to(device="cpu", dtype=torch.float64)
