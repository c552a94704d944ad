"""The control vectors that repeng and llama.cpp write: a GGUF of architecture ``controlvector``.

A tensor ``direction.<l>``, float [d], is added to the *output* of block l, counted from 0 (repeng
control.py: ControlModule.forward; llama.cpp skips layer 0). dialz writes the same under the
architecture ``steeringvector``. The file is walked here rather than with gguf's reader, which
slices past the end of a truncated file in silence and makes an object of every array element.
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from jaxtyping import Float
from torch import Tensor

from bake.directions.arrays import layered
from bake.directions.reader import Content, Reader, Request
from bake.errors import DirectionError
from bake.sites import SiteKind

ARCHITECTURES = ("controlvector", "steeringvector")

_TENSOR = re.compile(r"direction\.(\d{1,5})")
# The value types and tensor types of the GGUF specification (ggml docs/gguf.md), by number.
_SCALARS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_FLOATS = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
_MAX_TENSORS, _MAX_KEYS, _MAX_ARRAY, _MAX_TEXT = 4096, 1024, 4096, 1 << 16


@dataclass(slots=True)
class _Walk:
    """A file that is read forwards, never past its end."""

    file: BinaryIO
    size: int

    def take(self, count: int, what: str) -> bytes:
        left = self.size - self.file.tell()
        if count > left:
            raise DirectionError(
                f"the GGUF file ends inside {what}: {count} bytes are meant and {left} are left"
            )
        return self.file.read(count)

    def number(self, code: str, what: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(code, self.take(struct.calcsize(code), what))[0]
        return value

    def count(self, code: str, most: int, what: str) -> int:
        value = int(self.number(code, what))
        if value > most:
            raise DirectionError(
                f"the GGUF file claims {value} for {what}; bake reads up to {most}"
            )
        return value

    def text(self, what: str) -> str:
        raw = self.take(self.count("<Q", _MAX_TEXT, f"the length of {what}"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DirectionError(f"{what} in the GGUF file is no UTF-8: {raw[:40]!r}") from error


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of the header."""

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int


def _recognises(path: Path) -> bool:
    return path.suffix == ".gguf"


def _read(request: Request) -> Content:
    with request.path.open("rb") as file:
        walk = _Walk(file, request.path.stat().st_size)
        tensors, keys = _header(walk)
        metadata = _metadata(walk, keys)
        entries = [_entry(walk) for _ in range(tensors)]
        if not entries:
            raise DirectionError("the GGUF file holds no tensor")
        start = _aligned(file.tell(), metadata.get("general.alignment", "32"))
        vectors: dict[int, Tensor] = {}
        for entry in entries:
            layer = _layer(entry.name)
            if layer in vectors:
                raise DirectionError(f"the GGUF file holds direction.{layer} twice")
            vectors[layer] = _values(walk, entry, start)
    items, zero = layered(
        {(layer, f"{SiteKind.RESID_POST}.{layer}"): row for layer, row in sorted(vectors.items())}
    )
    return Content(items, metadata | zero)


def _header(walk: _Walk) -> tuple[int, int]:
    """Return the numbers of tensors and of metadata keys."""
    if walk.take(4, "its first word") != b"GGUF":
        raise DirectionError("the file is no GGUF: its first four bytes are not GGUF")
    version = walk.number("<I", "its version")
    if version not in (2, 3):
        raise DirectionError(
            f"the GGUF version {version} is none that bake reads",
            why="it reads versions 2 and 3 in little-endian order",
        )
    tensors = walk.count("<Q", _MAX_TENSORS, "the number of tensors")
    return tensors, walk.count("<Q", _MAX_KEYS, "the number of metadata keys")


def _metadata(walk: _Walk, count: int) -> dict[str, str]:
    """Return the metadata as text, after a check of the architecture."""
    metadata: dict[str, str] = {}
    for _ in range(count):
        key = walk.text("a metadata key")
        if key in metadata:
            raise DirectionError(f"the GGUF file holds the key {key!r} twice")
        metadata[key] = _value(walk, int(walk.number("<I", f"the type of {key!r}")), key)
        if key == "general.architecture" and metadata[key] not in ARCHITECTURES:
            raise DirectionError(
                f"the GGUF file is of architecture {metadata[key]!r}, not a control vector",
                why=f"control vectors are of architecture {' or '.join(ARCHITECTURES)}",
            )
    if "general.architecture" not in metadata:
        raise DirectionError("the GGUF file names no general.architecture")
    return metadata


def _value(walk: _Walk, kind: int, key: str) -> str:
    if kind == _STRING:
        return walk.text(f"the value of {key!r}")
    if kind in _SCALARS:
        return str(walk.number(_SCALARS[kind], f"the value of {key!r}"))
    if kind != _ARRAY:
        raise DirectionError(f"the key {key!r} of the GGUF file has the unknown type {kind}")
    element = int(walk.number("<I", f"the type of {key!r}"))
    if element == _ARRAY:
        raise DirectionError(f"the key {key!r} of the GGUF file holds arrays of arrays")
    length = walk.count("<Q", _MAX_ARRAY, f"the length of {key!r}")
    return ", ".join(_value(walk, element, key) for _ in range(length))


def _entry(walk: _Walk) -> _Entry:
    name = walk.text("a tensor's name")
    rank = walk.count("<I", 4, f"the rank of {name!r}")
    dims = tuple(int(walk.number("<Q", f"the shape of {name!r}")) for _ in range(rank))
    kind = int(walk.number("<I", f"the type of {name!r}"))
    return _Entry(name, dims, kind, int(walk.number("<Q", f"the offset of {name!r}")))


def _aligned(position: int, alignment: str) -> int:
    step = int(alignment) if alignment.isdecimal() else 0
    if step == 0 or step & (step - 1):
        raise DirectionError(f"the GGUF file's alignment is {alignment!r}, no power of two")
    return -(-position // step) * step


def _layer(name: str) -> int:
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise DirectionError(
            f"the GGUF file holds {name!r}, which is no tensor of a control vector",
            why="a control vector holds direction.<layer>, one for each block it edits",
        )
    return int(match[1])


def _values(walk: _Walk, entry: _Entry, start: int) -> Float[Tensor, " d"]:
    """Return the values of a tensor, [d], as they are stored."""
    if entry.kind not in _FLOATS:
        raise DirectionError(
            f"{entry.name!r} is of GGML type {entry.kind}; a control vector holds plain floats",
        )
    if not entry.dims or entry.dims[0] == 0 or math.prod(entry.dims) != entry.dims[0]:
        raise DirectionError(f"{entry.name!r} has shape {list(entry.dims)} where [d] is meant")
    dtype = _FLOATS[entry.kind]
    if start + entry.offset > walk.size:
        raise DirectionError(f"the values of {entry.name!r} begin after the end of the GGUF file")
    walk.file.seek(start + entry.offset)
    raw = walk.take(entry.dims[0] * dtype.itemsize, f"the values of {entry.name!r}")
    return torch.frombuffer(bytearray(raw), dtype=dtype)


READER = Reader("a control vector of repeng, dialz or llama.cpp (.gguf)", _recognises, _read)
