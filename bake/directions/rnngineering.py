"""EleutherAI/rnngineering: ``{behavior}_{layer}.pt``, the activations of both classes.

The file is ``asdict(ActivationAdder)``: ``positives`` and ``negatives`` (lists of [d]), ``lda`` and
``mamba_style``. The vector is the difference of their means, added to the output of the block (of a
Mamba block to its mixer's output, which is added to the same stream).
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from bake.directions.arrays import Place, layered
from bake.directions.pt import SUFFIXES, stack_of
from bake.directions.reader import Content, Reader, Request
from bake.directions.torch_archive import keys_in, load
from bake.errors import DirectionError
from bake.positions import Word
from bake.sites import Site, SiteKind

_NAME = re.compile(r"(.+)_(\d{1,5})")
KEYS = {"positives", "negatives"}


def _recognises(path: Path) -> bool:
    return path.suffix in SUFFIXES and KEYS <= keys_in(path)


def _read(request: Request) -> Content:
    value = load(request.path)
    if not isinstance(value, dict) or not value.keys() >= KEYS:
        raise DirectionError(f"the file is no dictionary of {' and '.join(sorted(KEYS))}")
    if value.get("lda"):
        raise DirectionError(
            "the file asks for lda: the system multiplies the difference by an inverse covariance",
            why="which of two covariances it inverts is not in the file",
            fix="save the vector that the system adds, by itself",
        )
    means: list[Tensor] = [
        stack_of(value[key]).to(torch.float64).mean(dim=0) for key in ("positives", "negatives")
    ]
    if means[0].shape != means[1].shape or means[0].dim() != 1:
        raise DirectionError("the two classes hold activations of different widths")
    match = _NAME.fullmatch(request.path.stem)
    layer = None if match is None else int(match[2])
    site = None if layer is None else str(Site(SiteKind.RESID_POST, layer))
    place: Place = (layer, site)
    content = layered({place: means[0] - means[1]})
    return Content(content.items, concept=None if match is None else match[1])


READER = Reader(
    "activations of rnngineering ({behavior}_{layer}.pt)",
    _recognises,
    _read,
    kinds=("offset",),
    positions=Word.LAST,
)
