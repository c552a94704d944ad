"""Whether the changes of many tensors lie in one small subspace, which is how an edit looks.

Every changed matrix is its largest terms Σ s_i u_i v_iᵀ. The side of a tensor that lies along the
residual stream gives vectors of one width for all of them. Their joint subspace is that of the
largest left singular vectors of all s_i u_i / ‖ΔW‖ side by side: every tensor has one vote.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bake.diff.change import Change
from bake.diff.roles import Role, Roles
from bake.diff.tiles import Difference
from bake.diff.weights import Weights

ENOUGH = 0.9
"""The share of the change that a subspace has to hold to be called its subspace."""


@dataclass(frozen=True, slots=True)
class Vectors:
    """What one tensor's change does along the side that is compared."""

    name: str
    total: float
    """The square sum of the change beyond rounding."""
    rank: int
    rows: Float[Tensor, "k d"]
    """s_i u_i of the terms that count, in float64."""


@dataclass(frozen=True, slots=True)
class Leak:
    """How much of one writer's output lies in the subspace, before and after."""

    name: str
    before: float
    after: float

    @property
    def ratio(self) -> float | None:
        """After over before; None where there was nothing before."""
        return self.after / self.before if self.before else None


@dataclass(frozen=True, slots=True, eq=False)
class Subspace:
    """What the changes of one group of tensors have in common.

    Attributes:
        side: ``written`` or ``read``, by the family's table; ``axis 0`` or ``axis 1`` without one.
        width: the length of that side.
        dimension: how many directions hold ``ENOUGH`` of the change, or as many as were looked at.
        share: of the change beyond rounding, how much they hold, over all tensors.
        lowest: the same for the tensor that they hold least of, with its name.
        angle: the largest principal angle between the subspace and a tensor's own, in degrees.
        basis: the directions, orthonormal rows, the most common first.
        tensors: the tensors, in the order of the model.
        shares: of every tensor, what the subspace holds of its change.
        shared: whether it is one subspace for all: at least two tensors to a direction.
        cosines: by name of a given direction, its cosine with the subspace.
        leaks: what of the subspace the writers still write.
    """

    side: str
    width: int
    dimension: int
    share: float
    lowest: tuple[str, float]
    angle: float
    basis: Float[Tensor, "k d"]
    tensors: tuple[str, ...]
    shares: tuple[float, ...]
    shared: bool
    cosines: tuple[tuple[str, float], ...] = ()
    leaks: tuple[Leak, ...] = ()

    @property
    def directions(self) -> Float[Tensor, "k d"]:
        """The directions that count."""
        return self.basis[: self.dimension]


def subspaces(changes: Sequence[Change], roles: Roles, most: int) -> tuple[Subspace, ...]:
    """Return what the changed tensors have in common, per side of the stream.

    Without a table the first and the second axis of matrices of equal length are compared.

    Args:
        changes: those of all tensors.
        roles: where the stream lies in them.
        most: the largest dimension that is looked at.
    """
    groups: dict[tuple[str, int], list[Vectors]] = {}
    for change in changes:
        for side, axis in _sides(change, roles):
            vectors = _vectors(change, axis)
            if vectors is not None:
                groups.setdefault((side, vectors.rows.shape[1]), []).append(vectors)
    found = [
        _joint(side, width, group, most)
        for (side, width), group in groups.items()
        if len(group) > 1
    ]
    return tuple(sorted(found, key=lambda s: (not s.shared, s.side != "written", -s.share)))


def _sides(change: Change, roles: Roles) -> list[tuple[str, int]]:
    if roles.family is None:
        return [("axis 0", 0), ("axis 1", 1)] if change.matrix[1] > 1 else []
    role = roles.of(change.tensor, change.base_name)
    return [] if role is None else [(role.side, role.axis)]


def _vectors(change: Change, axis: int) -> Vectors | None:
    """Return the terms of a change along one axis; None where nothing exceeds rounding."""
    spectrum = change.spectrum
    if spectrum is None or spectrum.rank == 0 or not change.norm:
        return None
    factors = spectrum.factors
    values = factors.values
    side = factors.left.T if axis == 0 else factors.right
    # Where the rank is known the rest is rounding; where it is not, the rest is change as well.
    total = float(values.square().sum()) if spectrum.rank else change.norm**2
    rows = side.to(torch.float64) * values[:, None]
    rank = spectrum.rank or spectrum.most
    return Vectors(change.name, total, rank, rows)


