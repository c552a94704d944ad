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

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap, DenseMap, LowRankMap, tolerance
from bake.plan.lowrank import thin, thin_factors

NEWTON = 64
"""Steps of an iteration that doubles its digits; all but the last few are for close sizes."""
NOTHING = 2.0**-10
"""Of α, what an edit may keep of its null space and count as having kept none."""
MOST_LEFT = 2.0
"""Of α, what may be left of an edit in place: more is left where a null space has no complement."""


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
    """How much of the edit is left undone behind the point: α or up to twice as much, else 0."""


@dataclass(frozen=True, slots=True, eq=False)
class _Small:
    """A − 1 = L R, and the part of C = 1 + R L that is A on the span of L where A is small."""

    left: Float[Tensor, "d k"]
    right: Float[Tensor, "k d"]
    basis: Float[Tensor, "k m"]
    """Q, orthonormal: C Q = Q B, with the eigenvalues of B below α and all others beyond it."""
    dual: Float[Tensor, "m k"]
    """F, with F Q = 1 and F C = B F."""
    within: Float[Tensor, "m m"]
    """B."""


def null_rank(map_: AffineMap, scale: float) -> int:
    """Return how many dimensions of an edit are too small to be divided by."""
    return len(_small(map_, scale).dual)


def carried(
    map_: AffineMap, scale: float, fresh: Float[Tensor, "m d"] | None = None
) -> Carried | None:
    """Return what stands for an edit on the skip path, or None where nothing does.

    Args:
        map_: the edit.
        scale: α; what A shrinks to less counts as its null space.
        fresh: unit rows, one for each dimension of the null space at least; None in place.
    """
    found = _small(map_, scale)
    rank = len(found.dual)
    if rank == 0:
        return _invertible(found.left, found.right, map_.bias, 1.0, 0.0)
    if fresh is not None:
        return _into_fresh(found, map_, scale, fresh)
    # B becomes α times the nearest orthogonal matrix, which for nothing but rounding is 1.
    one = torch.eye(rank, dtype=found.within.dtype)
    first, _, last = torch.linalg.svd(found.within + NOTHING * scale * one)
    raised = scale * first @ last
    lost = float(torch.linalg.matrix_norm(raised - found.within, 2))
    if lost > MOST_LEFT * scale:
        return None
    mixing = found.basis @ torch.linalg.solve(found.within - one, raised - found.within, left=False)
    mixing = mixing @ found.dual
    constant = map_.bias - found.left @ (mixing @ (found.right @ map_.bias))
    whole = torch.eye(len(mixing), dtype=mixing.dtype) + mixing
    return _invertible(found.left, whole @ found.right, constant, scale, lost)


def _into_fresh(
    found: _Small, map_: AffineMap, scale: float, fresh: Float[Tensor, "m d"]
) -> Carried:
    """Return the map that takes the null space to fresh dimensions."""
    rank = len(found.dual)
    if fresh.shape[0] < rank:
        raise ValueError(f"{rank} fresh dimensions are needed, and {fresh.shape[0]} are there")
    # The projector onto the null space along the rest is L Q (B − 1)⁻¹ F R.
    one = torch.eye(rank, dtype=found.within.dtype)
    null, triangle = torch.linalg.qr(found.left @ found.basis)
    rows = triangle @ torch.linalg.solve(found.within - one, found.dual @ found.right)
    place = fresh[:rank].T
    left = torch.cat([found.left, scale * place, null - place], dim=1)
    right = torch.cat([found.right, rows, place.T])
    return _invertible(left, right, map_.bias, scale, 0.0)


def _small(map_: AffineMap, scale: float) -> _Small:
    left, right = thin_factors(map_)
    core = torch.eye(left.shape[1], dtype=left.dtype) + right @ left
    sizes = torch.linalg.eigvals(core).abs()
    small = sizes < scale
    projector = _projector(core, sizes, small)
    basis = torch.linalg.svd(projector)[0][:, : int(small.sum())]
    dual = basis.T @ projector
    return _Small(left, right, basis, dual, dual @ core @ basis)


def _projector(core: Tensor, sizes: Tensor, small: Tensor) -> Tensor:
    """Return the projector onto the span of some eigenvectors, along that of all others.

    By the sign of (C/t − 1) (C/t + 1)⁻¹, t between the sizes of the two (Roberts 1980; Higham,
    *Functions of Matrices*, 2008, chapter 5), which unlike eigenvectors is well conditioned
    where eigenvalues are equal.
    """
    one = torch.eye(len(core), dtype=core.dtype)
    if bool(small.all()) or not bool(small.any()):
        return one * float(bool(small.all()))
    above = float(sizes[~small].min())
    between = math.sqrt(above * max(float(sizes[small].max()), above * 2.0**-10))
    sign = torch.linalg.solve(core / between + one, core / between - one)
    for _ in range(NEWTON):
        sign, last = (sign + torch.linalg.inv(sign)) / 2, sign
        if float((sign - last).abs().max()) <= tolerance(len(core)) * float(sign.abs().max()):
            break
    projector: Tensor = (one - sign) / 2
    return projector


def _invertible(
    left: Tensor, right: Tensor, constant: Tensor, scale: float, lost: float
) -> Carried:
    """Return 1 + L R with its inverse, by Woodbury's identity."""
    core = torch.eye(left.shape[1], dtype=left.dtype) + right @ left
    zeros = torch.zeros_like(constant)
    forward = LowRankMap(left, right, zeros)
    back = LowRankMap(-left, torch.linalg.solve(core, right), zeros)
    return Carried(thin(forward), thin(back), constant, scale, lost)


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
