"""The ``SteeringVector`` of steering-vectors, as ``torch.save`` keeps the object.

It has ``layer_activations`` {block: [d]} and ``layer_type``, the module whose output each vector is
added to. The package has no file of its own, so people save the object. The class is not imported:
its two fields are read.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bake.directions.arrays import Place, layered
from bake.directions.modules import NORMS_AND_BRANCHES, modules_of
from bake.directions.pt import SUFFIXES
from bake.directions.reader import Content, Reader, Request
from bake.directions.torch_archive import Record, load, names_in, tensor_of
from bake.errors import DirectionError
from bake.sites import Site, SiteKind


class VectorFields(Record):
    """Stands for ``SteeringVector``."""


RECORDS: Mapping[str, type[Record]] = {
    "steering_vectors.steering_vector.SteeringVector": VectorFields
}
BLOCK = "decoder_block"
_TYPES = {BLOCK: SiteKind.RESID_POST} | {
    name: NORMS_AND_BRANCHES[name]
    for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
}


def _recognises(path: Path) -> bool:
    return path.suffix in SUFFIXES and bool(names_in(path) & RECORDS.keys())


def _read(request: Request) -> Content:
    value = load(request.path, RECORDS)
    fields = value.fields if isinstance(value, VectorFields) else {}
    word, vectors = fields.get("layer_type"), fields.get("layer_activations")
    if word not in _TYPES or not isinstance(vectors, dict):
        raise DirectionError(
            "the object is no SteeringVector of layer_activations and a known layer_type",
            why=f"its layer_type is {word!r}; known are {', '.join(_TYPES)}",
        )
    kind = _TYPES[str(word)]
    rows: dict[Place, Tensor] = {}
    for layer, vector in vectors.items():
        if type(layer) is not int or not 0 <= layer < 100_000:
            raise DirectionError(f"the layer {layer!r} is no number of a block")
        rows[layer, str(Site(kind, layer))] = tensor_of(vector, f"the vector of layer {layer}")
    paths = {f"layers.{n}.{word}": place for place in rows if (n := place[0]) is not None}
    return layered(rows).beside(modules_of(paths) if word != BLOCK else {})


READER = Reader(
    "a SteeringVector of steering-vectors, saved by torch.save (.pt)",
    _recognises,
    _read,
    kinds=("offset",),
)
