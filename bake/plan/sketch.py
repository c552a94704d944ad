"""A plan's values in a few numbers that rounding does not change, where its digest would.

A digest is over every bit, and another processor or another build of torch multiplies with other
roundings. So the record also keeps, for every tensor, what its maps do to one fixed vector, seen
along another: equal within rounding for the same plan, and different for any other one, but for a
coincidence of measure zero.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap
from bake.edits import WeightUpdate
from bake.plan.types import BiasUpdate, PartMap, Plan, TensorUpdate

DIGITS = 6
"""Significant digits that are kept: far above rounding, and enough to tell two edits apart."""
TOLERANCE = 1e-5
"""Of the size of what is seen: ten times what keeping six digits loses."""


def sketch(plan: Plan) -> dict[str, list[float]]:
    """Return a few numbers of every tensor that the plan changes or creates, by its name."""
    return {name: [_short(value) for value, _ in rows] for name, rows in _seen(plan).items()}


def differing(recorded: Mapping[str, Sequence[float]], plan: Plan) -> tuple[str, ...]:
    """Return the names of the tensors whose values are not those of a recorded sketch.

    Args:
        recorded: as ``sketch`` returned it once; nobody vouches for it.
        plan: made here.
    """
    seen = _seen(plan)
    return tuple(
        name
        for name in dict.fromkeys((*recorded, *seen))
        if not _equal(recorded.get(name), seen.get(name))
    )


def _equal(recorded: Sequence[float] | None, seen: list[tuple[float, float]] | None) -> bool:
    if seen is None or recorded is None or len(recorded) != len(seen):
        return False
    return all(
        abs(value - here) <= TOLERANCE * size
        for value, (here, size) in zip(recorded, seen, strict=True)
    )


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS - 1}e}")


def _seen(plan: Plan) -> dict[str, list[tuple[float, float]]]:
    """Return, by tensor, numbers with the size that each could have at most."""
    updates: tuple[TensorUpdate | BiasUpdate, ...] = (*plan.tensors, *plan.biases)
    return {update.name: list(_parts(update)) for update in updates}


def _parts(update: TensorUpdate | BiasUpdate) -> Iterator[tuple[float, float]]:
    for part in update.outputs:
        yield from _map(part)
    for ready in update.updates:
        yield from _update(ready)
    if isinstance(update, TensorUpdate):
        if update.input is not None:
            yield from _map(PartMap(None, update.input))
        if update.added is not None:
            yield from _update(update.added)
        vectors: tuple[Tensor | None, ...] = (update.replacement,)
    else:
        vectors = (update.shift, update.addend)
    for vector in vectors:
        if vector is not None:
            yield _along(vector.double())


def _map(part: PartMap) -> Iterator[tuple[float, float]]:
    found: AffineMap = part.map
    probe = _probe(found.width, 0.7)
    yield _along(found.linear(probe) - probe)
    yield _along(found.bias)


def _update(ready: WeightUpdate) -> Iterator[tuple[float, float]]:
    probe = _probe(ready.right.shape[1], 0.7).to(ready.right.dtype)
    yield _along((ready.left @ (ready.right @ probe)).double())


def _along(vector: Float[Tensor, " n"]) -> tuple[float, float]:
    """Return a vector seen along a fixed one, and the product of their norms."""
    other = _probe(vector.shape[0], 1.3)
    return float(vector @ other), float(vector.norm() * other.norm())


def _probe(size: int, step: float) -> Float[Tensor, " n"]:
    """Return a vector that has no direction in common with anything fitted."""
    return torch.sin(step * torch.arange(1, size + 1, dtype=torch.float64))
