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
    """An open file: its names and metadata, and a way to read one tensor."""

    names: tuple[str, ...]
    metadata: Mapping[str, str]
    get: Callable[[str], Tensor]


@contextmanager
def opened(path: Path) -> Iterator[OpenFile]:
    """Open a safetensors file; its header is checked by the library against the file's size.

    Raises:
        DirectionError: the header is malformed or does not fit the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield OpenFile(tuple(file.keys()), file.metadata() or {}, file.get_tensor)
    except SafetensorError as error:
        raise DirectionError(f"the safetensors file cannot be read: {error}") from error


def rows_of(path: Path, key: str, row: int) -> Tensor:
    """Return one row [d] of a matrix [n, d], which alone is read.

    Raises:
        DirectionError: no such matrix or row.
    """
    from safetensors import safe_open

    with opened(path) as file:
        if key not in file.names:
            raise DirectionError(
                f"the file holds no {key!r}", fix=f"it holds {listing(file.names)}"
            )
    with safe_open(path, framework="pt", device="cpu") as whole:
        matrix = whole.get_slice(key)
        shape = matrix.get_shape()
        if len(shape) != 2 or not 0 <= row < shape[0]:
            raise DirectionError(f"{key!r} has shape {shape}, and no row {row}")
        found: Tensor = matrix[row : row + 1][0]
        return found


def _recognises(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _read(request: Request) -> Content:
    with opened(request.path) as file:
        return from_named(file.names, file.get, request).beside(file.metadata)


READER = Reader(
    "tensors by name (.safetensors)", _recognises, _read, frozenset({"key", "shape", "feature"})
)
