"""JSON files of directions: numbers by layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bake.checkpoints.strictjson import parse_object, read_text
from bake.errors import CheckpointError, DirectionError

MAX_TEXT = 1 << 28
"""Bytes: 128 layers of width 16384, a number in 20 letters, six times over."""


def read_object(path: Path, limit: int = MAX_TEXT) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        DirectionError: it is none, repeats a key, nests too deeply or is longer than the limit.
    """
    try:
        return parse_object(read_text(path, limit, where=path.name), where=path.name)
    except CheckpointError as error:
        raise DirectionError(
            f"{path.name} {error.what}" if error.where else error.what, why=error.why, fix=error.fix
        ) from error


def vectors_by_number(values: object, name: str) -> dict[int, Float[Tensor, " d"]]:
    """Return vectors, [d] in float64, by the whole numbers that name them.

    Raises:
        DirectionError: no object, a key that is no whole number, or a value that is no list of
            numbers.
    """
    if not isinstance(values, Mapping) or not values:
        raise DirectionError(f"{name} is no object of vectors by layer")
    found: dict[int, Tensor] = {}
    for key, row in values.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 5) or int(key) in found:
            raise DirectionError(f"{name} has the key {key!r}: no layer, or there twice")
        # A truth value is a number to isinstance.
        if not isinstance(row, list) or not all(type(one) in (int, float) for one in row):
            raise DirectionError(f"{name} of {key} is no list of numbers")
        try:
            found[int(key)] = torch.tensor(row, dtype=torch.float64)
        except (OverflowError, RuntimeError) as error:
            raise DirectionError(f"{name} of {key} holds a number that is none: {error}") from error
    return found
