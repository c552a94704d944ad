"""``StoredFiles``: what every kind of artifact answers about its own files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float64
from torch import Tensor

from bake.affine import AffineMap
from bake.artifact.schema import PlanRecord
from bake.checkpoints import Checkpoint
from bake.checkpoints.planned import PlannedTensor
from bake.edits import Edit
from bake.families import Layout

Rows = Float64[Tensor, "rows columns"]

WIDE = ("F64", "F32")
"""Types whose rounding is not worth measuring beside that of arithmetic in float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """Orthonormal rows [k, width] over one axis of a stored matrix."""

    axis: int
    basis: Float64[Tensor, "k width"]


def written_directions(layout: Layout, edits: Sequence[Edit]) -> dict[str, Directions]:
    """Return what the edits of the stream read, for every tensor that writes to the stream.

    By names of the checkpoint. A writer's outputs lie along its output axis, those of a table along
    its rows.
    """
    maps = [edit.map for edit in edits if isinstance(edit.map, AffineMap)]
    right = [m.delta_factors()[1] for m in maps if m.width == layout.hidden]
    rows = torch.cat(right) if right else torch.empty(0, layout.hidden, dtype=torch.float64)
    # A map that reads every direction singles none out.
    if not 0 < rows.shape[0] < layout.hidden:
        return {}
    _, singular, vh = torch.linalg.svd(rows, full_matrices=False)
    basis = vh[singular > singular[0] * 1e-10]
    tables = {name: Directions(1, basis) for name in (layout.embed, *layout.positions)}
    writers = (linear for branch in layout.branches for linear in branch.writes)
    return tables | {w.weight: Directions(w.output_axis, basis) for w in writers}


def untied(layout: Layout, planned: Mapping[str, PlannedTensor]) -> tuple[str, str] | None:
    """Return head and embedding where the plan gives a tied head values of its own, or None."""
    head, embed = layout.unembed.weight, layout.embed
    return (head, embed) if layout.tied and head in planned else None


def untied_by_merge(plan: PlanRecord, base: Checkpoint) -> tuple[str, str] | None:
    """Return the first tensor that a merge adds and the base's that was both, or None."""
    for row in plan.tensors:
        if row.name not in base.tensors and row.source in base.tensors:
            return row.name, row.source
    return None


class StoredFiles(Protocol):
    """The tensors of an artifact beside those that the plan means.

    Rows count through all leading axes of a tensor; a vector is one column of them.
    """

    @property
    def planned(self) -> Mapping[str, PlannedTensor]:
        """What the files are to hold, by the names that they use."""
        ...

    @property
    def stored_name(self) -> str:
        """What the values are stored in, in a word or two."""
        ...

    def reach(self, name: str) -> float:
        """Return by how many steps a stored value may lie from the planned one."""
        ...

    @property
    def unbiased(self) -> bool:
        """Whether every value is rounded for itself, so that errors cancel along a direction."""
        ...

    @property
    def tied(self) -> tuple[str, str] | None:
        """The head and the embedding that the plan unties it from; None where it does not."""
        ...

    def strays(self) -> Iterator[str]:
        """Yield what the plan leaves alone and the files do not: other bytes, missing, or new."""
        ...

    def base(self, name: str, start: int, stop: int) -> Rows | None:
        """Return rows as the base has them; None where it has no such tensor."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """Return rows as the files have them."""
        ...

    def steps(self, name: str, start: int, stop: int, exact: Rows) -> Rows:
        """Return the distance between neighbouring values of the storage type, at every value."""
        ...

    @property
    def rounds(self) -> bool:
        """Whether values are stored in less than float32, so that rounding is worth measuring."""
        ...

    def spacing(self, name: str, weight: Tensor) -> Tensor:
        """Return the steps of the storage type at the values of a base's tensor.

        Args:
            name: of a planned tensor, in the base's checkpoint.
            weight: its values there.
        """
        ...

    def directions(self, name: str) -> Directions | None:
        """Return the directions that a tensor writes along, or None where it writes none."""
        ...
