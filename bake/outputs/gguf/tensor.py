"""One edited GGUF tensor: decode, fold in float64, encode, and measure what the rounding left."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bake.checkpoints.gguf.codec import FEEDBACK, decode
from bake.checkpoints.gguf.file import Gguf
from bake.checkpoints.gguf.ggml import Ggml
from bake.checkpoints.gguf.rounding import encode_measured
from bake.checkpoints.gguf.types import GgmlType
from bake.fold import WeightFold, fold_weight
from bake.outputs.functionals import feedback_of, removed
from bake.outputs.measure import Measure, Seen
from bake.rounding import Rounding


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
    part: str
    """The kind of tensor, one of ``storage.PARTS``."""
    measure: Measure = field(default_factory=Measure)

    @property
    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    def sample(self, gguf: Gguf) -> tuple[WeightFold, Tensor, Tensor, Tensor]:
        """Return one fold, and of its first rows the bytes, the values and the new values."""
        expert = next(iter(self.folds))
        reader, fold = _Reader(gguf, self.source, expert), self.folds[expert]
        exact = next(fold_weight(reader, fold))
        stop = exact.shape[0]
        return fold, reader.raw(0, stop), reader(0, stop), exact

    def exact(self, gguf: Gguf) -> Iterator[Tensor]:
        """Yield the rows of the new tensor in float64, as they are before they are rounded."""
        for expert in self._experts():
            yield from fold_weight(_Reader(gguf, self.source, expert), self._fold(expert))

    def produce(self, gguf: Gguf, rounding: Rounding, ggml: Ggml | None) -> Iterator[Tensor]:
        """Yield the rows of the new tensor as bytes, [rows, bytes]."""
        for expert in self._experts():
            if expert not in self.folds and self.kind == gguf.tensors[self.source].kind:
                yield gguf.read_rows(self.source, 0, self.shape[-2], expert=expert)
            else:
                reader = _Reader(gguf, self.source, expert)
                yield from self._rounded(self._fold(expert), reader, rounding, ggml)

    def _experts(self) -> Sequence[int | None]:
        return [None] if len(self.shape) == 2 else range(self.shape[0])

    def _fold(self, expert: int | None) -> WeightFold:
        rows, columns = self.shape[-2:]
        return self.folds.get(expert) or WeightFold((rows, columns), 0)

    def _rounded(
        self, fold: WeightFold, reader: "_Reader", rounding: Rounding, ggml: Ggml | None
    ) -> Iterator[Tensor]:
        """Yield tiles as bytes, and measure them on the way."""
        feedback = feedback_of(fold, rounding if self.kind.name in FEEDBACK else "nearest")
        self.measure.rounding.add("nearest" if feedback is None else "feedback")
        seen = [(Seen(functionals), Seen(functionals)) for functionals in removed(fold)]
        start = 0
        for exact in fold_weight(reader, fold):
            stop = start + exact.shape[0]
            base, old = reader(start, stop), None
            if reader.kind == self.kind and feedback is not None:
                old = reader.raw(start, stop)
            raw, errors = encode_measured(
                exact, self.kind, self.name, base=old, feedback=feedback, ggml=ggml
            )
            self.measure.add(base, exact, errors)
            for before, after in seen:
                before.add(base, start)
                # The exact matrix has nothing of it, save what an affine map puts there.
                after.add(errors, start)
            yield raw
            start = stop
        self.measure.had += sum(before.square() for before, _ in seen)
        self.measure.left += sum(after.square() for _, after in seen)


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
