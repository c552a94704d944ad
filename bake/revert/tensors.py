"""The base's tensors, computed back from an artifact's, each value with a bound of its error.

Every stored value of an edited tensor is its exact one rounded once, so it is off by at most half
the spacing there. The inverse map spreads that, and the result is rounded once more. Where the
first error is smaller than half the spacing at the result, the base's very value comes out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from bake.affine import AffineMap, tolerance
from bake.checkpoints import Checkpoint, Producer, TensorInfo
from bake.errors import InexactPlan, InputError
from bake.fold import ReadRows, WeightFold, fold_weight
from bake.plan import BiasUpdate, Plan, TensorUpdate
from bake.revert.inverse import (
    applied,
    inverse_fold,
    inverted,
    is_singular,
    magnitudes,
    maps_of,
    spread_fold,
)
from bake.rounding import to_storage

Tiles = Iterator[tuple[Tensor, Tensor]]
"""Tiles of a tensor with a bound of the error of every value, both in float64."""


@dataclass(slots=True)
class Recovered:
    """How far one tensor that was computed back may be from the base's.

    Attributes:
        name: of the tensor.
        elements: how many values it has.
        uncertain: how many of them may differ; the others are the base's own.
        bound: no value is further from the base's than this.
        largest: the largest magnitude of a value.
    """

    name: str
    elements: int = 0
    uncertain: int = 0
    bound: float = 0.0
    largest: float = 0.0

    def add(self, exact: Tensor, error: Tensor, rounded: Tensor) -> None:
        """Take in one tile: before rounding, its bound, and after."""
        value = rounded.to(torch.float64)
        infinity = torch.full_like(rounded, torch.inf)
        gaps = [
            (torch.nextafter(rounded, side).to(torch.float64) - value).abs()
            for side in (infinity, -infinity)
        ]
        differ = error >= torch.minimum(*gaps) / 2
        # A value that is certain equals the base's, however far it was from the exact one.
        bound = torch.where(differ, error + (value - exact).abs(), 0.0)
        self.elements += rounded.numel()
        self.uncertain += int(differ.sum())
        if rounded.numel():
            self.bound = max(self.bound, float(bound.max()))
            self.largest = max(self.largest, float(value.abs().max()))


@dataclass(frozen=True, slots=True)
class NormInverse:
    """A norm's gain or bias was x and is scale ⊙ x + shift."""

    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Subtraction:
    """The way back from an artifact's tensors to the base's.

    Attributes:
        plan: what was done, compiled again.
        artifact: what it was done to.
        norms: how each norm that was replaced is computed back.
        measured: what was found, by tensor, as the producers run.
    """

    plan: Plan
    artifact: Checkpoint
    norms: Mapping[str, NormInverse]
    measured: dict[str, Recovered] = field(default_factory=dict)

    @cached_property
    def _weights(self) -> dict[str, TensorUpdate]:
        return {update.name: update for update in self.plan.tensors if not update.create}

    @cached_property
    def copies(self) -> dict[str, str]:
        """Tensors of the base of which the artifact holds an untouched copy, by that copy's name.

        A tied head that was given a tensor of its own is the embedding as it was.
        """
        return {
            update.source: update.name
            for update in self.plan.tensors
            if update.create and not (maps_of(update) or update.updates)
        }

    def check(self) -> None:
        """Refuse an edit that took something away for good.

        Raises:
            InexactPlan: naming a tensor and the edit.
        """
        for name, update in self._weights.items():
            if name in self.copies:
                continue
            if update.replacement is not None:
                norm = self.norms[name]
                gone = bool((norm.scale == 0).any())
            else:
                gone = any(is_singular(map_) for map_ in maps_of(update))
            if gone:
                raise self._refusal(name, norm=update.replacement is not None)
        for bias in self.plan.biases:
            if not bias.create and any(is_singular(part.map) for part in bias.outputs):
                raise self._refusal(bias.name, norm=False)

    def _refusal(self, name: str, *, norm: bool) -> InexactPlan:
        blamed = [
            edit
            for edit in self.plan.edits
            if isinstance(edit.map, AffineMap) and is_singular(edit.map)
        ]
        if blamed:
            edit = blamed[0]
            what = f"the {edit.kind} edit {edit.concept!r} cannot be subtracted from {name}"
            why = "what it removed is gone from the weights: the base's component along its "
            why += "directions is not in the artifact any more"
        else:
            what = f"the edit cannot be subtracted from {name}"
            why = (
                "its old values were multiplied into other tensors, and nothing here tells the "
                "factors apart"
                if norm
                else "the edits together remove a component of it"
            )
        return InexactPlan(what, why=why, fix="name the base with --base MODEL: then it is exact")

    def producers(self) -> dict[str, Producer]:
        """Return a producer of every tensor of the base that the artifact has otherwise."""
        found: dict[str, Producer] = {}
        for name, update in self._weights.items():
            if name in self.copies:
                found[name] = partial(self._copied, name)
            elif update.replacement is not None:
                found[name] = partial(self._rounded, name, partial(self._norm, name))
            else:
                found[name] = partial(self._rounded, name, partial(self._weight, name))
        for bias in self.plan.biases:
            if not bias.create:
                found[bias.name] = partial(self._rounded, bias.name, partial(self._bias, bias))
        return found

    def _copied(self, name: str) -> Iterator[Tensor]:
        """Yield the untouched copy; every value is certain."""
        copy = self.artifact.tensors[self.copies[name]]
        result = Recovered(name)
        for start, stop in _spans(copy):
            rows = self.artifact.read_rows(copy.name, start, stop)
            exact = rows.to(torch.float64)
            result.add(exact, torch.zeros_like(exact), rows)
            yield rows
        self.measured[name] = result

    def _rounded(self, name: str, tiles: "partial[Tiles]") -> Iterator[Tensor]:
        dtype = self.artifact.tensors[name].torch_dtype
        result = Recovered(name)
        for exact, error in tiles():
            rounded = to_storage(exact, dtype, name)
            result.add(exact, error, rounded)
            yield rounded
        self.measured[name] = result

    def _weight(self, name: str) -> Tiles:
        """Yield O⁻¹ (W' − O U I) I⁻¹ with its bound; for what was not edited, the tensor itself."""
        read = partial(self.artifact.read_rows, name)
        update = self._weights.get(name)
        if update is None:
            for start, stop in _spans(self.artifact.tensors[name]):
                tile = read(start, stop).to(torch.float64)
                yield tile, torch.zeros_like(tile)
            return
        fold = inverse_fold(update)
        margin = tolerance(max(update.shape))
        backwards = fold_weight(read, fold)
        errors = fold_weight(_errors(read, margin), spread_fold(update))
        for exact, error in zip(backwards, errors, strict=True):
            yield exact, error + margin * exact.abs()

    def _norm(self, name: str) -> Tiles:
        norm = self.norms[name]
        stored = self.artifact.read(name)
        exact = (stored.to(torch.float64) - norm.shift) / norm.scale
        error = _half_step(stored) / norm.scale.abs()
        yield exact, error + tolerance(1) * (exact.abs() + (norm.shift / norm.scale).abs())

    def _bias(self, update: BiasUpdate) -> Tiles:
        """Yield b = O⁻¹ (b' − addend) − (W + U) shift with its bound."""
        stored = self.artifact.read(update.name)
        value = stored.to(torch.float64)
        outputs = tuple((part.rows, part.map) for part in update.outputs)
        back = inverted(outputs)
        margin = tolerance(update.size)
        size = value.abs()
        if update.addend is not None:
            value, size = value - update.addend, size + update.addend.abs()
        exact = applied(back, value)
        error = applied(magnitudes(back), _half_step(stored) + margin * size)
        if update.shift is not None:
            moved, spread = self._product(update, update.shift)
            exact, error = exact - moved, error + spread
        yield exact, error + margin * exact.abs()

    def _product(self, update: BiasUpdate, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Return (W + U) shift for the base's W, and a bound of its error."""
        assert update.weight is not None
        shape = self.artifact.tensors[update.weight].shape
        total = torch.zeros(shape[update.output_axis], dtype=torch.float64)
        bound = torch.zeros_like(total)
        start = 0
        margin = tolerance(max(shape))
        # A head that got a tensor of its own was the embedding.
        sources = {made.name: made.source for made in self.plan.tensors if made.create}
        for exact, error in self._weight(sources.get(update.weight, update.weight)):
            stop = start + exact.shape[0]
            spread = error + margin * exact.abs()
            if update.output_axis == 0:
                total[start:stop] = exact @ shift
                bound[start:stop] = spread @ shift.abs()
            else:
                total += exact.T @ shift[start:stop]
                bound += spread.T @ shift[start:stop].abs()
            start = stop
        for added in update.updates:
            total = total + added.left @ (added.right @ shift)
            bound = bound + margin * (added.left.abs() @ (added.right.abs() @ shift.abs()))
        return total, bound


def _errors(read: ReadRows, margin: float) -> ReadRows:
    """Return a reader of bounds: how far a stored value and the arithmetic on it may be off."""

    def errors(start: int, stop: int) -> Tensor:
        stored = read(start, stop)
        return _half_step(stored) + margin * stored.to(torch.float64).abs()

    return errors


def _half_step(stored: Tensor) -> Tensor:
    """Return half the spacing at every value: what rounding to nearest can have moved it."""
    value = stored.abs()
    above = torch.nextafter(value, torch.full_like(value, torch.inf))
    finite = torch.where(torch.isfinite(above), above.to(torch.float64), value.to(torch.float64))
    step = finite - value.to(torch.float64)
    below = value.to(torch.float64) - torch.nextafter(value, torch.zeros_like(value)).to(
        torch.float64
    )
    return torch.maximum(step, below) / 2


def _spans(info: TensorInfo) -> Iterator[tuple[int, int]]:
    if len(info.shape) != 2:
        yield 0, info.shape[0]
        return
    rows, columns = info.shape
    step = WeightFold((rows, columns), 0).tile_rows
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def norm_inverses(lower: Plan, upper: Plan, edited: Mapping[str, Tensor]) -> dict[str, NormInverse]:
    """Return how each replaced norm depends on its old value.

    A plan makes s ⊙ x + t of a norm's x. Two plans for x = 0 and x = 1 tell s and t; a plan that
    leaves a norm alone makes x of x.

    Args:
        lower: compiled for norms that are all zero.
        upper: compiled for norms that are all one.
        edited: the norms that the artifact's own plan replaces, with a tensor of their shape.
    """
    zeros = {u.name: u.replacement for u in lower.tensors if u.replacement is not None}
    ones = {u.name: u.replacement for u in upper.tensors if u.replacement is not None}
    found = {}
    for name, like in edited.items():
        zero = torch.zeros(like.shape, dtype=torch.float64)
        shift = zeros.get(name, zero)
        top = ones.get(name, zero + 1)
        if shift.shape != zero.shape or top.shape != zero.shape:
            raise InputError(f"the norm {name} has another shape than the plan's")
        found[name] = NormInverse(top - shift, shift)
    return found