def _joint(side: str, width: int, group: Sequence[Vectors], most: int) -> Subspace:
    votes = torch.cat([vectors.rows / math.sqrt(vectors.total) for vectors in group])
    basis = _principal(votes, min(most, width))
    # held[t][k]: how much of tensor t's change lies along direction k.
    held = torch.stack([(vectors.rows @ basis.T).square().sum(dim=0) for vectors in group])
    totals = torch.tensor([vectors.total for vectors in group], dtype=torch.float64)
    grown = (held.sum(dim=0) / totals.sum()).cumsum(dim=0)
    enough = (grown >= ENOUGH).nonzero()
    dimension = int(enough[0]) + 1 if len(enough) else len(basis)
    shares = (held[:, :dimension].sum(dim=1) / totals).clamp(max=1.0)
    worst = int(shares.argmin())
    directions = basis[:dimension]
    # One subspace for all: small beside the width, and every direction is used twice or more.
    ranks = sum(vectors.rank for vectors in group)
    shared = bool(len(enough)) and 2 * dimension <= ranks and 4 * dimension <= width
    return Subspace(
        side=side,
        width=width,
        dimension=dimension,
        share=min(1.0, float(grown[dimension - 1])),
        lowest=(group[worst].name, float(shares[worst])),
        angle=max(_angle(vectors.rows, directions) for vectors in group),
        basis=basis,
        tensors=tuple(vectors.name for vectors in group),
        shares=tuple(float(share) for share in shares),
        shared=shared,
    )


def _principal(votes: Float[Tensor, "n d"], count: int) -> Float[Tensor, "k d"]:
    """Return the directions that hold most of the votes, orthonormal."""
    if votes.shape[0] <= 2 * votes.shape[1]:
        vh: Tensor = torch.linalg.svd(votes, full_matrices=False)[2]
        basis = vh[:count]
    else:
        basis = torch.linalg.eigh(votes.T @ votes)[1].flip(1).T[:count]
    # A direction has two signs: the larger component is the positive one.
    largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))
    return basis * largest.sign()


def _angle(rows: Float[Tensor, "k d"], directions: Float[Tensor, "n d"]) -> float:
    """Return the largest principal angle between two subspaces, in degrees."""
    own = torch.linalg.qr(rows.T)[0]
    cosines = torch.linalg.svdvals(directions @ own)
    return math.degrees(math.acos(min(1.0, float(cosines.min()))))


def cosine(subspace: Float[Tensor, "k d"], given: Float[Tensor, "n d"]) -> float:
    """Return the smallest cosine of a principal angle between a subspace and given directions.

    1 where the smaller of the two lies in the larger, 0 where some direction is orthogonal to it.

    Args:
        subspace: orthonormal rows.
        given: rows that need not be; zero rows and multiples of others do not count.
    """
    _, values, vh = torch.linalg.svd(given.to(torch.float64), full_matrices=False)
    own = vh[values > values[0] * 1e-10]
    return min(1.0, float(torch.linalg.svdvals(subspace @ own.T).min()))


def leaks_of(
    subspace: Subspace, changes: Sequence[Change], roles: Roles, base: Weights, out: Weights
) -> tuple[Leak, ...]:
    """Return what the changed writers still write of a shared subspace: ‖R W'‖ and ‖R W‖.

    Of an embedding it is what differs between its rows: an affine edit gives all of them the same
    component. Reads every changed writer once more. Writers that are as they were leak as they did.
    """
    if subspace.side != "written" or not subspace.shared:
        return ()
    leaks = []
    for change in changes:
        role = roles.of(change.tensor, change.base_name)
        if role is None or change.name not in subspace.tensors or len(change.shape) < 2:
            continue
        number = int(change.name[:-1].rpartition("[")[2]) if change.name != change.tensor else 0
        pair = Difference(base, out, change.base_name, change.tensor, number)
        leaks.append(Leak(change.name, *_along(pair, subspace.directions, role)))
    return tuple(leaks)


def _along(pair: Difference, directions: Float[Tensor, "k d"], role: Role) -> tuple[float, float]:
    """Return the norms of both matrices along some directions of the stream."""
    rows, columns = pair.shape
    along = rows if role.axis == 1 else columns
    sums = torch.zeros(2, along, len(directions), dtype=torch.float64)
    for tile in pair.tiles():
        for which, matrix in enumerate((tile.before, tile.after)):
            wide = matrix.to(torch.float64)
            if role.axis == 1:
                sums[which, tile.start : tile.stop] = wide @ directions.T
            else:
                sums[which] += wide.T @ directions[:, tile.start : tile.stop].T
    if role.table:
        sums -= sums.mean(dim=1, keepdim=True)
    before, after = (float(torch.linalg.vector_norm(part)) for part in sums)
    return before, after


def given_cosines(
    subspace: Subspace, given: Mapping[str, Float[Tensor, "n d"]]
) -> tuple[tuple[str, float], ...]:
    """Return the cosine of every given direction of the right width with a subspace."""
    return tuple(
        (label, cosine(subspace.directions, rows))
        for label, rows in given.items()
        if rows.shape[1] == subspace.width and bool(rows.any())
    )
