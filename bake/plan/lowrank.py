"""A planned weight as base plus thin factors: what an adapter can hold of a plan.

For a layer y = W x the plan says W' = O (W + U) I with O = 1 + L_o R_o along the output, I =
1 + L_i R_i along the input and U = u v. The difference is

    W' − W = u v + L_o (R_o (W + U) I) + ((W + U) L_i) R_i,

three products of thin factors, of which the last two need the weight once. For a table of rows e
the plan says e' = O e + c, and the difference is (R_o e)ᵀ L_oᵀ + 1 cᵀ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap, DiagonalMap, LowRankMap, tolerance
from bake.families import Branch, Layout, Linear
from bake.plan.types import PartMap, Plan, TensorUpdate

Role = Literal["linear", "expert", "embed", "positions", "head"]
"""The kinds of weight that runtimes tell apart in adapters; a router counts with its experts."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The factors of one weight's change that need no weight.

    ``constant`` is added to every row of a table; None for a layer, whose constants are biases.
    """

    output_left: Float[Tensor, "out ko"]
    output_right: Float[Tensor, "ko out"]
    input_left: Float[Tensor, "inner ki"]
    input_right: Float[Tensor, "ki inner"]
    update_left: Float[Tensor, "out ku"]
    update_right: Float[Tensor, "ku inner"]
    constant: Float[Tensor, " out"] | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """One weight that an adapter is for."""

    name: str
    """The tensor in the base checkpoint."""
    module: str
    """Path of the module in a loaded model; of an expert, its path in the checkpoint."""
    table: str
    """The family table's name for it."""
    role: Role
    shape: tuple[int, ...]
    output_axis: int
    layer: int | None
    expert: int | None
    update: TensorUpdate | None
    """What the plan changes; None where a loader wants factors beside others, which are zero."""


@lru_cache(maxsize=2)
def targets_of(plan: Plan) -> tuple[Target, ...]:
    """Return the weights that an adapter of this plan holds factors for, in the model's order.

    A copy of the embedding that becomes a head of its own is left out: an adapter changes the
    embedding alone, and the tied head reads the base's. Where one expert changes, every expert of
    every layer gets factors, because loaders stack them; where one router does, every router.
    """
    updates = {u.name: u for u in plan.tensors if u.replacement is None and not u.is_copy()}
    found = list(_tables(plan.layout, updates))
    layers = [
        (linear, branch)
        for branch in plan.layout.branches
        for linear in (*branch.reads, *branch.writes)
    ]
    changed = {_kind(linear, branch) for linear, branch in layers if linear.weight in updates}
    numbers: dict[tuple[int, str], int] = {}
    for linear, branch in layers:
        expert = None
        if linear.is_expert():
            key = branch.layer, linear.module
            expert = numbers[key] = numbers.get(key, -1) + 1
        update, kind = updates.get(linear.weight), _kind(linear, branch)
        if update is not None or (kind != "linear" and kind in changed):
            role: Role = "linear" if kind == "linear" else "expert"
            found.append(_layer_target(linear, role, branch.layer, expert, update))
    head = plan.layout.unembed
    if head.weight in updates:
        found.append(_layer_target(head, "head", None, None, updates[head.weight]))
    return tuple(found)


def _kind(linear: Linear, branch: Branch) -> Literal["linear", "expert", "router"]:
    if linear.is_expert():
        return "expert"
    mixture = any(other.is_expert() for other in branch.writes)
    return "router" if mixture else "linear"


def _tables(layout: Layout, updates: dict[str, TensorUpdate]) -> Sequence[Target]:
    names = [(layout.embed, layout.embed_live, layout.family.embed.module, "embed")]
    names += [
        (name, table, table, "positions")
        for name, table in zip(layout.positions, layout.family.embed.positions, strict=True)
    ]
    return [
        Target(name, live, table, role, layout.shapes[name], 1, None, None, updates[name])  # type: ignore[arg-type]
        for name, live, table, role in names
        if name in updates
    ]


def _layer_target(
    linear: Linear, role: Role, layer: int | None, expert: int | None, update: TensorUpdate | None
) -> Target:
    path = linear.weight.removesuffix(".weight")
    # Loaders of adapters know the layers of a mixture by their names in the checkpoint.
    module = path if linear.live is None or role == "expert" else linear.live
    return Target(
        linear.weight,
        module,
        linear.module,
        role,
        linear.shape,
        linear.output_axis,
        layer,
        expert,
        update,
    )


