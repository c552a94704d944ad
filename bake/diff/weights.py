"""The two kinds of weights that can be compared, checkpoints and GGUF files, behind one face."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from typing_extensions import override

from bake.checkpoints import Checkpoint
from bake.checkpoints.gguf.codec import FLOATS as GGUF_FLOATS
from bake.checkpoints.gguf.codec import decode
from bake.checkpoints.gguf.file import Gguf
from bake.checkpoints.gguf.grid import PLANES, read_grid
from bake.checkpoints.source import chunks
from bake.diff.bytesource import Spool
from bake.diff.precision import FLOATS, half_step


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as it lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    numeric: bool
    """Whether its values are numbers that can be read: no codes whose scale lies elsewhere."""

    @property
    def matrices(self) -> int:
        """How many matrices it stacks, 1 for all but a stack."""
        return self.shape[0] if self.stacks else 1

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of one matrix.

        A vector is a single column, and the kernels of a convolution are the columns of one row
        per output.
        """
        if len(self.shape) < 2:
            return math.prod(self.shape), 1
        if self.stacks:
            return self.shape[1], self.shape[2]
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def stacks(self) -> bool:
        """Whether its first axis counts matrices, as that of fused experts does."""
        return len(self.shape) == 3 and self.shape[1] > 1


class Weights(ABC):
    """Tensors by name, whose bytes and values are read piece by piece."""

    tensors: Mapping[str, Stored]
    derived: ClassVar[bool] = False
    """Whether values are made of the base's as they are stored, by exact arithmetic."""

    @abstractmethod
    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes; each chunk is valid until the next."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> UInt8[Tensor, "rows bytes"]:
        """Return the bytes of rows of the matrices that a tensor stacks, one below the other."""

    @abstractmethod
    def values(self, name: str, raw: UInt8[Tensor, "rows bytes"]) -> Float[Tensor, "rows n"]:
        """Return the numbers that rows hold, in float64 or narrower without loss."""

    def steps(
        self, name: str, raw: UInt8[Tensor, "rows bytes"], values: Float[Tensor, "rows n"]
    ) -> Float[Tensor, "rows n"] | None:
        """Return how far rounding may have moved each value, or None where that is unknown."""
        return half_step(values, self.tensors[name].dtype)

    def keep(self, name: str) -> None:  # noqa: B027
        """Keep what is read of a tensor at hand, because it is read again; nothing to do here."""

    def drop(self, name: str) -> None:  # noqa: B027
        """Undo ``keep``."""


@dataclass(frozen=True, slots=True, eq=False)
class FileWeights(Weights):
    """Tensors as they lie in files: the rows of all matrices of one, one behind the other."""

    model: Checkpoint | Gguf
    tensors: Mapping[str, Stored]

    @override
    def chunks(self, name: str) -> Iterator[memoryview]:
        info = self.model.tensors[name]
        yield from chunks(self.model.files, info.shard, info.start, info.stop)

    @override
    def rows(self, name: str, start: int, stop: int) -> UInt8[Tensor, "rows bytes"]:
        info, stored = self.model.tensors[name], self.tensors[name]
        width = info.nbytes // (stored.matrices * stored.matrix[0])
        flat = torch.empty((stop - start) * width, dtype=torch.uint8)
        if flat.numel():
            offset = info.start + start * width
            self.model.files.read_into(info.shard, offset, flat.numpy().data)
        return flat.reshape(stop - start, width)


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointWeights(FileWeights):
    """A checkpoint's tensors."""

    model: Checkpoint

    @staticmethod
    def of(checkpoint: Checkpoint) -> "CheckpointWeights":
        """Return the tensors of a checkpoint.

        Types of eight bits and fewer are codes, whose scales lie in tensors of their own.
        """
        tensors = {
            name: Stored(t.dtype, t.shape, t.nbytes, t.dtype in FLOATS)
            for name, t in checkpoint.tensors.items()
        }
        return CheckpointWeights(checkpoint, tensors)

    @override
    def values(self, name: str, raw: UInt8[Tensor, "rows bytes"]) -> Float[Tensor, "rows n"]:
        return raw.view(self.model.tensors[name].torch_dtype)

    @override
    def keep(self, name: str) -> None:
        if isinstance(self.model.files, Spool):
            self.model.files.keep(self.model.tensors[name])

    @override
    def drop(self, name: str) -> None:
        if isinstance(self.model.files, Spool):
            self.model.files.drop(self.model.tensors[name])


@dataclass(frozen=True, slots=True, eq=False)
class GgufWeights(FileWeights):
    """The tensors of a GGUF model, decoded as runtimes decode them."""

    model: Gguf

    @staticmethod
    def of(model: Gguf) -> "GgufWeights":
        """Return the tensors of a GGUF model."""
        found = {}
        for name, t in model.tensors.items():
            numeric = _is_numeric(t.kind.name, t.shape)
            found[name] = Stored(t.kind.name, t.shape, t.nbytes, numeric)
        return GgufWeights(model, found)

    @override
    def values(self, name: str, raw: UInt8[Tensor, "rows bytes"]) -> Float[Tensor, "rows n"]:
        return decode(raw, self.model.tensors[name].kind, name)

    @override
    def steps(
        self, name: str, raw: UInt8[Tensor, "rows bytes"], values: Float[Tensor, "rows n"]
    ) -> Float[Tensor, "rows n"] | None:
        """Return how far rounding may have moved each value: a whole step of the grid.

        Rounding with error feedback may take the neighbour of the nearest code.
        """
        kind = self.model.tensors[name].kind
        if kind.name in FLOATS:
            return half_step(values, kind.name)
        if kind.name in PLANES:
            grid = read_grid(raw, kind, lambda some: decode(some, kind, name))
            return grid.steps(raw.shape[0]).to(torch.float64)
        return None


def _is_numeric(kind: str, shape: tuple[int, ...]) -> bool:
    """Whether gguf-py decodes a type; whole numbers, which are no weights, are left out."""
    if kind in GGUF_FLOATS:
        return True
    return len(shape) > 1 and kind.startswith(("Q", "IQ", "TQ", "MXFP"))
