"""``Known``: what the plan knows for certain of the residual stream at a point.

After a hook x ↦ A x + b, every functional f with fᵀA = 0 has the value fᵀb on every token. Such
facts decide whether the next hook can fold: it may change of the skip path only what is constant.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap, tolerance


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """The linear functionals of the stream that are constant, with their values.

    ``functionals`` [m, d] has orthonormal rows; ``values`` [m] are what they evaluate to. None
    stands for all functionals with value zero: the skip path before the embedding, which is empty.
    """

    functionals: Float[Tensor, "m d"] | None
    values: Float[Tensor, " m"] | None

    def constant(self, rows: Float[Tensor, "k d"]) -> Float[Tensor, " k"] | None:
        """Return the values of ``rows`` (each a functional), or None when one is not constant."""
        if self.functionals is None or self.values is None:
            return rows.new_zeros(rows.shape[0])
        coordinates = rows @ self.functionals.T
        left_over = rows - coordinates @ self.functionals
        if float(left_over.abs().sum()) > tolerance(rows.shape[1]) * float(rows.abs().sum()):
            return None
        return coordinates @ self.values

    def turned(self, functionals: Float[Tensor, "m d"] | None) -> "Known":
        """Return the same values for functionals that moved with the stream."""
        return Known(functionals, self.values)

    def through(self, map_: AffineMap) -> "Known":
        """Return what is known of the stream behind a linear map, which need not be invertible.

        A functional g of A x is constant where gᵀA is one of x that is: in the span of the
        functionals that are known, or zero.
        """
        if self.functionals is None or self.values is None:
            raise AssertionError("the stream before the embedding passes no map")
        own = self.functionals
        basis = torch.linalg.qr(torch.cat([own, map_.delta_factors()[1]]).T)[0].T
        pulled = map_.adjoint(basis)
        outside = pulled - (pulled @ own.T) @ own
        u, sizes, _ = torch.linalg.svd(outside, full_matrices=False)
        scale = max(1.0, float(pulled.abs().max()))
        found = u[:, sizes <= tolerance(basis.shape[1]) * scale].T @ basis
        return Known(found, map_.adjoint(found) @ own.T @ self.values)

    def meet(self, rows: Float[Tensor, "n d"]) -> "Known":
        """Return what is known of the sum of this and a write on which ``rows`` vanish.

        A functional stays constant when it is constant here and vanishes on the write: the
        intersection of two subspaces, for orthonormal ``rows``.
        """
        if self.functionals is None or self.values is None:
            return Known(rows, rows.new_zeros(rows.shape[0]))
        if rows.shape[0] == 0 or self.functionals.shape[0] == 0:
            return Known(rows[:0], rows.new_zeros(0))
        outside = self.functionals - (self.functionals @ rows.T) @ rows
        # A singular value is the sine of an angle between the two subspaces.
        u, sines, _ = torch.linalg.svd(outside, full_matrices=False)
        keep = u[:, sines <= tolerance(rows.shape[1])].T
        return Known(keep @ self.functionals, keep @ self.values)

    def shifted(self, constant: Float[Tensor, " d"]) -> "Known":
        """Return what is known after a constant is added to the stream."""
        if self.functionals is None or self.values is None:
            raise AssertionError("the stream before the embedding takes no constant")
        return Known(self.functionals, self.values + self.functionals @ constant)
