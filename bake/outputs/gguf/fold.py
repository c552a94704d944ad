"""A plan's updates as folds of GGUF tensors: the same algebra, in the file's own order of rows."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap
from bake.edits import WeightUpdate
from bake.families.gguf import GgufPlace
from bake.fold import WeightFold
from bake.plan import BiasUpdate, PartMap, TensorUpdate


def weight_fold(update: TensorUpdate, place: GgufPlace) -> WeightFold:
    """Return the fold of a matrix as the file holds it: [out, in], or the rows of a table."""
    rows, columns = update.shape[::-1] if place.transposed else update.shape
    return WeightFold(
        shape=(rows, columns),
        output_axis=1 if update.is_table else 0,
        outputs=_outputs(update.outputs, place),
        updates=_updates(update.updates, place),
        input=update.input,
        table=update.is_table,
    )


def bias_fold(update: BiasUpdate, place: GgufPlace, shape: tuple[int, int]) -> WeightFold:
    """Return the fold of the layer whose bias it is; ``shape`` is its weight's in the file."""
    return WeightFold(
        shape=shape,
        output_axis=0,
        outputs=_outputs(update.outputs, place),
        updates=_updates(update.updates, place),
    )


def in_file_order(values: Float[Tensor, " m"], place: GgufPlace) -> Float[Tensor, " m"]:
    """Return a vector over a layer's outputs, ordered as the file orders them."""
    return values if place.rows is None else values[torch.tensor(place.rows)]


def _outputs(
    parts: Sequence[PartMap], place: GgufPlace
) -> tuple[tuple[Sequence[int] | None, AffineMap], ...]:
    if place.rows is None:
        return tuple((part.rows, part.map) for part in parts)
    where = torch.argsort(torch.tensor(place.rows))  # output i of the checkpoint is row where[i]

    def moved(rows: Sequence[int] | None) -> tuple[int, ...]:
        return tuple((where if rows is None else where[list(rows)]).tolist())

    return tuple((moved(part.rows), part.map) for part in parts)


def _updates(updates: Sequence[WeightUpdate], place: GgufPlace) -> tuple[WeightUpdate, ...]:
    if place.rows is None:
        return tuple(updates)
    order = torch.tensor(place.rows)
    return tuple(WeightUpdate(update.left[order], update.right) for update in updates)
