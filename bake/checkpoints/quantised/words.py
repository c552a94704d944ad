"""Integer weights of a few bits in 32-bit words, under scales of groups and with zeros or none."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from bake.checkpoints.quantised.coded import ScaleTable, blocks, not_less, whole
from bake.checkpoints.quantised.packing import from_words, to_words
from bake.checkpoints.quantised.stored import Stored
from bake.errors import CheckpointError


@dataclass(frozen=True, slots=True, eq=False)
class RowWords:
    """Codes of a row one behind the other: [out, words]."""

    checkpoint: Stored
    name: str
    bits: int
    width: int

    def read(self, start: int, stop: int) -> UInt8[Tensor, "rows columns"]:
        """Return the codes of some rows."""
        return from_words(self.checkpoint.read_part(self.name, start, stop), self.bits, self.width)

    def stored(self, tiles: Iterable[UInt8[Tensor, "rows columns"]]) -> Iterator[Tensor]:
        """Yield the rows of words."""
        for tile in tiles:
            yield to_words(tile, self.bits)


@dataclass(frozen=True, slots=True, eq=False)
class ColumnWords:
    """Codes of a row one below the other: [words, out]."""

    checkpoint: Stored
    name: str
    bits: int
    width: int

    def read(self, start: int, stop: int) -> UInt8[Tensor, "rows columns"]:
        """Return the codes of some rows."""
        words = self.checkpoint.read(self.name)[:, start:stop]
        return from_words(words.T, self.bits, self.width)

    def stored(self, tiles: Iterable[UInt8[Tensor, "rows columns"]]) -> Iterator[Tensor]:
        """Yield the words of all rows: nothing of them is known before the last row."""
        words = torch.cat([to_words(tile, self.bits) for tile in tiles])
        yield words.T.contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class InterleavedWords:
    """Codes of a column one behind the other, in another order within a word: [in, words].

    ``order`` says which of the columns of a word each of its fields holds, the lowest first.
    """

    checkpoint: Stored
    name: str
    bits: int
    order: tuple[int, ...]

    def read(self, start: int, stop: int) -> UInt8[Tensor, "rows columns"]:
        """Return the codes of some rows."""
        each = len(self.order)
        first, last = start // each, -(-stop // each)
        words = self.checkpoint.read(self.name)[:, first:last]
        fields = from_words(words, self.bits, (last - first) * each)
        fields = fields.reshape(fields.shape[0], -1, each)
        columns = torch.empty_like(fields)
        columns[:, :, torch.tensor(self.order)] = fields
        return columns.flatten(1).T[start - first * each : stop - first * each]

    def stored(self, tiles: Iterable[UInt8[Tensor, "rows columns"]]) -> Iterator[Tensor]:
        """Yield the words of all rows: nothing of them is known before the last row."""
        columns = torch.cat(list(tiles)).T.contiguous()
        fields = columns.reshape(columns.shape[0], -1, len(self.order))
        yield to_words(fields[:, :, torch.tensor(self.order)].flatten(1), self.bits)


@dataclass(frozen=True, slots=True, eq=False)
class GroupScales:
    """Scales of groups of columns in a floating-point type, and the zeros, which stay.

    ``turned`` where the tensors have a row for every group, and not for every output.
    """

    checkpoint: Stored
    name: str
    groups: "Groups"
    turned: bool
    zero: "ZeroPoints | None" = None

    @property
    def names(self) -> tuple[str, ...]:
        """The tensor."""
        return (self.name,)

    def read(self) -> ScaleTable:
        """Return them, a row for each output."""
        stored = whole(self.checkpoint, self.name)
        scale = stored.T if self.turned else stored
        zero = None if self.zero is None else self.zero.read(scale.shape)
        columns = self.groups.columns(scale.shape[1])
        return ScaleTable(scale, torch.arange(scale.shape[0]), columns, zero)

    def hold(self, scale: Float64[Tensor, "r c"]) -> Float64[Tensor, "r c"]:
        """Return scales of the tensor's type that are not less."""
        return not_less(scale, self.checkpoint.tensors[self.name].torch_dtype)

    def stored(self, scale: Float64[Tensor, "r c"]) -> Mapping[str, Tensor]:
        """Return the tensor."""
        stored = scale.T if self.turned else scale
        return {self.name: stored.to(self.checkpoint.tensors[self.name].torch_dtype).contiguous()}


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Which group of scales every column is in: ``size`` in a row, or as a tensor says.

    The tensor is read when it is asked for: of a checkpoint on the Hub there may be hundreds.
    """

    checkpoint: Stored
    width: int
    size: int
    order: str | None = None

    def columns(self, count: int) -> Int64[Tensor, " columns"]:
        """Return them, where there are so many groups.

        Raises:
            CheckpointError: the tensor names no group for a column.
        """
        if self.order is None or self.order not in self.checkpoint.tensors:
            return blocks(self.width, self.size)
        found = self.checkpoint.read(self.order).to(torch.int64)
        if found.shape == (self.width,) and 0 <= int(found.min()) <= int(found.max()) < count:
            return found
        raise CheckpointError(
            f"{self.order} names no group for each of {self.width} columns: there are {count}",
            where=self.checkpoint.source,
            fix="fetch the weights again",
        )


@dataclass(frozen=True, slots=True, eq=False)
class ZeroPoints:
    """The zeros of groups in words: of a column one below the other, or of a row in ``order``.

    ``added`` is what they are stored less of: 1 in GPTQ's first format, in which 0 is stored as the
    largest code, and in compressed-tensors the lowest level.
    """

    checkpoint: Stored
    name: str
    bits: int
    added: int
    order: tuple[int, ...] | None

    def read(self, shape: "torch.Size") -> Float64[Tensor, "out groups"]:
        """Return them, for as many outputs and groups."""
        words, (outputs, groups) = self.checkpoint.read(self.name), shape
        if self.order is None:
            codes = from_words(words.T, self.bits, outputs).T
        else:
            fields = from_words(words, self.bits, outputs).reshape(groups, -1, len(self.order))
            columns = torch.empty_like(fields)
            columns[:, :, torch.tensor(self.order)] = fields
            codes = columns.flatten(1).T
        whole_numbers = codes.to(torch.int64) + self.added
        return (whole_numbers % (1 << self.bits) if self.added > 0 else whole_numbers).to(
            torch.float64
        )
