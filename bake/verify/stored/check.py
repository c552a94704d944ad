"""The second question of a verification: do the files hold the plan?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bake.checkpoints.planned import PlannedTensor
from bake.verify import controls
from bake.verify.controls import Control, Spoiling
from bake.verify.stored.deviation import Deviation, deviation
from bake.verify.stored.files import Rows, StoredFiles

CONTROLS = 2
"""Spoiled tensors of each kind that have to be told from the plan."""


@dataclass(frozen=True, slots=True, eq=False)
class SpoiledTensor:
    """A stored tensor that was spoiled on purpose."""

    control: Control
    deviation: Deviation
    """How far it lies from the plan."""
    faint: bool
    """Whether it was not told, and need not be: the mistake is as small as rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class FilesChecked:
    """What came of comparing every tensor of an artifact.

    Attributes:
        deviations: of every planned tensor.
        strays: what the plan leaves alone and the files do not.
        controls: spoiled tensors.
    """

    deviations: tuple[Deviation, ...]
    strays: tuple[str, ...]
    controls: tuple[SpoiledTensor, ...]

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
    found = tuple(deviation(files, name) for name in whole)
    planned = {name: files.planned[name] for name in whole}
    groups = controls.groups_of(
        planned, lambda name: files.base(name, 0, 1) is not None, files.tied, digest
    )
    tried = controls.sample(groups, each, lambda control: _spoiled(files, planned, control))
    return FilesChecked(found, strays, tuple(tried))


def _spoiled(
    files: StoredFiles, planned: Mapping[str, PlannedTensor], control: Control
) -> SpoiledTensor | None:
    """Return how far a spoiled tensor lies from the plan; None where nothing of it is spoiled."""
    spoiling = Spoiling(planned, files.base, files.rows, files.tied)
    differs = False

    def spoil(start: int, stop: int, have: Rows) -> Tensor:
        nonlocal differs
        broken = spoiling.rows(control, start, stop)
        differs = differs or not torch.equal(broken, have)
        return broken

    found = deviation(files, control.tensor, spoil)
    if not differs:
        return None
    return SpoiledTensor(control, found, found.held and not _must_be_told(files, planned, control))


def _must_be_told(
    files: StoredFiles, planned: Mapping[str, PlannedTensor], control: Control
) -> bool:
    """Whether a mistake is so large that no sound rounding may hide it.

    The same mistake made of the plan itself, of which nothing is rounded, says how large it is.
    What is stored lies within the limits of the plan, so a mistake of twice the limits lies beyond
    them, by the triangle inequality, and is told whatever was rounded.
    """
    made = Spoiling(planned, files.base, _planned_rows(planned), files.tied)
    mistake = deviation(files, control.tensor, lambda a, b, _: made.rows(control, a, b), times=2)
    return not mistake.within(2)


def _planned_rows(planned: Mapping[str, PlannedTensor]) -> Callable[[str, int, int], Rows]:
    """Return what reads rows of the plan, a tensor at a time in memory."""

    @lru_cache(maxsize=1)
    def whole(name: str) -> Tensor:
        return torch.cat([tile for _, _, tile in planned[name].spans()])

    return lambda name, start, stop: whole(name)[start:stop]
