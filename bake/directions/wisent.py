"""wisent: steering vectors as JSON, ``{"steering_vectors": {"2": [d]}, "layers": ["2"]}``.

wisent counts layers from 1: ``apply_steering`` maps the name of layer l to block l − 1 and adds
behind it (wisent/core/primitives/models/core/wisent_model.py).
"""

from pathlib import Path

from torch import Tensor

from bake.directions.arrays import Place, layered
from bake.directions.json_file import read_object, vectors_by_number
from bake.directions.reader import Content, Reader, Request
from bake.errors import DirectionError
from bake.sites import Site, SiteKind

VECTORS = "steering_vectors"


def _recognises(path: Path) -> bool:
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        return f'"{VECTORS}"'.encode() in file.read(1 << 16)


def _read(request: Request) -> Content:
    rows: dict[Place, Tensor] = {}
    for number, row in vectors_by_number(read_object(request.path).get(VECTORS), VECTORS).items():
        if number == 0:
            raise DirectionError("the file names a layer 0, and wisent counts layers from 1")
        rows[number - 1, str(Site(SiteKind.RESID_POST, number - 1))] = row
    return layered(rows).beside({"counted": "layers from 1 in the file"})


READER = Reader("steering vectors of wisent (.json)", _recognises, _read, kinds=("offset",))
