"""IBM's activation steering (arXiv 2409.05907): a JSON file ``.svec`` of directions by layer.

``SteeringVector.save`` writes ``model_type``, ``directions`` {layer: [d]} and
``explained_variances``. ``LeashLayer.forward`` adds the vector of layer l to the *input* of block
l, although the fit read that block's output: the site is where it acts.
"""

from pathlib import Path

from torch import Tensor

from bake.directions.arrays import Place, layered
from bake.directions.json_file import read_object, vectors_by_number
from bake.directions.reader import Content, Reader, Request
from bake.sites import Site, SiteKind


def _recognises(path: Path) -> bool:
    return path.suffix == ".svec"


def _read(request: Request) -> Content:
    found = read_object(request.path)
    rows: dict[Place, Tensor] = {
        (n, str(Site(SiteKind.RESID_PRE, n))): row
        for n, row in vectors_by_number(found.get("directions"), "directions").items()
    }
    metadata = {"fitted_at": "the output of the block whose input it is added to"}
    return layered(rows).beside(metadata | {"model_type": str(found.get("model_type"))[:100]})


READER = Reader(
    "a steering vector of IBM's activation-steering (.svec)",
    _recognises,
    _read,
    kinds=("offset",),
    says="activation-steering can make the addition depend on a condition (CAST) and scale the "
    "result back to its norm; the weights add it always, and as it is",
)
