"""The tensors of a GGUF file: codes within the rounding of their blocks, all else as it was."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bake.checkpoints.gguf.file import Gguf
from bake.checkpoints.gguf.grid import PLANES, SIMPLE
from bake.checkpoints.planned import PlannedTensor
from bake.edits import Edit
from bake.families import Layout
from bake.families.gguf import GgufPlace, gguf_places
from bake.verify.planned import PlannedGguf
from bake.verify.stored.blocks import FLOATS, steps_of, values_of
from bake.verify.stored.deviation import float_steps
from bake.verify.stored.files import WIDE, Directions, Rows, written_directions


@dataclass(frozen=True, eq=False)
class StoredGguf:
    """An edited GGUF beside the base's own, and its plan."""

    model: Gguf
    gguf: PlannedGguf | None
    """None where the base's file is not at hand: then nothing is known of what it should hold."""
    layout: Layout
    """Of the base."""
    edits: Sequence[Edit]
    unbiased: bool = True

    @property
    def planned(self) -> Mapping[str, PlannedTensor]:
        """What the file is to hold."""
        return {} if self.gguf is None else self.gguf.tensors

    @property
    def original(self) -> Gguf | None:
        """The base's own file."""
        return None if self.gguf is None else self.gguf.original

    @cached_property
    def _places(self) -> Mapping[str, GgufPlace]:
        return gguf_places(self.layout)

    @property
    def tied(self) -> tuple[str, str] | None:
        """The head and the embedding that the plan unties it from; None where it does not."""
        names = self._places[self.layout.unembed.weight].name, self._places[self.layout.embed].name
        return names if self.layout.tied and names[0] in self.planned else None

    @property
    def stored_name(self) -> str:
        """The types of the edited matrices."""
        kinds = {self.model.tensors[place.name].kind.name for place in self._edited.values()}
        return ", ".join(sorted(kinds))

    def reach(self, name: str) -> float:
        """Return by how many steps a stored value may lie from the planned one.

        A code is one of the two neighbours of a value or, for an edit that is small beside the
        steps, the one behind the nearer of them. Scales that are multiples of another one may end
        a step and a half earlier. Of values from a table no step is known.
        """
        kind = self.model.tensors[name].kind.name
        if kind in FLOATS:
            return 1.0
        if kind in SIMPLE:
            return 1.51
        return 3.0 if kind in PLANES else math.inf

    def strays(self) -> Iterator[str]:
        """Yield what the plan leaves alone and the file does not."""
        if self.original is None:
            return
        before, after = self.original.tensors, self.model.tensors
        yield from sorted(after.keys() - before.keys() - self.planned.keys())
        for name in (*before, *(name for name in self.planned if name not in before)):
            if name not in after or not self._is_kept(name):
                yield name

    def _is_kept(self, name: str) -> bool:
        assert self.original is not None
        have, plan = self.model.tensors[name], self.planned.get(name)
        if plan is not None:
            return (have.kind.name, have.shape) == (plan.dtype, plan.shape)
        return _same(self.original, name, self.model, name)

    def base(self, name: str, start: int, stop: int) -> Rows | None:
        """Return rows as the base's file has them; None where it has no such tensor."""
        if self.original is None or name not in self.original.tensors:
            return None
        return file_rows(self.original, name, start, stop)

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """Return rows as the file has them."""
        return file_rows(self.model, name, start, stop)

    def steps(self, name: str, start: int, stop: int, exact: Rows) -> Rows:
        """Return the distance between neighbouring values of the storage type."""
        kind = self.model.tensors[name].kind
        if kind.name in FLOATS:
            return float_steps(exact, FLOATS[kind.name])
        return steps_of(_raw(self.model, name, start, stop), kind, name)

    @property
    def rounds(self) -> bool:
        """Whether values are stored in less than float32."""
        kinds = {self.model.tensors[place.name].kind.name for place in self._edited.values()}
        return not kinds <= set(WIDE)

    @cached_property
    def _edited(self) -> Mapping[str, GgufPlace]:
        names = self.planned.keys() or self.model.tensors.keys()
        return {k: place for k, place in self._places.items() if place.name in names}

    def spacing(self, name: str, weight: Tensor) -> Tensor:
        """Return the steps of the storage type at the values of a base's tensor.

        Codes share a scale by blocks, in the file's order; their root mean square stands for all.
        """
        stored = self._places[name].name
        kind = self.model.tensors[stored].kind
        if kind.name in FLOATS:
            return float_steps(weight, FLOATS[kind.name])
        rows = min(256, self.model.tensors[stored].shape[-2])
        steps = steps_of(_raw(self.model, stored, 0, rows), kind, stored)
        return torch.full_like(weight, float(steps.square().mean().sqrt()))

    @cached_property
    def _directions(self) -> Mapping[str, Directions]:
        found = written_directions(self.layout, self.edits)
        tables = {self.layout.embed, *self.layout.positions}
        # The file has every linear layer as [out, in], and its tables as the checkpoint has them.
        return {
            self._places[name].name: Directions(1 if name in tables else 0, one.basis)
            for name, one in found.items()
            if self._places[name].expert is None
        }

    def directions(self, name: str) -> Directions | None:
        """Return the directions that a tensor writes along."""
        return self._directions.get(name)


def _raw(model: Gguf, name: str, start: int, stop: int) -> Tensor:
    """Return the bytes of some rows, counted through all experts; a tile lies within one."""
    shape = model.tensors[name].shape
    if len(shape) == 1:
        return model.read_rows(name, 0, 1)
    expert = start // shape[-2] if len(shape) == 3 else None
    first = (expert or 0) * shape[-2]
    return model.read_rows(name, start - first, stop - first, expert=expert)


def differing(original: Gguf, copy: Gguf, added: Mapping[str, str]) -> Iterator[str]:
    """Yield the tensors of a copy that are not the original's.

    Args:
        original: the base's own file.
        copy: a file with the same tensors, and some more.
        added: the names of those, each with that of the tensor whose bytes it has.
    """
    sources = {name: name for name in original.tensors} | {
        name: source for name, source in added.items() if name not in original.tensors
    }
    for name in sorted(copy.tensors.keys() | sources.keys()):
        held = name in copy.tensors and name in sources
        if not held or not _same(original, sources[name], copy, name):
            yield name


def _same(original: Gguf, source: str, copy: Gguf, name: str) -> bool:
    """Whether a tensor has type, shape and bytes of another one."""
    was, have = original.tensors[source], copy.tensors[name]
    if (have.kind, have.shape) != (was.kind, was.shape):
        return False
    pairs = zip(original.chunks(source), copy.chunks(name), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def file_rows(model: Gguf, name: str, start: int, stop: int) -> Rows:
    """Return rows of a tensor, counted through all experts; a vector is one column."""
    values = values_of(_raw(model, name, start, stop), model.tensors[name].kind, name)
    return values.T[start:stop] if len(model.tensors[name].shape) == 1 else values
