"""The control vectors that repeng and llama.cpp write: a GGUF of architecture ``controlvector``.

A tensor ``direction.<l>``, float [d], is added to the *output* of block l, counted from 0 (repeng
control.py: ControlModule.forward; llama.cpp skips layer 0). dialz writes the same under the
architecture ``steeringvector``.
"""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from bake.directions.arrays import Place, layered
from bake.directions.reader import Content, Reader, Request
from bake.errors import CheckpointError, DirectionError, UsageError
from bake.sites import SiteKind

if TYPE_CHECKING:
    from bake.checkpoints.gguf.file import Gguf
    from bake.checkpoints.gguf.header import GgufTensor

_TENSOR = re.compile(r"direction\.(\d{1,5})")


def _recognises(path: Path) -> bool:
    return path.suffix == ".gguf"


def _read(request: Request) -> Content:
    from bake.checkpoints.gguf.file import open_gguf  # here, because it imports gguf-py

    try:
        return _content(open_gguf(request.path))
    except (CheckpointError, UsageError) as error:
        raise DirectionError(error.what, where=error.where, why=error.why, fix=error.fix) from error


def _content(model: "Gguf") -> Content:
    from bake.checkpoints.gguf.file import CONTROL_VECTORS
    from bake.checkpoints.gguf.header import text_of

    if not model.is_vector:
        raise DirectionError(
            f"the GGUF file is of architecture {model.arch!r}, not a control vector",
            why=f"control vectors are of architecture {' or '.join(CONTROL_VECTORS)}",
        )
    vectors: dict[int, Tensor] = {}
    for info in model.tensors.values():
        layer = _layer(info.name)
        if layer in vectors:
            raise DirectionError(f"the GGUF file holds direction.{layer} twice")
        vectors[layer] = _values(model, info)
    rows: dict[Place, Tensor] = {
        (n, f"{SiteKind.RESID_POST}.{n}"): row for n, row in sorted(vectors.items())
    }
    metadata = model.parts[0].header.metadata
    return layered(rows).beside({key: text_of(value, key) for key, value in metadata.items()})


def _layer(name: str) -> int:
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise DirectionError(
            f"the GGUF file holds {name!r}, which is no tensor of a control vector",
            why="a control vector holds direction.<layer>, one for each block it edits",
        )
    return int(match[1])


def _values(model: "Gguf", info: "GgufTensor") -> Float[Tensor, " d"]:
    """Return the values of a tensor, [d], as they are stored."""
    from bake.checkpoints.gguf.codec import FLOATS

    if info.kind.name not in FLOATS:
        raise DirectionError(
            f"{info.name!r} is stored as {info.kind.name}; a control vector holds plain floats"
        )
    if math.prod(info.shape) != info.shape[-1]:
        raise DirectionError(f"{info.name!r} has shape {list(info.shape)} where [d] is meant")
    return model.read_rows(info.name, 0, 1)[0].view(FLOATS[info.kind.name])


READER = Reader(
    "a control vector of repeng, dialz or llama.cpp (.gguf)", _recognises, _read, kinds=("offset",)
)
