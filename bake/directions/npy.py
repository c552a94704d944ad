"""NumPy's .npy: one array, never a pickled object."""

import math
import re
import struct
from pathlib import Path
from typing import IO

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bake.directions.arrays import from_tensor, picked
from bake.directions.reader import Content, Reader, Request
from bake.errors import DirectionError

# The header is a Python literal. It is matched here, not evaluated: what NumPy's own reader raises
# on a damaged header is of a dozen kinds, and it warns where it repairs one of Python 2.
_HEADER = re.compile(
    rb"\{'descr': '([^']+)', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,18}, ?)*(?:[0-9]{1,18})?)\), ?\}\s*"
)
_LENGTHS = {b"\x01\x00": "<H", b"\x02\x00": "<I", b"\x03\x00": "<I"}
_MAX_HEADER = 10_000
_CHUNK = 1 << 16
_MAX_ROW = 1 << 24
_MAX_COLUMN = 1 << 20
_FLOATS = ("f2", "f4", "f8")
INTEGERS = ("i1", "i2", "i4", "i8")


def read_array(data: bytes, types: tuple[str, ...] = _FLOATS) -> Tensor:
    """Return the array of a .npy file, given as its bytes.

    The header is believed only as far as the bytes bear it out.

    Args:
        data: the file.
        types: what its values may be: floats, or ``INTEGERS``.

    Raises:
        DirectionError: a malformed header, another size than it says, pickled objects, or values
            that are no floats.
    """
    described, fortran, shape, start = header_of(data)
    dtype = _dtype(described, types)
    expected = math.prod(shape) * dtype.itemsize
    present = len(data) - start
    if expected != present:
        raise DirectionError(
            f"the header speaks of {expected} bytes of values, shape {list(shape)}, "
            f"and the file holds {present}"
        )
    flat = np.frombuffer(data, dtype=dtype, offset=start).astype(dtype.newbyteorder("="))
    array = flat.reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(array)


def read_part(file: IO[bytes], axis: int, number: int) -> Float[Tensor, " d"]:
    """Return one row (axis 0) or one column (1) of a .npy matrix that is read as a stream.

    Nothing behind it is read, and nothing before it kept. A vector is a matrix of one row.

    Raises:
        DirectionError: as ``read_array``; no matrix, or no such row or column.
    """
    stream = _Stream(file)
    if not 0 <= number < stream.shape[axis]:
        what = ("row", "column")[axis]
        raise DirectionError(
            f"there is no {what} {number}",
            fix=f"the {what}s count from 0 to {stream.shape[axis] - 1}",
        )
    # Fortran's order is that of the transposed matrix.
    rows, width = stream.shape[::-1] if stream.fortran else stream.shape
    if axis == int(stream.fortran):
        stream.skip(number * width)
        return stream.take(width)
    if rows > _MAX_COLUMN:
        raise DirectionError(f"{rows} values are longer than any model is wide")
    found = []
    for _ in range(rows):
        stream.skip(number)
        found.append(stream.take(1))
        stream.skip(width - number - 1)
    return torch.cat(found)


class _Stream:
    """The values of an array that is read from its beginning on."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        head = file.read(_MAX_HEADER + 12)
        described, self.fortran, shape, start = header_of(head)
        self._dtype = _dtype(described)
        if len(shape) not in (1, 2) or 0 in shape:
            raise DirectionError(
                f"the array has shape {list(shape)} where rows [features, d] are meant"
            )
        self.shape = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
        self.fortran = self.fortran and len(shape) == 2
        self._ahead = head[start:]

    def skip(self, count: int) -> None:
        """Read on over some values."""
        left = count * self._dtype.itemsize
        while left > 0 and (read := self._read(min(left, _CHUNK))):
            left -= len(read)
        if left:
            raise DirectionError("the array ends before the values that its header speaks of")

    def take(self, count: int) -> Tensor:
        """Return the next values."""
        size = count * self._dtype.itemsize
        values = self._read(min(size, _MAX_ROW))
        if len(values) != size:
            raise DirectionError("the array ends before the values that its header speaks of")
        flat = np.frombuffer(values, self._dtype)
        return torch.from_numpy(flat.astype(self._dtype.newbyteorder("=")))

    def _read(self, size: int) -> bytes:
        kept, self._ahead = self._ahead[:size], self._ahead[size:]
        return kept + self._file.read(size - len(kept)) if len(kept) < size else kept


def _dtype(described: str, types: tuple[str, ...] = _FLOATS) -> "np.dtype[np.generic]":
    if "O" in described:
        raise DirectionError(
            "the array holds pickled Python objects",
            why="reading them would run code of the artifact, which bake never does",
            fix="save each vector as an array of floats, for example with numpy.savez",
        )
    if described[1:] not in types or described[0] not in "<>=|":
        raise DirectionError(
            f"the array holds {described} values where "
            f"{'floats' if types is _FLOATS else 'whole numbers'} are meant",
            fix="save it as float16, float32 or float64" if types is _FLOATS else None,
        )
    return np.dtype(described)


def header_of(data: bytes) -> tuple[str, bool, tuple[int, ...], int]:
    """Return the type's description, whether the order is Fortran's, the shape, and its end."""
    if data[:6] != b"\x93NUMPY":
        raise DirectionError("the file is no .npy array: it does not begin with \\x93NUMPY")
    version = data[6:8]
    if version not in _LENGTHS:
        raise DirectionError(f"the .npy format version {list(version)} is none that bake reads")
    code = _LENGTHS[version]
    start = 8 + struct.calcsize(code)
    length = struct.unpack_from(code, data, 8)[0] if len(data) >= start else 0
    text = data[start : start + min(length, _MAX_HEADER)]
    match = _HEADER.fullmatch(text) if len(text) == length else None
    if match is None:
        raise DirectionError(f"the .npy header cannot be read: {text[:80]!r}")
    sizes = tuple(int(word) for word in match[3].replace(b" ", b"").split(b",") if word)
    return match[1].decode("latin-1"), match[2] == b"True", sizes, start + length


def _recognises(path: Path) -> bool:
    return path.suffix == ".npy"


def _read(request: Request) -> Content:
    return from_tensor(picked(read_array(request.path.read_bytes()), request), request.shape)


READER = Reader("a NumPy array (.npy)", _recognises, _read, frozenset({"shape", "feature"}))
