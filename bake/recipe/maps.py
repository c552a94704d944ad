"""The map of one edit, from the tensors of its directions and the recipe's numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bake import edits
from bake.affine import AffineMap, DiagonalMap
from bake.directions import Direction, Role
from bake.edits import EditKind, WeightUpdate
from bake.errors import DirectionError, UsageError
from bake.nonlinear import Aimed, Clamp, Gated, Masked, Measure, Nonlinear, NormPreserving
from bake.recipe.spec import ConditionTable, EditTable

# Which kinds of edit a tensor of each role is for: the advice when a role is missing.
KINDS_OF_ROLE: Mapping[Role, tuple[EditKind, ...]] = {
    Role.VECTOR: (EditKind.ABLATE, EditKind.AFFINE, EditKind.OFFSET, EditKind.CLAMP),
    Role.SUBSPACE: (EditKind.ABLATE, EditKind.AFFINE, EditKind.ROTATE),
    Role.LEFT: (EditKind.ERASE, EditKind.LINEAR, EditKind.UPDATE, EditKind.CLAMP),
    Role.SCALE: (EditKind.SCALE,),
    Role.LOW: (EditKind.MASKED_SCALE,),
    Role.MATRIX: (EditKind.LINEAR, EditKind.ROTATE),
    Role.OFFSET: (EditKind.OFFSET,),
}
# What else belongs to the map that a kind makes of a tensor of such a role.
_REST: Mapping[EditKind, tuple[Role, ...]] = {
    EditKind.ERASE: (Role.MEAN,),
    EditKind.CLAMP: (Role.MEAN, Role.THRESHOLD),
    EditKind.SCALE: (Role.OFFSET, Role.BIAS),
    EditKind.MASKED_SCALE: (Role.SCALE, Role.OFFSET, Role.BIAS),
    EditKind.LINEAR: (Role.OFFSET, Role.BIAS),
}
# The tensors that are one map where no vector is: a factor, and a constant.
_PARTS = (
    *(Role.SCALE, Role.MATRIX, Role.LEFT),
    *(Role.OFFSET, Role.BIAS, Role.MEAN, Role.THRESHOLD),
)
SIGNED_ROLES = (Role.VECTOR, Role.SUBSPACE, Role.OFFSET)


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """One item of an artifact, under the name that the recipe gives it."""

    name: str
    item: Direction
    sign: int

    def tensor(self, kind: EditKind, *roles: Role) -> Tensor:
        """Return the tensor of the first of ``roles`` that the item has, with its sign.

        Raises:
            DirectionError: it has none of them.
        """
        for role in roles:
            if role in self.item.tensors:
                tensor = self.item.tensors[role].to(torch.float64)
                return self.sign * tensor if role in SIGNED_ROLES else tensor
        held = tuple(self.item.tensors)
        others = [other for role in held for other in KINDS_OF_ROLE.get(role, ())]
        raise DirectionError(
            f"kind = {str(kind)!r} needs {' or '.join(roles)}, "
            f"but direction {self.name!r} holds {', '.join(held)}",
            fix=f"what it holds is for {', '.join(dict.fromkeys(others))}" if others else None,
        )

    def get(self, role: Role) -> Tensor | None:
        """Return the tensor of a role, or None."""
        return self.item.tensors.get(role)


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much of an edit there is at some of its sites."""

    strength: float
    """s, which blends any map with the identity."""
    coefficient: float
    """c of an offset."""


def map_of(
    spec: EditTable,
    items: tuple[Named, ...],
    mean: Tensor | None,
    amounts: Amounts,
    condition: Tensor | None = None,
) -> AffineMap | WeightUpdate | Nonlinear:
    """Return the map of an edit.

    Args:
        spec: the edit, with its numbers.
        items: the directions that act together; several only for a kind that takes several.
        mean: μ [d] of an affine, erase or clamp edit, or None for zero.
        amounts: those of its numbers that may differ from site to site.
        condition: the vector [d] of a gate.

    Raises:
        DirectionError: a direction has no tensor of a role that the kind takes, or its values do
            not make such a map.
        UsageError: a rotation that is not determined.
    """
    inner = _map_inside(spec, items, mean, amounts)
    if spec.kind is EditKind.NORM_PRESERVING:
        if isinstance(inner, Aimed):
            return inner  # it keeps the norm by itself, as a turn does
        assert isinstance(inner, AffineMap)
        keeps = inner.is_linear() and inner.is_orthogonal()
        return inner if keeps else NormPreserving(inner)  # a turn about the origin keeps it anyway
    if spec.kind is EditKind.GATE:
        assert isinstance(inner, AffineMap | Masked | Aimed) and spec.gate is not None
        assert condition is not None
        return gated(inner, spec.gate, condition)
    return inner