def rank_of(update: TensorUpdate) -> int:
    """Return how many rank-one terms the change of a weight has."""
    rank = sum(_map_rank(part.map) for part in update.outputs)
    rank += sum(added.left.shape[1] for added in update.updates)
    if update.input is not None:
        rank += _map_rank(update.input)
    if update.added is not None:
        rank += update.added.left.shape[1]
    if update.is_table and _outside_constant(update) is not None:
        rank += 1
    return rank


def low_rank(update: TensorUpdate) -> LowRank:
    """Return the factors of a weight's change."""
    outer = update.shape[update.output_axis]
    inner = update.shape[1 - update.output_axis]
    left, right = _joined([_placed(part, outer) for part in update.outputs], outer)
    in_left, in_right = _joined([] if update.input is None else [thin_factors(update.input)], inner)
    up_left = [added.left for added in update.updates]
    up_right = [added.right for added in update.updates]
    empty = torch.zeros(outer, 0, dtype=torch.float64), torch.zeros(0, inner, dtype=torch.float64)
    return LowRank(
        left,
        right,
        in_left,
        in_right,
        torch.cat([empty[0], *up_left], dim=1),
        torch.cat([empty[1], *up_right]),
        _constant(update) if update.is_table else None,
    )


def split_constant(
    left: Float[Tensor, "d k"], constant: Float[Tensor, " d"]
) -> tuple[Float[Tensor, " k"], Float[Tensor, " d"] | None]:
    """Return (a, c) with constant = left a + c, and c None where the constant is in the span.

    A constant along the edited directions needs no factor of its own: it joins theirs.
    """
    if left.shape[1] == 0:
        return constant[:0], constant if bool(constant.any()) else None
    inside = torch.linalg.lstsq(left, constant.unsqueeze(1)).solution[:, 0]
    outside = constant - left @ inside
    size = float(constant.abs().max())
    if float(outside.abs().max()) <= tolerance(constant.shape[0]) * size:
        return inside, None
    return torch.zeros_like(inside), constant


def _constant(update: TensorUpdate) -> Tensor:
    total = torch.zeros(update.shape[update.output_axis], dtype=torch.float64)
    for part in update.outputs:
        assert part.rows is None
        total = total + part.map.bias
    return total


def _outside_constant(update: TensorUpdate) -> Tensor | None:
    constant = _constant(update)
    if not bool(constant.any()):
        return None
    left, _ = _joined([_placed(part, constant.shape[0]) for part in update.outputs], len(constant))
    return split_constant(left, constant)[1]


def _map_rank(map_: AffineMap) -> int:
    if isinstance(map_, DiagonalMap):
        return int((map_.scale != 1).sum())
    return thin_factors(map_)[0].shape[1]


@lru_cache(maxsize=256)
def thin_factors(map_: AffineMap) -> tuple[Float[Tensor, "d k"], Float[Tensor, "k d"]]:
    """Return what a map's ``delta_factors`` are; the plan asks again and again for the same."""
    return map_.delta_factors()


def thin(map_: AffineMap) -> AffineMap:
    """Return the same map with the fewest factors: composed projections repeat theirs."""
    if isinstance(map_, LowRankMap):
        left, right = map_.delta_factors()
        return LowRankMap(left, right, map_.bias)
    return map_


def balanced(map_: LowRankMap) -> tuple[Tensor, Tensor]:
    """Return the thin factors of a map that holds rows of different sizes, the left orthonormal."""
    basis, sizes, _ = torch.linalg.svd(map_.left, full_matrices=False)
    basis = basis[:, sizes > tolerance(map_.width) * float(sizes.max())]
    return basis, basis.T @ map_.left @ map_.right


def _placed(part: PartMap, width: int) -> tuple[Tensor, Tensor]:
    """Return a part's factors on the whole output axis."""
    left, right = thin_factors(part.map)
    if part.rows is None:
        return left, right
    index = torch.tensor(part.rows)
    wide = left.new_zeros(width, left.shape[1]).index_copy(0, index, left)
    return wide, right.new_zeros(right.shape[0], width).index_copy(1, index, right)


def _joined(factors: list[tuple[Tensor, Tensor]], width: int) -> tuple[Tensor, Tensor]:
    """Return the factors of maps on disjoint rows, which add up."""
    nothing = torch.zeros(width, 0, dtype=torch.float64)
    lefts, rights = [nothing], [nothing.T]
    for left, right in factors:
        lefts.append(left)
        rights.append(right)
    return torch.cat(lefts, dim=1), torch.cat(rights)
