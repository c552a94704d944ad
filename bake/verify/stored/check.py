"""The second question of a verification: do the files hold the plan?"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bake.verify import controls
from bake.verify.controls import Control, Spoiling
from bake.verify.stored.deviation import Deviation, deviation
from bake.verify.stored.files import Rows, StoredFiles

CONTROLS = 2
"""Spoiled tensors of each kind that have to be told from the plan."""


@dataclass(frozen=True, slots=True, eq=False)
class FilesChecked:
    """What came of comparing every tensor of an artifact.

    Attributes:
        deviations: of every planned tensor.
        strays: what the plan leaves alone and the files do not.
        controls: spoiled tensors with how far each lies from the plan.
    """

    deviations: tuple[Deviation, ...]
    strays: tuple[str, ...]
    controls: tuple[tuple[Control, Deviation], ...]

    @property
    def values(self) -> int:
        """How many values the plan changes."""
        return sum(one.values for one in self.deviations)

    def worst(self, by: Callable[[Deviation], float]) -> Deviation | None:
        """Return the tensor with the largest number of a kind."""
        return max(self.deviations, key=by, default=None)


def check_files(files: StoredFiles, digest: str, *, each: int = CONTROLS) -> FilesChecked:
    """Compare every planned tensor with what the files hold, and spoiled ones with the plan.

    Args:
        files: of the artifact.
        digest: of the plan: it decides which tensors are spoiled.
        each: how many are spoiled of each kind.
    """
    strays = tuple(files.strays())
    whole = [name for name in files.planned if name not in strays]
    found = []
    for name in whole:
        found.append(deviation(files, name))
    planned = {name: files.planned[name] for name in whole}
    spoiling = Spoiling(planned, files.base, files.rows, files.tied)
    groups = controls.groups_of(
        planned, lambda name: files.base(name, 0, 1) is not None, files.tied, digest
    )
    tried = controls.sample(groups, each, lambda control: _spoiled(files, spoiling, control))
    return FilesChecked(tuple(found), strays, tuple(tried))


def _spoiled(files: StoredFiles, spoiling: Spoiling, control: Control) -> Deviation | None:
    """Return how far a spoiled tensor lies from the plan; None where nothing of it is spoiled."""
    differs = False

    def spoil(start: int, stop: int, have: Rows) -> Tensor:
        nonlocal differs
        broken = spoiling.rows(control, start, stop)
        differs = differs or not torch.equal(broken, have)
        return broken

    found = deviation(files, control.tensor, spoil)
    return found if differs else None