def gated(
    map_: AffineMap | NormPreserving | Masked | Aimed, gate: ConditionTable, vector: Tensor
) -> Gated:
    """Return a map that acts on the condition that a recipe names.

    Raises:
        DirectionError: the condition's vector has another width, or is zero.
    """
    threshold = gate.below if gate.above is None else gate.above
    assert threshold is not None, "a condition has one side"
    measure = Measure(gate.measure)
    return Gated(map_, vector.to(torch.float64), threshold, gate.above is not None, measure)


def masked(item: Direction, map_: AffineMap) -> Masked | None:
    """Return a scale that acts between the limits of an item; None where it has none.

    Raises:
        DirectionError: the limits have another width.
    """
    low, high = item.tensors.get(Role.LOW), item.tensors.get(Role.HIGH)
    if low is None or high is None or not isinstance(map_, DiagonalMap):
        return None
    return Masked(map_.scale, map_.bias, low.to(torch.float64), high.to(torch.float64))


def left_out(kind: EditKind, held: Mapping[Role, Tensor]) -> list[Role]:
    """Return which parts of the map that an item holds a kind would leave out."""
    if Role.VECTOR in held or Role.SUBSPACE in held:
        return []  # it is no map, and a mean may stand beside it
    whole = [role for role in _PARTS if role in held]
    return [
        r for r in whole if kind not in KINDS_OF_ROLE.get(r, ()) and r not in _REST.get(kind, ())
    ]


def _check_whole(kind: EditKind, named: Named) -> None:
    """Refuse a part of a map: an eraser without its mean, the shift of a scale alone.

    Raises:
        DirectionError: naming the parts, and the kinds that take all of them.
        UsageError: the opposite of a map is asked for.
    """
    held = named.item.tensors
    of_vector = Role.VECTOR in held or Role.SUBSPACE in held  # beside which a mean may stand
    kinds = [one for one in EditKind if any(one in KINDS_OF_ROLE.get(role, ()) for role in held)]
    if of_vector or kind not in kinds:
        return
    if named.sign == -1 and kind is not EditKind.OFFSET:
        raise UsageError(
            f"sign = -1 of direction {named.name!r} has no meaning for kind = {str(kind)!r}",
            why="it turns a vector, a subspace or an offset that is added, and no map",
            fix="leave sign out",
        )
    if lost := left_out(kind, held):
        fitting = [one for one in kinds if not left_out(one, held)]
        raise DirectionError(
            f"kind = {str(kind)!r} would leave out the {' and the '.join(lost)} of direction "
            f"{named.name!r}",
            why="what it holds is one map together",
            fix=f"write kind = {' or '.join(repr(str(one)) for one in fitting)}"
            if fitting
            else "save what is meant alone in a file",
        )
    if {Role.OFFSET, Role.BIAS} <= held.keys():
        raise DirectionError(
            f"direction {named.name!r} holds an offset and a bias, which are both the constant",
            fix="save their sum as one of them",
        )


def _map_inside(
    spec: EditTable, items: tuple[Named, ...], mean: Tensor | None, amounts: Amounts
) -> AffineMap | WeightUpdate | Nonlinear:
    """Return the map of an edit without what is around it."""
    kind, first, strength = spec.inner, items[0], amounts.strength
    for named in items:
        _check_whole(kind, named)
    match kind:
        case EditKind.ABLATE:
            return edits.ablate(_rows(kind, items), strength=strength)
        case EditKind.AFFINE:
            rows = _rows(kind, items)
            return edits.affine(rows, mean=mean, alpha=spec.alpha, strength=strength)
        case EditKind.ERASE:
            left, right = first.tensor(kind, Role.LEFT), first.tensor(kind, Role.RIGHT)
            return edits.erase(left, right, mean=mean, strength=strength)
        case EditKind.OFFSET:
            vector = first.tensor(kind, Role.VECTOR, Role.OFFSET)
            return edits.offset(vector, coefficient=amounts.coefficient, keep=spec.keep)
        case EditKind.SCALE:
            factor = first.tensor(kind, Role.SCALE)
            return edits.scale((1 - strength) + strength * factor, shift=_shift(first, strength))
        case EditKind.CLAMP:
            return _clamp(spec, first, mean)
        case EditKind.MASKED_SCALE:
            first.tensor(kind, Role.LOW)  # raises where there are no limits
            plain = edits.scale(
                (1 - strength) + strength * first.tensor(kind, Role.SCALE),
                shift=_shift(first, strength),
            )
            found = masked(first.item, plain)
            assert found is not None, "low and high go together"
            return found
        case EditKind.ROTATE:
            return _rotation(spec, items)
        case EditKind.LINEAR if first.get(Role.LEFT) is not None:
            left, right = first.tensor(kind, Role.LEFT), first.tensor(kind, Role.RIGHT)
            shift = _shift(first, 1.0)
            return edits.linear_factors(left, right, shift=shift, strength=strength)
        case EditKind.LINEAR:
            matrix = first.tensor(kind, Role.MATRIX)
            unit = torch.eye(matrix.shape[0], dtype=matrix.dtype)
            return edits.linear(
                (1 - strength) * unit + strength * matrix, shift=_shift(first, strength)
            )
        case EditKind.UPDATE:
            left, right = first.tensor(kind, Role.LEFT), first.tensor(kind, Role.RIGHT)
            return edits.update(strength * left.T, right)
        case EditKind.NORM_PRESERVING | EditKind.GATE:
            raise AssertionError("what stands inside a map is a map")


