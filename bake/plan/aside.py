"""An edit behind which writers end in norms: what they write is kept beside the stream.

No linear map passes a norm with a gain, so that behind a site the stream cannot be written in
another frame where every write ends in one. It is read in another one instead. With A = 1 + L R and
the writes w behind the site, the hooked stream is y = A z + (1 − A) Σ w = A z − L Σ R w, z being
the stream as the base writes it. Fresh dimensions S keep Σ R w, and readers see A z − L S z.

R w gets there through the norm: a writer u has rows ε R D u besides, D being the norm's gain, which
is 1/ε there. And since nobody reads what A removes, a writer need not write it: without the
component of u along D⁻¹ Q, Q the null space of A, it writes most of it no more. That component is
kept in dimensions of gain zero, so that the norm sees the length that it saw.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap, LowRankMap, identity, tolerance
from bake.plan.lowrank import thin_factors


@dataclass(frozen=True, slots=True, eq=False)
class Aside:
    """What becomes of the stream behind some edits, in a wide model."""

    seen: AffineMap
    """From the stream as it is written to the hooked one."""
    rows: Float[Tensor, "k d"]
    """R: functionals of a write that are kept."""
    place: Float[Tensor, "k d"]
    """The unit vectors that keep them."""
    spare: Float[Tensor, "m d"]
    """Unit vectors that keep what a writer leaves out, before its norm only."""

    @classmethod
    def nothing(cls, width: int) -> "Aside":
        """Return what becomes of a stream that no edit has changed."""
        none = torch.zeros(0, width, dtype=torch.float64)
        return cls(identity(width), none, none, none)

    def is_nothing(self) -> bool:
        """Whether writers stay as they are."""
        return not (len(self.place) or len(self.spare))

    def after(self, map_: AffineMap, place: Float[Tensor, "k d"]) -> "Aside":
        """Return the same behind one more edit.

        Args:
            map_: the edit.
            place: unit vectors for what later writers write, none where no later read needs it.
        """
        left, right = thin_factors(map_)
        kept = right[: len(place)]
        read = right - place if len(place) else right
        frame = LowRankMap(left, read, torch.zeros_like(map_.bias))
        return Aside(
            frame.after(self.seen),
            torch.cat([self.rows, kept]),
            torch.cat([self.place, place]),
            self.spare,
        )

    @property
    def removes(self) -> int:
        """How many dimensions of a write nobody reads."""
        return len(self._null())

    def writer(
        self, gain: Float[Tensor, " d"], least: float
    ) -> tuple[LowRankMap, Float[Tensor, " d"]]:
        """Return what a writer before a norm becomes, and the norm's gain.

        Args:
            gain: what the norm multiplies by.
            least: ε.
        """
        scaled = gain.clone()
        scaled[self.place.any(0)] = 1 / least
        scaled[self.spare.any(0)] = 0.0
        left, right = least * self.place.T, self.rows * gain
        null = self._null()
        if len(null) and float(gain.abs()[null.any(0)].min()) > 0:
            basis = torch.linalg.qr((null / gain.where(gain != 0, gain.new_ones(()))).T)[0]
            left = torch.cat([left, self.spare[: len(null)].T - basis], dim=1)
            right = torch.cat([right, basis.T])
        return LowRankMap(left, right, torch.zeros_like(gain)), scaled

    def _null(self) -> Float[Tensor, "m d"]:
        """Return orthonormal rows that span what of a write nobody reads."""
        left, right = thin_factors(self.seen)
        # Of the frame A − L S on a write w, which has nothing in the fresh dimensions.
        right = right * ~(self.place.any(0) | self.spare.any(0))
        core = torch.eye(left.shape[1], dtype=left.dtype) + right @ left
        _, sizes, vectors = torch.linalg.svd(core)
        least = tolerance(left.shape[0]) * max(1.0, float(torch.linalg.norm(core)))
        basis: Tensor = torch.linalg.qr(left @ vectors[sizes <= least].T)[0].T
        return basis
