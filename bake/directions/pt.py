"""A .pt file of ``torch.save``: a tensor, a list of tensors, or a dictionary of them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bake.directions.arrays import from_named, from_tensor, listing, picked
from bake.directions.reader import Content, Reader, Request
from bake.directions.torch_archive import load, tensor_of
from bake.errors import DirectionError

SUFFIXES = (".pt", ".pth")


def _recognises(path: Path) -> bool:
    return path.suffix in SUFFIXES


def _read(request: Request) -> Content:
    value = load(request.path)
    if isinstance(value, Tensor | list | tuple):
        if request.key is not None:
            raise DirectionError(f"`key` names {request.key!r}, but the file holds no names")
        return from_tensor(picked(stack_of(value), request), request.shape)
    if isinstance(value, dict):
        return _from_dictionary(value, request)
    raise DirectionError(
        f"the file holds a {type(value).__name__} where tensors are meant",
        fix="save a tensor, or a dictionary of tensors",
    )


def stack_of(values: object) -> Tensor:
    """Return a list of vectors as rows; what the rows are is for ``shape`` to say.

    Raises:
        DirectionError: no list, or no vectors of one width.
    """
    if isinstance(values, Tensor):
        return tensor_of(values, "the value")
    if not isinstance(values, list | tuple):
        raise DirectionError(f"the file holds a {type(values).__name__} where vectors are meant")
    rows = [tensor_of(value, f"entry {index}") for index, value in enumerate(values)]
    if not rows or any(row.dim() != 1 or row.shape != rows[0].shape for row in rows):
        shapes = sorted({str(list(row.shape)) for row in rows})
        raise DirectionError(
            f"the file holds a list of tensors of shapes {', '.join(shapes) or 'none'}",
            fix="save vectors of one width, or a dictionary with a name for each tensor",
        )
    return torch.stack(rows)


def _from_dictionary(values: Mapping[object, object], request: Request) -> Content:
    """Return the tensors of a dictionary; plain values beside them go into the metadata."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, str] = {}
    other: list[str] = []
    for key, value in values.items():
        if not isinstance(key, str | int) or str(key) in tensors or str(key) in plain:
            raise DirectionError(f"the key {key!r} of the dictionary is no name, or is there twice")
        if isinstance(value, Tensor):
            tensors[str(key)] = tensor_of(value, repr(key))
        elif isinstance(value, str | int | float | bool) or value is None:
            plain[str(key)] = str(value)[:1000]
        else:
            other.append(str(key))
    if other and request.key is None:
        raise DirectionError(
            f"the dictionary holds values that are neither tensors nor plain: {listing(other)}",
            fix="name the tensor that is meant with `key`, or use the reader of its system",
        )
    return from_named(tuple(tensors), tensors.__getitem__, request).beside(plain)


READER = Reader(
    "a tensor, or tensors by name, as torch.save writes them (.pt, .pth)",
    _recognises,
    _read,
    frozenset({"key", "shape", "feature"}),
)