def _clamp(spec: EditTable, named: Named, mean: Tensor | None) -> AffineMap | Clamp:
    """Return what keeps a component within limits: along a unit vector, or of an encoder."""
    if named.get(Role.LEFT) is not None:
        left, right = named.tensor(spec.kind, Role.LEFT), named.tensor(spec.kind, Role.RIGHT)
    else:
        right = edits.orthonormal(named.tensor(spec.kind, Role.VECTOR, Role.LEFT))
        left = right.T
    zero = right.new_zeros(right.shape[1])
    centre = zero if mean is None else mean.to(torch.float64)
    low, high = (
        limit if said is None else said
        for said, limit in ((spec.low, -math.inf), (spec.high, math.inf))
    )
    said = named.get(Role.THRESHOLD)
    thresholds = right.new_zeros(right.shape[0] if spec.rectified else 0) if said is None else said
    clamp = Clamp(left, right, centre, low, high, tuple(thresholds.tolist()))
    fixed = clamp.always  # between limits that are one number, a component is set to it
    return clamp if fixed is None else fixed


def _rotation(spec: EditTable, items: tuple[Named, ...]) -> AffineMap | Aimed:
    if spec.degrees is not None or spec.angle is not None:
        plane = _rows(spec.inner, items)
        if (count := plane.reshape(-1, plane.shape[-1]).shape[0]) != 2:
            raise DirectionError(
                f"a rotation turns in the plane of two vectors, not {count}",
                fix='give direction = ["first", "second"], or reflect = true in place of the angle',
            )
        if spec.degrees is not None:
            return edits.rotate_plane(plane, degrees=spec.degrees)
        assert spec.angle is not None
        basis, turn = edits.orthonormal(plane), math.radians(spec.angle)
        return Aimed(basis, math.cos(turn) * basis[0] + math.sin(turn) * basis[1])
    held = items[0].item.tensors
    if len(items) > 1 and spec.reflect:
        raise UsageError(
            f"reflect mirrors along one vector, not {len(items)}",
            fix="name one direction, or turn in their plane with degrees or angle",
        )
    if len(items) > 1 or (Role.SUBSPACE in held and not {Role.MATRIX, Role.VECTOR} & held.keys()):
        raise UsageError(
            "a rotation in the plane of two directions needs degrees or angle",
            fix="add degrees = 30 to turn by, or angle = 180 to turn to, for example",
        )
    if spec.reflect:
        return edits.reflect(items[0].tensor(spec.inner, Role.VECTOR))
    return edits.rotate(items[0].tensor(spec.inner, Role.MATRIX))


def _rows(kind: EditKind, items: tuple[Named, ...]) -> Tensor:
    """Return the one vector [d], or the rows [k, d] of all vectors and subspaces together."""
    tensors = [named.tensor(kind, Role.VECTOR, Role.SUBSPACE) for named in items]
    if len(tensors) == 1:
        return tensors[0]
    widths = {named.name: tensor.shape[-1] for named, tensor in zip(items, tensors, strict=True)}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{name!r} has {width}" for name, width in widths.items())
        raise DirectionError(f"the widths of a joint subspace differ: {listed}")
    return torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])


def _shift(named: Named, strength: float) -> Tensor | None:
    for role in (Role.OFFSET, Role.BIAS):
        found = named.get(role)
        if found is not None:
            return strength * found.to(torch.float64)
    return None
