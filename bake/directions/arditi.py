"""The folder that andyrdt/refusal_direction writes (arXiv 2406.11717).

``direction.pt`` is the raw difference of means, float64 [d], often a view of a larger tensor saved
from a GPU; ``direction_metadata.json`` is ``{"pos": …, "layer": …}``, the block whose *input* was
read. The system ablates the direction at every block, so it belongs to no layer, and the place it
was read from is kept as its site. ``mean_diffs.pt``, [positions, layers, d], holds the candidates;
it is read with the position (-1 is the last) as ``key``.
"""

import json
from pathlib import Path

from torch import Tensor

from bake.directions.arrays import stacked
from bake.directions.direction import Direction, Role
from bake.directions.reader import Content, Reader, Request
from bake.directions.torch_archive import load, tensor_of
from bake.errors import DirectionError
from bake.sites import Site, SiteKind

DIRECTION = "direction.pt"
METADATA = "direction_metadata.json"
MEAN_DIFFS = "mean_diffs.pt"
_MAX_METADATA = 1 << 16


def _recognises(path: Path) -> bool:
    if path.is_dir():
        return (path / DIRECTION).is_file() and (path / METADATA).is_file()
    return path.name == DIRECTION and (path.parent / METADATA).is_file()


def _read(request: Request) -> Content:
    folder = request.path if request.path.is_dir() else request.path.parent
    if request.path.name == MEAN_DIFFS and request.path.is_file():
        return _mean_diffs(request)
    if request.key is not None:
        raise DirectionError(f"`key` is a position of {MEAN_DIFFS}; {DIRECTION} has none")
    for name in (DIRECTION, METADATA):
        if not (folder / name).is_file():
            raise DirectionError(f"the folder holds no {name}")
    tensor = tensor_of(load(folder / DIRECTION), DIRECTION)
    if tensor.dim() != 1:
        raise DirectionError(f"{DIRECTION} has shape {list(tensor.shape)} where [d] is meant")
    metadata = _metadata(folder / METADATA)
    site = Site(SiteKind.RESID_PRE, metadata["layer"])
    return Content(
        (Direction({Role.VECTOR: tensor}, None, str(site)),),
        {name: str(value) for name, value in metadata.items()},
        files=(folder / DIRECTION, folder / METADATA),
    )


def _metadata(path: Path) -> dict[str, int]:
    if path.stat().st_size > _MAX_METADATA:
        raise DirectionError(f"{METADATA} has {path.stat().st_size} bytes")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DirectionError(f"{METADATA} is no JSON: {error}") from error
    known = found if isinstance(found, dict) else {}
    # A truth value is a whole number to isinstance.
    values = {name: known[name] for name in ("pos", "layer") if type(known.get(name)) is int}
    if len(values) != 2 or values["layer"] < 0:
        raise DirectionError(
            f'{METADATA} is not {{"pos": …, "layer": …}} with two whole numbers, the layer from 0'
        )
    return values


def _mean_diffs(request: Request) -> Content:
    """Return the candidates of one position: a vector for the input of each block."""
    tensor: Tensor = tensor_of(load(request.path), MEAN_DIFFS)
    if tensor.dim() != 3:
        raise DirectionError(
            f"{MEAN_DIFFS} has shape {list(tensor.shape)} where [positions, layers, d] is meant"
        )
    positions = [str(position) for position in range(-tensor.shape[0], 0)]
    if request.key not in positions:
        raise DirectionError(
            f"{MEAN_DIFFS} holds {len(positions)} positions, and `key` names none of them",
            fix=f"set key to one of {', '.join(positions)}; -1 is the last token",
        )
    return stacked(tensor[int(request.key)], SiteKind.RESID_PRE).beside({"pos": request.key})


READER = Reader(
    f"the folder of refusal_direction ({DIRECTION} and {METADATA})",
    _recognises,
    _read,
    frozenset({"key"}),
    kinds=("ablate",),
    files=(DIRECTION, METADATA),
)
