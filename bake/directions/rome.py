"""ROME (arXiv 2202.05262): the two vectors of a rank-one update of a weight, in an .npz.

The cache of ``rome_main.py`` holds ``left_vector`` and ``right_vector``, whose outer product is
added to the weight, transposed where the shapes ask for it (``upd_matrix_match_shape``). So either
of the two may be the one that is as wide as the output; the model decides.
"""

from pathlib import Path

from torch import Tensor

from bake.directions.direction import Direction, Role
from bake.directions.npz import array_of, members_of, names_of, opened_archive
from bake.directions.reader import Content, Reader, Request
from bake.errors import DirectionError

NAMES = ("left_vector", "right_vector")
EITHER_WAY = "bake.transposed"
"""In the metadata: whether the factors change places where only so they fit the weight."""


def _recognises(path: Path) -> bool:
    return names_of(path) == {*NAMES}


def _read(request: Request) -> Content:
    with opened_archive(request.path) as archive:
        members = members_of(archive)
        if lacking := [name for name in NAMES if name not in members]:
            raise DirectionError(
                f"the archive holds no {' and no '.join(lacking)}", fix=f"it needs {NAMES}"
            )
        left, right = (_vector(array_of(archive, members[name]), name) for name in NAMES)
    tensors = {Role.LEFT: left.unsqueeze(1), Role.RIGHT: right.unsqueeze(0)}
    return Content((Direction(tensors),), {EITHER_WAY: "where only so it fits"})


def _vector(array: Tensor, name: str) -> Tensor:
    if array.numel() == 0 or array.numel() != max(array.shape, default=0):
        raise DirectionError(f"{name} has shape {list(array.shape)} where a vector is meant")
    return array.reshape(-1)


READER = Reader(
    "left_vector and right_vector of ROME (.npz)", _recognises, _read, kinds=("update",)
)
