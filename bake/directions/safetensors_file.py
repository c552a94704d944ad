"""A .safetensors file: tensors by name, and text metadata."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bake.directions.arrays import from_named, listing
from bake.directions.reader import Content, Reader, Request
from bake.errors import DirectionError


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open file: its names and metadata, and ways to read one tensor, or a part of one."""

    names: tuple[str, ...]
    metadata: Mapping[str, str]
    get: Callable[[str], Tensor]
    part: Callable[[str, int, int], Tensor]
    """By name, axis and number: a row [d] (axis 0) or a column (1) of a matrix, which alone is
    read. A vector is a matrix of one row. Raises DirectionError: there is no such matrix or row."""


@contextmanager
def opened(path: Path) -> Iterator[OpenFile]:
    """Open a safetensors file; its header is checked by the library against the file's size.

    Raises:
        DirectionError: the header is malformed or does not fit the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = tuple(file.keys())

            def part(name: str, axis: int, n: int) -> Tensor:
                if name not in names:
                    raise DirectionError(
                        f"the file holds no {name!r}", fix=f"it holds {listing(names)}"
                    )
                matrix = file.get_slice(name)
                shape = matrix.get_shape()
                size = [1, *shape] if len(shape) == 1 else shape
                if len(size) != 2 or not 0 <= n < size[axis]:
                    what = ("row", "column")[axis]
                    raise DirectionError(
                        f"{name!r} has shape {shape}, and no {what} {n}",
                        fix=f"the {what}s count from 0 to {size[axis] - 1}"
                        if len(size) == 2
                        else None,
                    )
                here = slice(n, n + 1)
                if len(shape) == 1:
                    found: Tensor = matrix[here] if axis else matrix[:]
                    return found
                found = matrix[here] if axis == 0 else matrix[:, here]
                return found.reshape(-1)

            yield OpenFile(names, file.metadata() or {}, file.get_tensor, part)
    except SafetensorError as error:
        raise DirectionError(f"the safetensors file cannot be read: {error}") from error


def _recognises(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _read(request: Request) -> Content:
    with opened(request.path) as file:
        return from_named(file.names, file.get, request).beside(file.metadata)


READER = Reader(
    "tensors by name (.safetensors)", _recognises, _read, frozenset({"key", "shape", "feature"})
)
