"""Activations of two classes, whose means differ by the direction: steering-llama3 (ACE).

``generate_vectors.py`` saves what it has collected, ``acts_…P=+.pt`` and ``acts_…P=-.pt``, each
[N, 1, d] at the output of a block, and makes the vector and the eraser from both at run time. Here
``file`` and ``minus`` name them. The direction is the difference of the means, its mean the pooled
one, so that ``kind = "affine"`` with α = m is its ``--leace orth`` with multiplier m.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from bake.directions.direction import Direction, Role
from bake.directions.npy import read_array
from bake.directions.reader import Content, Reader, Request
from bake.directions.torch_archive import load, tensor_of
from bake.errors import DirectionError

PREFIX = "acts_"


def _recognises(path: Path) -> bool:
    return path.suffix == ".pt" and path.name.startswith(PREFIX)


def _read(request: Request) -> Content:
    if request.minus is None:
        shape = list(_samples(request.path).shape)
        raise DirectionError(
            f"the file holds the activations of {shape[0]} examples, and no direction",
            why="the direction is the difference of their mean from that of the other class",
            fix='name the other class\'s file: minus = "FILE", in the table of the direction',
        )
    positive, negative = _samples(request.path), _samples(request.minus)
    if positive.shape[1] != negative.shape[1]:
        raise DirectionError(
            f"the widths of the two classes differ: {positive.shape[1]} and {negative.shape[1]}"
        )
    difference = positive.mean(dim=0) - negative.mean(dim=0)
    pooled = torch.cat([positive, negative]).mean(dim=0)
    counts = f"{len(positive)} and {len(negative)}"
    return Content(
        (Direction({Role.VECTOR: difference, Role.MEAN: pooled}),),
        {"examples": counts},
        files=(request.path, request.minus),
    )


def _samples(path: Path) -> Float[Tensor, "n d"]:
    """Return the activations of one class in float64."""
    found = read_array(path.read_bytes()) if path.suffix == ".npy" else load(path)
    tensor = tensor_of(found, path.name)
    if tensor.dim() == 3 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if tensor.dim() != 2 or 0 in tensor.shape or not tensor.is_floating_point():
        raise DirectionError(
            f"{path.name} has shape {list(tensor.shape)} where activations [N, d] or [N, 1, d] are "
            "meant"
        )
    return tensor.to(torch.float64)


READER = Reader(
    "activations [N, 1, d] of two classes (acts_*.pt of steering-llama3, with `minus`)",
    _recognises,
    _read,
    frozenset({"minus"}),
)
