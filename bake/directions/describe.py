"""What an artifact holds, as rows for a table."""

import torch
from jaxtyping import Float
from torch import Tensor

from bake.artifact.schema import DirectionRecord, FittedTensor
from bake.directions.direction import Direction, Directions, Role


class Row(FittedTensor, frozen=True, kw_only=True):
    """One tensor of one direction: what a record keeps of it, and how it lies to the others."""

    cosine: float | None
    """Of a vector to that of the item before it; None for the first and for what is no vector."""
    singular_values: tuple[float, ...]
    """Of a subspace, largest first: a small one says that its rows repeat each other."""


def describe(directions: Directions) -> tuple[Row, ...]:
    """Return one row per tensor, in the order of the items; arithmetic is float64.

    The norm is Euclidean, over all entries.
    """
    rows: list[Row] = []
    before: Direction | None = None
    for item in directions.items:
        rows += [_row(item, role, before) for role in item.tensors]
        before = item
    return tuple(rows)


def direction_record(directions: Directions, file: str) -> DirectionRecord:
    """Return what a record keeps of an artifact: what it is, and each tensor's size and norm.

    Args:
        directions: the artifact.
        file: where the recipe says that it is.
    """
    return DirectionRecord(
        file=file,
        concept=directions.concept,
        format=directions.format,
        digest=directions.digest,
        metadata=dict(sorted(directions.metadata.items())),
        tensors=tuple(
            FittedTensor(**{name: getattr(row, name) for name in FittedTensor.__struct_fields__})
            for row in describe(directions)
        ),
    )


def _row(item: Direction, role: Role, before: Direction | None) -> Row:
    tensor = item.tensors[role]
    values = tensor.to(torch.float64)
    singular: tuple[float, ...] = ()
    if role is Role.SUBSPACE:
        singular = tuple(torch.linalg.svdvals(values).tolist())
    neighbour = None if before is None else before.tensors.get(role)
    return Row(
        layer=item.layer,
        site=item.site,
        role=role,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        norm=float(torch.linalg.vector_norm(values)),
        singular_values=singular,
        cosine=_cosine(neighbour, values) if role is Role.VECTOR else None,
    )


def _cosine(neighbour: Float[Tensor, " d"] | None, values: Float[Tensor, " d"]) -> float | None:
    if neighbour is None:
        return None
    other = neighbour.to(torch.float64)
    # Each is scaled by itself first: the product of two norms can overflow where neither does.
    return float(
        (other / torch.linalg.vector_norm(other)) @ (values / torch.linalg.vector_norm(values))
    )
