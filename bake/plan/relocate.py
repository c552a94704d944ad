"""Relocation: an invertible map that stands for an edit where the stream has no weights.

An edit x ↦ A x + b at one point acts on what the skip path carries, and no weight stands there. The
stream before the point can live in another frame, though: writers write Ã w, readers read Ã⁻¹ z,
and behind the point the stream is the hooked one. Everything but the scale of the norms before the
point is kept, if only Ã is invertible. Where A is, Ã = A. Else A has a null space, spanned by the
columns of Q with dual rows F, F Q = 1 and F A = 0, and what lies in it has to go somewhere:

- *in place*, Ã = A + α Q F: the edited component is carried at α of its size, and α of it is left
  behind the point;
- into *fresh* dimensions S of the stream, zero everywhere else, that nobody reads behind the point:
  Ã takes Q to α S and S to Q. Nothing is left, but for α² of the component's energy in the norms.

All of it is float64 and k × k, k the rank of A − I; nothing here knows a model.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from bake.affine import AffineMap, DenseMap, LowRankMap, tolerance
from bake.plan.lowrank import thin, thin_factors

DEFECTIVE = 1e6
"""Condition of a basis of eigenvectors beyond which a null space has no complement to speak of."""


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """What stands for an edit x ↦ A x + b on the skip path."""

    forward: AffineMap
    """Ã, without a constant."""
    back: AffineMap
    """Its inverse."""
    constant: Float[Tensor, " d"]
    """In place of b: what A keeps fixed, stays so."""
    scale: float
    """α, at which the null space of A is carried; 1 where A has none, and Ã is A."""
    left: float
    """How much of the edit is left undone behind the point: α in place, else 0."""


@dataclass(frozen=True, slots=True, eq=False)
class _Spectrum:
    """A − 1 = L R, and the eigenvectors of 1 + R L, which are those of A on the span of L."""

    left: Float[Tensor, "d k"]
    right: Float[Tensor, "k d"]
    values: Complex[Tensor, " k"]
    vectors: Complex[Tensor, "k k"]
    small: Tensor
    """[k], which eigenvalues count as none."""


def null_rank(map_: AffineMap, scale: float) -> int:
    """Return how many dimensions of an edit are too small to be divided by."""
    return int(_spectrum(map_, scale).small.sum())


def carried(
    map_: AffineMap, scale: float, fresh: Float[Tensor, "m d"] | None = None
) -> Carried | None:
    """Return what stands for an edit on the skip path, or None where nothing does.

    Args:
        map_: the edit.
        scale: α; what A shrinks to less counts as its null space.
        fresh: unit rows, one for each dimension of the null space at least; None in place.
    """
    found = _spectrum(map_, scale)
    if not bool(found.small.any()):
        return _invertible(found.left, found.right, map_.bias, 1.0, 0.0)
    if float(torch.linalg.cond(found.vectors)) > DEFECTIVE:
        return None
    if fresh is not None:
        return _into_fresh(found, map_, scale, fresh)
    # C has R L's eigenvectors: 1 + C R L is 1 + R L with the small eigenvalues raised to α.
    small, one = found.values, torch.ones_like(found.values)
    raised = torch.where(small.abs() > tolerance(map_.width), small / small.abs(), one) * scale
    factor = torch.where(found.small, (raised - 1) / (found.values - 1), one)
    mixing = _real(found.vectors * factor @ torch.linalg.inv(found.vectors))
    constant = map_.bias - found.left @ (
        (mixing - torch.eye(len(mixing))) @ (found.right @ map_.bias)
    )
    return _invertible(found.left, mixing @ found.right, constant, scale, scale)


def _into_fresh(
    found: _Spectrum, map_: AffineMap, scale: float, fresh: Float[Tensor, "m d"]
) -> Carried:
    """Return the map that takes the null space to fresh dimensions."""
    rank = int(found.small.sum())
    if fresh.shape[0] < rank:
        raise ValueError(f"{rank} fresh dimensions are needed, and {fresh.shape[0]} are there")
    own, dual = found.vectors[:, found.small], torch.linalg.inv(found.vectors)[found.small]
    # The projector onto the null space along the rest is L G R.
    projector = _real(own / (found.values[found.small] - 1) @ dual)
    basis = torch.linalg.svd(projector)[0][:, :rank]
    null, triangle = torch.linalg.qr(found.left @ basis)
    rows = triangle @ (basis.T @ projector) @ found.right
    place = fresh[:rank].T
    left = torch.cat([found.left, scale * place, null - place], dim=1)
    right = torch.cat([found.right, rows, place.T])
    return _invertible(left, right, map_.bias, scale, 0.0)


def _spectrum(map_: AffineMap, scale: float) -> _Spectrum:
    left, right = thin_factors(map_)
    core = torch.eye(left.shape[1], dtype=left.dtype) + right @ left
    values, vectors = torch.linalg.eig(core)
    return _Spectrum(left, right, values, vectors, values.abs() < scale)


def _invertible(
    left: Tensor, right: Tensor, constant: Tensor, scale: float, lost: float
) -> Carried:
    """Return 1 + L R with its inverse, by Woodbury's identity."""
    core = torch.eye(left.shape[1], dtype=left.dtype) + right @ left
    zeros = torch.zeros_like(constant)
    forward = LowRankMap(left, right, zeros)
    back = LowRankMap(-left, torch.linalg.solve(core, right), zeros)
    return Carried(thin(forward), thin(back), constant, scale, lost)


def _real(matrix: Complex[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    """Return a function of a real matrix, whose imaginary part is rounding."""
    return matrix.real.contiguous()


def stretch(map_: AffineMap) -> tuple[float, float]:
    """Return the least and the largest factor by which a linear map changes a length."""
    if isinstance(map_, DenseMap):
        found = torch.linalg.svdvals(map_.full)
        return float(found.min()), float(found.max())
    left, right = map_.delta_factors()
    if left.shape[1] == 0:
        return 1.0, 1.0
    # Outside the span of L and Rᵀ nothing changes.
    basis = torch.linalg.qr(torch.cat([left, right.T], dim=1))[0]
    found = torch.linalg.svdvals(basis.T @ map_.linear(basis.T).T)
    return min(1.0, float(found.min())), max(1.0, float(found.max()))
