"""The rank of a change that was rounded: how many directions rounding cannot account for.

A stored change is Δ = D + N: what was meant, and what rounding made of it. N is of full rank, so
the rank of Δ says nothing. Every entry of N is known to lie in a box, |N_ij| ≤ h_ij, half a step
of the storage grid. The rank is the smallest k for which some matrix of rank k lies in the box
around Δ, up to what independent rounding explains.

**What independent rounding explains.** A random matrix with independent, centred entries of sizes
at most h_ij has a spectral norm of about

    τ = max_i (Σ_j h_ij²)^½ + max_j (Σ_i h_ij²)^½

(Bandeira and van Handel, Ann. Probab. 44 (2016), Theorem 1.1; h(√m + √n) for a constant h, the edge
of Marchenko and Pastur). Errors spread evenly over the box are smaller by √3, which is the margin.

**Why the box is needed.** Where D is small beside the grid, rounding is no noise: it is a function
of D, entry by entry, and a function of a matrix of rank 1 has singular values far above τ that
were never meant. They disappear once what fits into the box is taken out: with D_k of rank k,

    R = Δ − D_k,    E = R − clip(R, −h, h),

E is the part of the change that neither D_k nor rounding accounts for. D_k starts as the truncated
singular value decomposition of Δ and moves towards the box (D_k ← truncation of D_k + E) as long as
that shrinks E. The rank is k when ‖E‖ ≤ τ. It is 0 when the largest singular value of Δ is at most
2 τ: two roundings of the same weights, to nearest and towards zero say, differ by a whole step.

Everything streams over tiles of rows. Decompositions are randomised (Halko, Martinsson and Tropp,
SIAM Review 53 (2011), algorithms 4.4 and 5.1) with a fixed seed; they hold m + n numbers per
direction.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bake.diff.precision import FLOATS
from bake.diff.tiles import Difference, Tile

_OVERSAMPLED = 8
_SEED = 0
_REFINEMENTS = 4
_UNRESOLVED = 4  # terms that stand for a change whose rank is larger than was looked for
_PROBES = 6  # columns of the sketch that measures ‖E‖


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """A matrix of low rank: ``left @ diag(values) @ right``, both sides orthonormal."""

    left: Float[Tensor, "m k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "k n"]

    def first(self, count: int) -> "Factors":
        """Return the ``count`` largest terms."""
        # Clones, because a slice would hold the memory of all.
        left, right = self.left[:, :count].clone(), self.right[:count].clone()
        return Factors(left, self.values[:count], right)


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """What a change consists of.

    Attributes:
        rank: how many directions rounding cannot account for; None where that is more than was
            looked for, or where the rounding of the storage type is unknown.
        most: how many were looked for.
        threshold: τ, the largest singular value that independent rounding would have; None where
            the rounding of the storage type is unknown.
        rounding: the square sum that errors spread evenly over the box would have.
        values: the largest singular values of the change, ``most`` of them at most.
        factors: the terms that count; the first few where their number is unknown.
    """

    rank: int | None
    most: int
    threshold: float | None
    rounding: float
    values: Float[Tensor, " most"]
    factors: Factors


def measure_spectrum(
    change: Difference, rows: Bool[Tensor, " m"], columns: Bool[Tensor, " n"], most: int
) -> Spectrum:
    """Return the spectrum of a change.

    Args:
        change: the two matrices, with finite values.
        rows: the rows that differ anywhere.
        columns: the columns that do.
        most: the largest rank to tell from a larger one.
    """
    work = _Work(change, rows, columns)
    threshold, rounding = work.threshold()
    full = min(int(rows.sum()), int(columns.sum()))
    width = min(most + _OVERSAMPLED, *change.shape)
    found, _ = work.decompose(width, power=width < min(change.shape))
    values = found.values[: min(most, full)]
    if threshold is None:
        return Spectrum(None, most, None, rounding, values, found.first(_UNRESOLVED))
    # What the arithmetic here adds: an error of eps to every entry, as independent as they come.
    largest = float(found.values[0]) if len(found.values) else 0.0
    eps = torch.finfo(change.dtype).eps
    threshold = max(threshold, largest * math.sqrt(max(change.shape)) * eps)
    rank = _rank(work, found, threshold, min(most, full), full)
    kept = found.first(_UNRESOLVED if rank is None else rank)
    return Spectrum(rank, most, threshold, rounding, values, kept)


def _rank(work: "_Work", found: Factors, threshold: float, most: int, full: int) -> int | None:
    """Return the smallest rank that explains the change up to rounding."""
    # That nothing was meant is another question: then both matrices are roundings of one, maybe in
    # two ways, which the box of a float type does not allow for.
    floats = work.change.out.tensors[work.change.name].dtype in FLOATS
    if not len(found.values) or float(found.values[0]) <= threshold * (2 if floats else 1):
        return 0
    # A higher rank explains whatever a lower one does, so halving the range finds the smallest.
    # One direction is what an edit mostly has, so that is asked first.
    low = 0
    for k in (1, most):
        if k < full and not work.explained(found, k, threshold):
            low = k
        elif k == 1:
            return 1
    if low == most:
        return None
    low, high = max(low, 1), most
    while high - low > 1:
        middle = (low + high) // 2
        if work.explained(found, middle, threshold):
            high = middle
        else:
            low = middle
    return high


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """The passes over one change."""

    change: Difference
    rows: Tensor
    columns: Tensor

    def threshold(self) -> tuple[float | None, float]:
        """Return τ and the square sum of evenly spread rounding, over what differs.

        Rows and columns without any difference have no rounding that could be seen.
        """
        by_row, total = 0.0, 0.0
        by_column = torch.zeros(self.change.shape[1], dtype=torch.float64)
        for tile in self.change.tiles(box=True):
            if tile.box is None:
                return None, math.nan
            here = self.rows[tile.start : tile.stop]
            squares = tile.box.to(torch.float64).square()[here][:, self.columns]
            if squares.numel():
                by_row = max(by_row, float(squares.sum(dim=1).max()))
                by_column[self.columns] += squares.sum(dim=0)
                total += float(squares.sum())
        return math.sqrt(by_row) + math.sqrt(float(by_column.max())), total / 3

    def decompose(
        self, width: int, *, power: bool, beyond: Factors | None = None
    ) -> tuple[Factors, float]:
        """Return the largest terms of Δ, or of E: what neither ``beyond`` nor the box explains.

        With them comes the square sum of all of it.

        Args:
            width: how many terms.
            power: whether to iterate once more, for a spectrum that falls slowly.
            beyond: D_k.
        """
        generator = torch.Generator().manual_seed(_SEED)
        kind = self.change.dtype
        probes = torch.randn(self.change.shape[1], width, generator=generator, dtype=kind)
        basis = _orthonormal(self._times(probes, beyond))
        if power:
            under, _ = self._under(basis, beyond)
            basis = _orthonormal(self._times(_orthonormal(under.T), beyond))
        under, total = self._under(basis, beyond)
        u, values, right = torch.linalg.svd(under.to(torch.float64), full_matrices=False)
        left = basis.to(torch.float64) @ u
        return Factors(left.to(kind), values, right.to(kind)), total

    def explained(self, factors: Factors, rank: int, threshold: float) -> bool:
        """Tell whether a matrix of that rank lies in the box around Δ, up to τ."""
        terms, last = factors.first(rank), math.inf
        m, n = int(self.rows.sum()), int(self.columns.sum())
        for _ in range(_REFINEMENTS):
            width = min(_PROBES, *self.change.shape)
            rest, total = self.decompose(width, power=False, beyond=terms)
            # A few probes see one large term, and underrate many that are equal: then the norm is
            # that of a random matrix with this square sum.
            spread = math.sqrt(total) * (1 / math.sqrt(m) + 1 / math.sqrt(n))
            size = max(float(rest.values[0]), spread if min(m, n) > 4 * rank else 0.0)
            if size <= threshold:
                return True
            if size > last / 2:
                return False
            last, terms = size, _sum(terms, rest).first(rank)
        return False

    def _times(self, right: Tensor, beyond: Factors | None) -> Float[Tensor, "m k"]:
        """Return Δ or E times a thin matrix."""
        made = torch.empty(self.change.shape[0], right.shape[1], dtype=right.dtype)
        for tile in self.change.tiles(box=beyond is not None):
            made[tile.start : tile.stop] = _rest(tile, beyond) @ right
        return made

    def _under(self, left: Tensor, beyond: Factors | None) -> tuple[Float[Tensor, "k n"], float]:
        """Return the transpose of a thin matrix times Δ or E, and the square sum of the latter."""
        made = torch.zeros(left.shape[1], self.change.shape[1], dtype=left.dtype)
        total = 0.0
        for tile in self.change.tiles(box=beyond is not None):
            rest = _rest(tile, beyond)
            made += left[tile.start : tile.stop].T @ rest
            total += float(torch.linalg.vector_norm(rest, dtype=torch.float64)) ** 2
        return made, total


def _rest(tile: Tile, beyond: Factors | None) -> Float[Tensor, "rows n"]:
    """Return rows of Δ, or of E, what neither D_k nor rounding accounts for."""
    if beyond is None:
        return tile.delta
    assert tile.box is not None  # without it there is no threshold, and nobody asks
    rest = (
        tile.delta
        - (beyond.left[tile.start : tile.stop] * beyond.values.to(beyond.left)) @ beyond.right
    )
    return rest - rest.clamp(-tile.box, tile.box)


def _orthonormal(columns: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
    """Return an orthonormal basis, found in float64."""
    basis: Tensor = torch.linalg.qr(columns.to(torch.float64))[0]
    return basis.to(columns.dtype)


def _sum(one: Factors, other: Factors) -> Factors:
    """Return the singular value decomposition of a sum."""
    kind = one.left.dtype
    left = torch.cat([one.left * one.values.to(kind), other.left * other.values.to(kind)], dim=1)
    right = torch.cat([one.right, other.right])
    q_left, r_left = torch.linalg.qr(left.to(torch.float64))
    q_right, r_right = torch.linalg.qr(right.T.to(torch.float64))
    u, values, vh = torch.linalg.svd(r_left @ r_right.T)
    return Factors((q_left @ u).to(kind), values, (vh @ q_right.T).to(kind))
