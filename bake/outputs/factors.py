"""The factors of a planned weight change, from one pass over the weight: memory of one tile.

See ``bake.plan.lowrank`` for the formula. The weight is read in tiles of rows, as it lies on disk;
what grows with it are the factors alone.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from bake.fold import TILE_VALUES, ReadRows
from bake.plan.lowrank import LowRank, split_constant


def layer_factors(
    read: ReadRows, shape: tuple[int, ...], output_axis: int, change: LowRank
) -> tuple[Float[Tensor, "r inner"], Float[Tensor, "out r"]]:
    """Return (A, B) with W' − W = B A in float64, for W as [out, inner] whatever its storage.

    Args:
        read: reads rows of the stored weight.
        shape: of the stored weight.
        output_axis: the axis of it that the output is on.
        change: the factors that need no weight.
    """
    outer, inner = shape[output_axis], shape[1 - output_axis]
    rows = torch.zeros(change.output_right.shape[0], inner, dtype=torch.float64)  # R_o W
    columns = torch.zeros(outer, change.input_left.shape[1], dtype=torch.float64)  # W L_i
    if rows.shape[0] or columns.shape[1]:
        for start, tile in _tiles(read, shape):
            stop = start + tile.shape[0]
            if output_axis == 0:
                rows += change.output_right[:, start:stop] @ tile
                columns[start:stop] = tile @ change.input_left
            else:
                rows[:, start:stop] = (tile @ change.output_right.T).T
                columns += tile.T @ change.input_left[start:stop]
    rows += (change.output_right @ change.update_left) @ change.update_right
    columns += change.update_left @ (change.update_right @ change.input_left)
    rows += (rows @ change.input_left) @ change.input_right
    a = torch.cat([change.update_right, rows, change.input_right])
    b = torch.cat([change.update_left, change.output_left, columns], dim=1)
    return a, b


def table_factors(
    read: ReadRows, shape: tuple[int, ...], change: LowRank
) -> tuple[Float[Tensor, "r tokens"], Float[Tensor, "d r"]]:
    """Return (A, B) with E' − E = (B A)ᵀ in float64, for a table E of rows, [tokens, d].

    A constant in the span of the edited directions joins their factors; another one gets a row of
    ones of its own.
    """
    assert change.constant is not None
    inside, outside = split_constant(change.output_left, change.constant)
    a = torch.zeros(change.output_right.shape[0], shape[0], dtype=torch.float64)
    for start, tile in _tiles(read, shape):
        a[:, start : start + tile.shape[0]] = (tile @ change.output_right.T).T
    a += inside.unsqueeze(1)
    if outside is None:
        return a, change.output_left
    ones = torch.ones(1, shape[0], dtype=torch.float64)
    return torch.cat([a, ones]), torch.cat([change.output_left, outside.unsqueeze(1)], dim=1)


def padded(
    a: Float[Tensor, "r inner"], b: Float[Tensor, "out r"], rank: int
) -> tuple[Float[Tensor, "rank inner"], Float[Tensor, "out rank"]]:
    """Return the factors with zeros up to a rank that all weights of an adapter share."""
    more = rank - a.shape[0]
    return (
        torch.cat([a, a.new_zeros(more, a.shape[1])]),
        torch.cat([b, b.new_zeros(b.shape[0], more)], dim=1),
    )


def _tiles(read: ReadRows, shape: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    step = max(1, TILE_VALUES // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield start, read(start, min(start + step, shape[0])).to(torch.float64)
