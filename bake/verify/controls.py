"""Broken bakes that have to be told from sound ones: a comparison that passes them saw nothing.

Each spoils one tensor as a careless tool would: it keeps the value of the base, its change has the
wrong sign or lies along the wrong axis, a bias is left at zero, the output head stays tied to the
edited embedding, a block of values is shifted by one. They are made from base and result alone,
without the fold.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from bake.checkpoints.planned import PlannedTensor
from bake.tiles import row_count

TENSOR, SIGN, AXIS = "forgotten tensor", "flipped sign", "wrong axis"
BIAS, TIED, BLOCK = "forgotten bias", "tied head", "wrong block"
WIDTH = 32
"""Values of a wrong block: as many as share a scale in the GGUF types."""

TRIES = 8
"""Controls of a kind that are tried in vain before the kind is left: each may be a forward pass."""

Rows = Callable[[str, int, int], Tensor]
"""Returns rows of a tensor by its name, as [rows, columns] in float64."""


@dataclass(frozen=True, slots=True)
class Control:
    """One way to break a bake."""

    kind: str
    tensor: str


@dataclass(frozen=True, slots=True, eq=False)
class Spoiling:
    """What the mistakes are made of.

    Attributes:
        planned: what is to be held, by name.
        base: rows of the base; None where it has no such tensor.
        result: rows of what was made.
        tied: the head and the embedding that it is no longer tied to, where it was.
    """

    planned: Mapping[str, PlannedTensor]
    base: Callable[[str, int, int], Tensor | None]
    result: Rows
    tied: tuple[str, str] | None

    def rows(self, control: Control, start: int, stop: int) -> Tensor:
        """Return what a mistake makes of some rows of its tensor."""
        name, kind = control.tensor, control.kind
        if kind == TIED:
            assert self.tied is not None
            return self.result(self.tied[1], start, stop)
        have = self.result(name, start, stop)
        if kind == BLOCK:
            return _shifted(have) if start == 0 else have
        if kind == AXIS:
            return self._turned(name, start, stop)
        before = self.base(name, start, stop)
        was = torch.zeros_like(have) if before is None else before
        return 2 * was - have if kind == SIGN else was

    def _turned(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of a square matrix, or of several in a stack, changed on the wrong axis."""
        size, parts = self.planned[name].shape[-1], []
        first = start - start % size
        for matrix in range(first, stop, size):
            was = self.base(name, matrix, matrix + size)
            assert was is not None
            parts.append(was + (self.result(name, matrix, matrix + size) - was).T)
        return torch.cat(parts)[start - first : stop - first]


def _shifted(rows: Tensor) -> Tensor:
    """Return the rows with the values of the first block each in the place of the next."""
    broken = rows.clone()
    block = broken[0, :WIDTH] if broken.shape[1] > 1 else broken[:WIDTH, 0]
    block.copy_(block.roll(1))
    return broken


def groups_of(
    planned: Mapping[str, PlannedTensor],
    in_base: Callable[[str], bool],
    tied: tuple[str, str] | None,
    digest: str,
) -> tuple[tuple[Control, ...], ...]:
    """Return the controls of each kind, in an order that the plan's digest decides.

    A kind that the plan gives no occasion for (no bias, no square matrix, no head that was tied) is
    left out.
    """
    chance = random.Random(digest)
    changed = [t for name, t in planned.items() if in_base(name) and len(t.shape) > 1]
    square = [t for t in changed if t.shape[-2] == t.shape[-1]]
    vectors = [t for t in planned.values() if len(t.shape) == 1]
    groups = (
        [Control(TENSOR, t.name) for t in changed],
        [Control(SIGN, t.name) for t in changed],
        [Control(AXIS, t.name) for t in square],
        [Control(BIAS, t.name) for t in vectors],
        [] if tied is None else [Control(TIED, tied[0])],
        [Control(BLOCK, t.name) for t in planned.values()],
    )
    return tuple(tuple(chance.sample(group, len(group))) for group in groups if group)


def values(spoiling: Spoiling, control: Control) -> Callable[[], Tensor]:
    """Return what computes all of a spoiled tensor, in the shape that it has."""
    shape = spoiling.planned[control.tensor].shape
    return lambda: spoiling.rows(control, 0, row_count(shape)).reshape(shape)


class Tried(Protocol):
    """What came of trying a control."""

    @property
    def faint(self) -> bool:
        """Whether it was not told, and is too small a mistake for that to say anything."""
        ...


T = TypeVar("T", bound=Tried)


def sample(
    groups: Sequence[Sequence[Control]], each: int, try_out: Callable[[Control], T | None]
) -> Iterator[T]:
    """Yield what came of some controls of every kind.

    One that is faint is passed over for the next of its kind: which control is drawn is chance, and
    a sound bake must not be doubted for that. Where there are too few others, faint ones are
    yielded in their place, since that is what is known of the kind.

    Args:
        groups: by kind.
        each: how many of a kind.
        try_out: returns None for one that breaks nothing, or nothing new: it is passed over too.
    """
    for group in groups:
        wanted, faint = each, list[T]()
        for control in group:
            result = try_out(control)
            if result is None:
                continue
            if result.faint:
                faint.append(result)
                if len(faint) >= max(each, TRIES):
                    break
                continue
            yield result
            wanted -= 1
            if not wanted:
                break
        yield from faint[:wanted]
