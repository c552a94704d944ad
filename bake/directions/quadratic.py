"""The ``QuadraticEditor`` of concept-erasure: optimal transport between labelled classes.

It maps x of class s to μ_t + T (x − μ_s), T = ``ot_maps[s, t]`` and μ = ``class_means``
(concept_erasure/quadratic.py), and needs the label of every token. With one label for all,
``source``, and one ``target``, the map is affine: steering-llama3's quad uses it so.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bake.directions.direction import Direction, Role
from bake.directions.leace import EDITOR
from bake.directions.pt import SUFFIXES
from bake.directions.reader import Content, Reader, Request
from bake.directions.torch_archive import Record, load, names_in, tensor_of
from bake.errors import DirectionError


class EditorFields(Record):
    """Stands for ``QuadraticEditor``."""


RECORDS: Mapping[str, type[Record]] = {EDITOR: EditorFields}


def _recognises(path: Path) -> bool:
    return path.suffix in SUFFIXES and EDITOR in names_in(path)


def _read(request: Request) -> Content:
    value = load(request.path, RECORDS)
    if not isinstance(value, EditorFields):
        raise DirectionError(f"the file holds a {type(value).__name__} and no QuadraticEditor")
    means, maps = (tensor_of(value.fields.get(k), k) for k in ("class_means", "ot_maps"))
    if means.dim() != 2 or maps.shape != (*[len(means)] * 2, *[means.shape[1]] * 2):
        raise DirectionError(
            f"class_means {list(means.shape)} and ot_maps {list(maps.shape)} do not fit each other"
        )
    source = _label("source", request.source, len(means))
    target = _label("target", request.target, len(means))
    matrix, start = maps[source, target].to(torch.float64), means[source].to(torch.float64)
    shift: Tensor = means[target].to(torch.float64) - matrix @ start
    said = {"source": str(source), "target": str(target)}
    return Content((Direction({Role.MATRIX: matrix, Role.OFFSET: shift}),), said)


def _label(name: str, given: int | None, classes: int) -> int:
    if given is not None and 0 <= given < classes:
        return given
    raise DirectionError(
        f"{name} names no label" if given is None else f"{name} = {given} is no label",
        why="the map depends on the label of every token; with one label for all of them it is "
        f"affine, and the file has the labels 0 to {classes - 1}",
        fix="set source and target, for example source = 0 and target = 1",
    )


READER = Reader(
    "a QuadraticEditor of concept-erasure (.pt, with `source` and `target`)",
    _recognises,
    _read,
    frozenset({"source", "target"}),
    kinds=("linear",),
    says="the system maps each token by its own label; the weights take every token for the source",
)
