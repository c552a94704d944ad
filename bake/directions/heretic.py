"""heretic: ``refusal_directions``, unit rows [layers + 1, d], read from ``hidden_states``.

Row 0 is the embedding's, row l + 1 that of block l. ``Model.abliterate`` takes each block's row, or
one direction for all, blended between two blocks at a position such as 12.4 and made unit again;
that position is ``index``, counted in blocks.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from bake.directions.arrays import hidden_states
from bake.directions.direction import ROWS, Direction, Role
from bake.directions.npy import read_array
from bake.directions.reader import Content, Reader, Request
from bake.directions.safetensors_file import opened
from bake.directions.torch_archive import load, tensor_of
from bake.errors import DirectionError

STEM = "refusal_directions"


def _recognises(path: Path) -> bool:
    return path.stem == STEM and path.suffix in (".pt", ".npy", ".safetensors")


def _read(request: Request) -> Content:
    rows = _rows(request.path)
    if rows.dim() != 2 or rows.shape[0] < 2:
        raise DirectionError(f"the shape is {list(rows.shape)} where [layers + 1, d] is meant")
    if request.index is None:
        return hidden_states(rows)
    blocks = rows.shape[0] - 1
    if not 0 <= request.index <= blocks - 1:
        raise DirectionError(
            f"index = {request.index} lies outside the {blocks} blocks of the file",
            fix=f"blocks count from 0 to {blocks - 1}",
        )
    share, below = math.modf(request.index + 1)
    lower, upper = (rows[min(int(below) + n, blocks)].to(torch.float64) for n in (0, 1))
    blend = torch.nn.functional.normalize(lower.lerp(upper, share), dim=0)
    said = {"index": f"{request.index:g}", ROWS: str(blocks)}
    return Content((Direction({Role.VECTOR: blend}),), said)


def _rows(path: Path) -> Tensor:
    if path.suffix == ".npy":
        return read_array(path.read_bytes())
    if path.suffix != ".safetensors":
        return tensor_of(load(path), path.name)
    with opened(path) as file:
        if len(file.names) != 1:
            raise DirectionError(f"the file holds {len(file.names)} tensors where one is meant")
        return file.get(file.names[0])


READER = Reader(
    f"the {STEM} of heretic (.pt, .npy or .safetensors of this name)",
    _recognises,
    _read,
    frozenset({"index"}),
    kinds=("ablate",),
)
