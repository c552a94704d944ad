"""The edited checkpoint of a quantised base: written back as codes, or dequantised as a whole.

Written back, an edited weight keeps its format and its scales and gets the codes that are nearest
to its new values, with error feedback along what the edit reads and writes
(``checkpoints.quantised.rounding``). A tensor that the base has in a floating-point type, and one
that the plan creates, is stored in that type, as in any checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from bake.artifact.schema import CodedTensor
from bake.checkpoints import Checkpoint, NewCheckpoint, NewTensor, Producer
from bake.checkpoints.dtypes import torch_dtype
from bake.checkpoints.planned import PlannedModel, PlannedTensor
from bake.checkpoints.quantised.coded import Coded
from bake.checkpoints.quantised.rounding import Recoded
from bake.checkpoints.quantised.view import BESIDE
from bake.checkpoints.workers import one_thread
from bake.errors import InexactPlan, UsageError
from bake.fold import WeightFold
from bake.outputs.functionals import feedback_of, guarded, removed
from bake.outputs.measure import Measure, Seen
from bake.rounding import Feedback, Rounding, to_storage

LOSS = 0.1
"""Of an edit: what rounding to codes may take of it unless the user allows more."""
_VALUES = 1 << 20  # that are decoded at a time
_SAMPLES = 4  # of the edited weights, whose first rows are measured before anything is written


@dataclass(slots=True, eq=False)
class CodedEdit:
    """An edited weight that is written back as codes.

    Attributes:
        coded: the weight as it is.
        planned: its values as they are meant.
        fold: what happens to it; None where nothing says along which directions it is rounded.
        rounding: how.
        measure: what rounding did to it, once it has been written.
    """

    coded: Coded
    planned: PlannedTensor
    fold: WeightFold | None
    rounding: Rounding
    measure: Measure = field(default_factory=Measure)

    def producers(self) -> dict[str, Producer]:
        """Return what writes the tensors that it is stored in: its codes and its scales."""
        recoded = Recoded(self.coded, self._tiles)
        found: dict[str, Producer] = {self.coded.codes.name: partial(self._codes, recoded)}
        for name in self.coded.scales.names:
            found[name] = partial(_scale, recoded, name)
        return found

    def record(self) -> CodedTensor:
        """Return what a record says of it."""
        kind = self.coded.format
        about = {"name": self.coded.name, "type": kind, "base_type": kind}
        return CodedTensor.of(about | self.measured().record())

    def measured(self) -> Measure:
        """Return what rounding did, which is found out now where an earlier run has written it."""
        if not self.measure.rounding:
            with one_thread():
                for _ in self._codes(Recoded(self.coded, self._tiles)):
                    pass
        return self.measure

    def _tiles(self) -> Iterator[Tensor]:
        for tile in self.planned.tiles():
            yield tile.reshape(-1, tile.shape[-1])

    def _codes(self, recoded: Recoded) -> Iterator[Tensor]:
        """Yield the tensor of codes, and measure them on the way."""
        self.measure = measure = Measure()
        table, height, matrix = self.coded.scales.read(), self.coded.shape[-2], _Matrix(self)

        def settles(start: int) -> Feedback | None:
            nonlocal matrix
            if start % height == 0:  # each matrix of a stack is rounded for itself
                matrix.close(measure)
                matrix = _Matrix(self)
            return matrix.feedback

        def measured(start: int, exact: Tensor, errors: Tensor) -> None:
            base = self.coded.values(start, start + exact.shape[0], table)
            measure.add(base, exact, errors)
            matrix.add(base, errors, start % height)

        yield from self.coded.codes.stored(recoded.codes(settles, measured))
        matrix.close(measure)


class _Matrix:
    """One matrix of an edited weight while it is rounded."""

    def __init__(self, edit: CodedEdit) -> None:
        fold = edit.fold
        self.feedback = None if fold is None else feedback_of(fold, edit.rounding)
        functionals = () if fold is None else removed(fold)
        self.seen = [(Seen(one), Seen(one)) for one in functionals]

    def add(self, base: Tensor, errors: Tensor, start: int) -> None:
        """Add some of its rows, as they were and as they are off."""
        for before, after in self.seen:
            before.add(base, start)
            after.add(errors, start)

    def close(self, measure: Measure) -> None:
        """Add what has been seen of it."""
        measure.rounding.add("nearest" if self.feedback is None else "feedback")
        measure.had += sum(before.square() for before, _ in self.seen)
        measure.left += sum(after.square() for _, after in self.seen)


def _scale(recoded: Recoded, name: str) -> Iterator[Tensor]:
    yield recoded.stored_scales()[name]


def written_back(
    plain: Mapping[str, Producer],
    new: Mapping[str, NewTensor],
    edits: Mapping[str, CodedEdit],
    base: Checkpoint,
    config_text: str,
    extra: Mapping[str, bytes],
) -> NewCheckpoint:
    """Return the edited checkpoint with its codes.

    Args:
        plain: producers of edited tensors that are stored in a floating-point type.
        new: tensors that the base lacks.
        edits: of the quantised weights.
        base: with its values decoded.
        config_text: of the new checkpoint, which says as the base's does how it is quantised.
        extra: further files.
    """
    codes = {name: made for edit in edits.values() for name, made in edit.producers().items()}
    return NewCheckpoint(base.as_stored, {**plain, **codes}, new, config_text, extra)


def coded_edits(
    planned: PlannedModel,
    base: Checkpoint,
    folds: Callable[[str], WeightFold | None],
    rounding: Rounding,
) -> dict[str, CodedEdit]:
    """Return the quantised weights that a plan edits, by name.

    Args:
        planned: what becomes of the base.
        base: with its values decoded.
        folds: what happens to a weight, by its name.
        rounding: of the codes.

    Raises:
        UsageError: one of them cannot be written back as codes.
    """
    found = {}
    for name, tensor in planned.tensors.items():
        if (coded := base.coded.get(name)) is None:
            continue
        if tensor.shape != coded.shape:
            raise not_as_codes(name)
        found[name] = CodedEdit(coded, tensor, folds(name), rounding)
    return found


def not_as_codes(name: str) -> UsageError:
    """Return what it means that a plan gives a tensor another shape than the quantised base."""
    return UsageError(
        f"{name} gets another shape, and the quantised base is written back as it is laid out",
        why="codes and scales belong to blocks of the shape that they were made for",
        fix="write the checkpoint with --dequantize, or allow relocate, not widen",
    )


def refuse_undone(edits: Mapping[str, CodedEdit]) -> None:
    """Raise when rounding took back a part of the edit that nobody would overlook.

    Raises:
        InexactPlan: naming the tensor that lost most.
    """
    for name, edit in sorted(edits.items(), key=lambda item: item[1].measured().change):
        measure = edit.measure
        if abs(1 - measure.change) <= LOSS and (measure.leak or 0.0) <= LOSS:
            continue
        leak = measure.leak
        back = "" if leak is None else f", and {leak:.0%} of what it removes is back"
        raise InexactPlan(
            f"rounding to {edit.coded.format} leaves {measure.change:.0%} of the edit of {name}"
            f"{back}",
            why="its steps are coarser than the change of a single value",
            fix="use --rounding feedback, or write it with --dequantize; or add allow = "
            '["approximate"] to take it as it is',
        )


@dataclass(frozen=True, slots=True)
class Cost:
    """What rounding does beside an edit, as far as samples tell (see ``outputs.gguf.choice``)."""

    noise: float
    """Σ error² over Σ value², the root of it."""
    lost: float
    """ν = Σ error² / Σ change²: what may be lost of the edit's KL."""


