"""One edited GGUF tensor: decode, fold in float64, encode, and measure what the rounding left."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bake.checkpoints.gguf.codec import FEEDBACK, decode, encode, encode_with_feedback
from bake.checkpoints.gguf.file import Gguf
from bake.checkpoints.gguf.ggml import Ggml
from bake.checkpoints.gguf.types import GgmlType
from bake.fold import WeightFold, fold_weight
from bake.outputs.gguf.fold import Functionals, guarded, removed
from bake.rounding import Rounding


@dataclass(slots=True)
class Measure:
    """What rounding did to one tensor, summed over its experts; squares of Frobenius norms."""

    error: float = 0.0
    norm: float = 0.0
    meant: float = 0.0
    done: float = 0.0
    left: float = 0.0
    had: float = 0.0
    rounding: set[str] = field(default_factory=set)

    def add(self, base: Tensor, exact: Tensor, written: Tensor) -> None:
        """Add a stretch of the tensor: as it was, as it is meant to be, and as it reads back."""
        self.error += float((written - exact).square().sum())
        self.norm += float(exact.square().sum())
        change = exact - base
        self.meant += float(change.square().sum())
        self.done += float((change * (written - base)).sum())

    @property
    def change(self) -> float:
        """The share of the edit that the tensor has after rounding: 1 is all of it."""
        return self.done / self.meant if self.meant else 1.0

    @property
    def leak(self) -> float | None:
        """The share of a removed component that came back; None where the edit removes none."""
        return (self.left / self.had) ** 0.5 if self.had else None

    def record(self) -> dict[str, Any]:
        """Return the numbers for the record; ``error`` is relative to the tensor's norm."""
        return {
            "rounding": "+".join(sorted(self.rounding)),
            "change": self.change,
            "leak": self.leak,
            "error": (self.error / self.norm) ** 0.5 if self.norm else 0.0,
        }


class _Seen:
    """What functionals see of a matrix that comes tile by tile."""

    def __init__(self, functionals: Functionals) -> None:
        self.functionals = functionals
        self.across: Tensor | None = None
        self.within = 0.0

    def add(self, tile: Tensor, start: int) -> None:
        rows = self.functionals.rows
        if self.functionals.axis == 1:
            self.within += float((tile @ rows.T).square().sum())
            return
        part = rows[:, start : start + tile.shape[0]] @ tile
        self.across = part if self.across is None else self.across + part

    def square(self) -> float:
        return self.within if self.across is None else float(self.across.square().sum())


@dataclass(frozen=True, slots=True, eq=False)
class MatrixEdit:
    """A matrix, or a stack of them, that is written anew.

    ``folds`` holds a fold for every edited expert, or one under None for a plain matrix.
    """

    name: str
    source: str
    """The tensor of the base that it is made from."""
    kind: GgmlType
    shape: tuple[int, ...]
    folds: Mapping[int | None, WeightFold]
    measure: Measure = field(default_factory=Measure)

    def produce(self, gguf: Gguf, rounding: Rounding, ggml: Ggml | None) -> Iterator[Tensor]:
        """Yield the rows of the new tensor as bytes, [rows, bytes]."""
        experts: list[int | None] = [None] if len(self.shape) == 2 else [*range(self.shape[0])]
        for expert in experts:
            fold = self.folds.get(expert)
            if fold is None and self.kind == gguf.tensors[self.source].kind:
                yield gguf.read_rows(self.source, 0, self.shape[-2], expert=expert)
                continue
            rows, columns = self.shape[-2:]
            reader = _Reader(gguf, self.source, expert)
            work = fold or WeightFold((rows, columns), 0)
            yield from self._folded(work, reader, rounding, ggml)

    def _folded(
        self, fold: WeightFold, reader: "_Reader", rounding: Rounding, ggml: Ggml | None
    ) -> Iterator[Tensor]:
        vanishing = removed(fold)
        before = [_Seen(functionals) for functionals in vanishing]
        after = [_Seen(functionals) for functionals in vanishing]
        start = 0
        for exact, raw in self._rounded(fold, reader, rounding, ggml):
            written = decode(raw, self.kind, self.name)
            stop = start + exact.shape[0]
            base = reader(start, stop)
            self.measure.add(base, exact, written)
            for then, now in zip(before, after, strict=True):
                then.add(base, start)
                # The exact matrix has nothing of it, save what an affine map puts there.
                now.add(written - exact, start)
            yield raw
            start = stop
        self.measure.had += sum(seen.square() for seen in before)
        self.measure.left += sum(seen.square() for seen in after)

    def _rounded(
        self, fold: WeightFold, reader: "_Reader", rounding: Rounding, ggml: Ggml | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tiles in float64 and as bytes. Feedback along the rows holds the whole matrix."""
        guard = guarded(fold) if rounding == "feedback" and self.kind.name in FEEDBACK else None
        tiles = fold_weight(reader, fold)
        self.measure.rounding.add("nearest" if guard is None else "feedback")
        if guard is not None and guard.axis == 0:
            tiles = iter([torch.cat(list(tiles))])
        start = 0
        for tile in tiles:
            stop = start + tile.shape[0]
            if guard is None:
                yield tile, encode(tile, self.kind, self.name, ggml=ggml)
            else:
                old = reader.raw(start, stop) if reader.kind == self.kind else None
                yield (
                    tile,
                    encode_with_feedback(
                        tile,
                        guard.rows,
                        self.kind,
                        self.name,
                        axis=guard.axis,
                        base=old,
                        ggml=ggml,
                    ),
                )
            start = stop


class _Reader:
    """Reads rows of one matrix in float64 and keeps the last ones, which are asked for again."""

    def __init__(self, gguf: Gguf, name: str, expert: int | None) -> None:
        self.gguf, self.name, self.expert = gguf, name, expert
        self.span, self.tile = (0, 0), torch.empty(0)

    def __call__(self, start: int, stop: int) -> Tensor:
        if self.span != (start, stop):
            self.tile = decode(self.raw(start, stop), self.kind, self.name)
            self.span = (start, stop)
        return self.tile

    @property
    def kind(self) -> GgmlType:
        """The type that the base file has the matrix in."""
        return self.gguf.tensors[self.name].kind

    def raw(self, start: int, stop: int) -> Tensor:
        """Return rows as bytes."""
        return self.gguf.read_rows(self.name, start, stop, expert=self.expert)
