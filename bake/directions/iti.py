"""Inference-time intervention (ITI, arXiv 2306.03341): ``…_head_wise.npy`` beside ``…_labels.npy``.

honest_llama saves no direction. It saves what every head put out, [N, layers, heads · d] at the
input of ``o_proj``, with N labels, and makes σ θ of both as it runs (``get_com_directions``,
``validate_2fold.py``): θ is the unit difference of the means of label 1 and label 0, σ the
standard deviation of the activations along it, with N − 1 below. ``coefficient`` is its α. Which
heads it takes is decided by probes on a random split, so that a recipe names them in ``at``.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bake.directions.arrays import Place, layered
from bake.directions.npy import INTEGERS, read_array
from bake.directions.reader import Content, Reader, Request
from bake.errors import DirectionError
from bake.positions import Word
from bake.sites import Site, SiteKind

SUFFIX, LABELS = "head_wise.npy", "labels.npy"


def _labels(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(SUFFIX) + LABELS)


def _recognises(path: Path) -> bool:
    return path.is_file() and path.name.endswith(SUFFIX) and _labels(path).is_file()


def _read(request: Request) -> Content:
    labels = _labels(request.path)
    if not labels.is_file():
        raise DirectionError(f"{labels.name} is not beside it", fix="name a pair of ITI's files")
    activations = read_array(request.path.read_bytes())
    marks = read_array(labels.read_bytes(), INTEGERS)
    if activations.dim() != 3 or marks.shape != activations.shape[:1] or 0 in activations.shape:
        raise DirectionError(
            f"activations of shape {list(activations.shape)} and labels of {list(marks.shape)} "
            "are not [N, layers, heads · d] and [N]"
        )
    width = activations.shape[2]
    if request.heads is None or request.heads < 1 or width % request.heads:
        raise DirectionError(
            f"the activations are {width} wide, and of how many heads is not known"
            if request.heads is None
            else f"heads = {request.heads} is no number of heads in a width of {width}",
            fix="set heads to the model's num_attention_heads",
        )
    if {*marks.tolist()} != {0, 1}:
        raise DirectionError("the labels are not 0 and 1, with activations of each")
    rows: dict[Place, Tensor] = {}
    for layer in range(activations.shape[1]):
        own = activations[:, layer].to(torch.float64).reshape(len(marks), request.heads, -1)
        for head, values in enumerate(own.unbind(1)):
            site = Site(SiteKind.Z, layer, head)
            rows[layer, str(site)] = _direction(values, marks == 1)
    said = {"heads": str(request.heads), "examples": str(len(marks))}
    return replace(layered(rows).beside(said), files=(request.path, labels))


def _direction(values: Tensor, true: Tensor) -> Tensor:
    """Return σ θ of one head from its activations [N, d]; zero where the means are equal."""
    difference = values[true].mean(dim=0) - values[~true].mean(dim=0)
    norm = torch.linalg.vector_norm(difference)
    if not bool(norm > 0) or len(values) < 2:
        return torch.zeros_like(difference)
    unit = difference / norm
    found: Tensor = unit * (values @ unit).std()
    return found


READER = Reader(
    f"activations of ITI (…_{SUFFIX} beside …_{LABELS}, with `heads`)",
    _recognises,
    _read,
    frozenset({"heads"}),
    kinds=("offset",),
    positions=Word.LAST,
    beside=lambda name: (_labels(Path(name)).name,) if name.endswith(SUFFIX) else (),
)