def costs(edits: Mapping[str, CodedEdit]) -> tuple[Cost, Cost]:
    """Return what some edits cost as codes, and in a floating-point type.

    Args:
        edits: at least one.
    """
    every = max(1, len(edits) // _SAMPLES)
    chosen = list(edits.values())[every // 2 :: every]
    sums = torch.stack([_sampled(edit) for edit in chosen]).sum(dim=0).tolist()
    change, norm, codes, floats = sums
    return tuple(  # type: ignore[return-value]
        Cost((noise / norm) ** 0.5 if norm else 0.0, noise / change if change else 0.0)
        for noise in (codes, floats)
    )


def _sampled(edit: CodedEdit) -> Tensor:
    """Return Σ change², Σ value², Σ error² as codes and Σ error² in floating point of some rows."""
    tile = next(iter(edit.planned.tiles()))
    exact = tile.reshape(-1, tile.shape[-1])
    base = edit.coded.values(0, exact.shape[0])
    feedback = None
    guard = guarded(edit.fold) if edit.fold is not None and edit.rounding == "feedback" else None
    if guard is not None:
        rows = guard.rows if guard.axis == 1 else guard.rows[:, : exact.shape[0]]
        feedback = Feedback(rows, guard.axis)
    noise = exact.new_zeros(())

    def measured(start: int, exact: Tensor, errors: Tensor) -> None:
        noise.add_(errors.square().sum())

    for _ in Recoded(edit.coded, lambda: iter([exact])).codes(lambda start: feedback, measured):
        pass
    dtype = torch_dtype(edit.coded.dtype, where=edit.coded.name)
    floats = to_storage(exact, dtype, edit.coded.name).to(torch.float64) - exact
    change = (exact - base).square().sum()
    return torch.stack([change, exact.square().sum(), noise, floats.square().sum()])


def dequantised(
    produced: Mapping[str, Producer],
    widened: Mapping[str, NewTensor],
    new: Mapping[str, NewTensor],
    base: Checkpoint,
    config_text: str,
    extra: Mapping[str, bytes],
) -> NewCheckpoint:
    """Return the edited checkpoint with every weight in a floating-point type.

    Args:
        produced: producers of the edited tensors that keep their shape.
        widened: edited tensors of another shape.
        new: tensors that the base lacks.
        base: with its values decoded.
        config_text: of the new checkpoint, which says nothing of codes.
        extra: further files.
    """
    stored, reshaped = base.as_stored, dict(widened)
    for name, coded in base.coded.items():
        made = reshaped.pop(name, None) or NewTensor(
            coded.dtype, coded.shape, produced.get(name) or partial(_decoded, coded)
        )
        reshaped[coded.codes.name] = replace(made, name=name)
    kept = base.tensors.keys() | reshaped.keys()
    side = tuple(name for name in stored.side_files if name not in BESIDE)
    return NewCheckpoint(
        replace(stored, side_files=side),
        {name: made for name, made in produced.items() if name not in base.coded},
        new,
        config_text,
        extra,
        reshaped,
        stored.tensors.keys() - kept,
    )


def _decoded(coded: Coded) -> Iterator[Tensor]:
    """Yield the values of a weight, rounded to what it is dequantised to."""
    dtype, first = torch_dtype(coded.dtype, where=coded.name), coded.shape[0]
    table = coded.scales.read()
    height = coded.matrix[0] // first
    each = max(1, _VALUES // (height * coded.shape[-1]))
    for start in range(0, first, each):
        stop = min(first, start + each)
        values = coded.values(start * height, stop * height, table)
        yield to_storage(values, dtype, coded.name).reshape(stop - start, *coded.shape[1:])
