"""The checkpoint output: execute a plan on the bytes of a checkpoint."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

from bake.artifact.artifact import Artifact
from bake.artifact.base_digests import BaseDigests
from bake.artifact.record import RECORD, new_record, record_text
from bake.checkpoints import (
    DELETE,
    Checkpoint,
    NewCheckpoint,
    NewTensor,
    Producer,
    WrittenFiles,
    patch_config,
    write_checkpoint,
)
from bake.checkpoints.dtypes import torch_dtype
from bake.checkpoints.planned import PlannedModel, PlannedTensor
from bake.checkpoints.writer import Target
from bake.edit_store import edit_files
from bake.fold import ReadRows, WeightFold, fold_bias, fold_weight, padded
from bake.outputs.export import CarrierRun, CarrierWriter, Export
from bake.outputs.functionals import feedback_of
from bake.outputs.shared import SharedFactors
from bake.plan import BiasUpdate, Plan, TensorUpdate
from bake.plan.record import plan_record
from bake.rounding import Feedback, Rounding, to_storage
from bake.tiles import row_count


def prepare_checkpoint(export: Export) -> CarrierWriter:
    """Return what writes the edited checkpoint."""
    return partial(_write, export)


def _write(export: Export, run: CarrierRun) -> Artifact:
    written = write_edited(export, run, run.place)
    sizes = written.bytes_written, written.bytes_edited
    return Artifact("checkpoint", run.place.final, written.files, *sizes)


def write_edited(export: Export, run: CarrierRun, target: Target) -> WrittenFiles:
    """Write the edited checkpoint into a folder.

    The factors that adapters of this plan need are taken from the tiles that pass here.

    Raises:
        InputError: an edited value does not fit the storage dtype.
    """
    plan, base = export.plan, export.checkpoint
    digests = BaseDigests(base)
    planned = planned_model(plan, base, run.factors, digests)
    rounding = _feedbacks(plan, export.rounding or "nearest")
    replace, reshaped, new = stored_tensors(planned, base, rounding)

    def closing(files: Mapping[str, str]) -> Mapping[str, bytes]:
        before, made = digests.record((*replace, *reshaped)), plan_record(plan)
        record = new_record(run.record, "checkpoint", made, files=files, base_tensors=before)
        return {RECORD: record_text(record).encode()}

    extra = edit_files(plan.reference, plan.edits)
    made = NewCheckpoint(base, replace, new, planned.config_text, extra, reshaped)
    return write_checkpoint(made, target, closing=closing, progress=run.progress)


def planned_model(
    plan: Plan,
    checkpoint: Checkpoint,
    shared: SharedFactors | None = None,
    digests: BaseDigests | None = None,
) -> PlannedModel:
    """Return what a plan makes of a checkpoint, in float64 and not rounded.

    Args:
        plan: made for this checkpoint.
        checkpoint: the base.
        shared: takes the factors that adapters need from the tiles that pass.
        digests: takes the sha256 of every replaced tensor from the bytes that pass.
    """
    tensors: dict[str, PlannedTensor] = {}
    for update in plan.tensors:
        dtype = checkpoint.tensors[update.source].dtype
        tiles = _weight_tiles(update, checkpoint, shared, digests)
        tensors[update.name] = PlannedTensor(update.name, dtype, tuple(update.shape), tiles)
    for bias in plan.biases:
        dtype = plan.layout.dtype if bias.create else checkpoint.tensors[bias.name].dtype
        tiles = _bias_tiles(bias, plan.layout.shapes, checkpoint, digests)
        tensors[bias.name] = PlannedTensor(bias.name, dtype, bias.shape, tiles)
    changes = {c.key: DELETE if c.new is None else c.new for c in plan.config}
    return PlannedModel(plan.digest, tensors, patch_config(checkpoint.config_text, changes))


Feedbacks = Mapping[str, Callable[[], Feedback | None]]
"""Begins the error feedback of a weight, by its name; None where it is rounded to nearest."""


def _feedbacks(plan: Plan, rounding: Rounding) -> Feedbacks:
    """Return how every weight is rounded; norms and biases are rounded to nearest."""
    weights = (update for update in plan.tensors if update.replacement is None)
    return {update.name: partial(feedback_of, _fold_of(update), rounding) for update in weights}


def stored_tensors(
    planned: PlannedModel, checkpoint: Checkpoint, feedbacks: Feedbacks = MappingProxyType({})
) -> tuple[dict[str, Producer], dict[str, NewTensor], dict[str, NewTensor]]:
    """Return what is made of a base's tensors, each rounded.

    Producers of those that keep their shape, those that get another one, and those that are new.
    """
    replace: dict[str, Producer] = {}
    reshaped: dict[str, NewTensor] = {}
    new: dict[str, NewTensor] = {}
    for name, tensor in planned.tensors.items():
        produce = partial(_rounded, tensor, feedbacks.get(name))
        if name not in checkpoint.tensors:
            new[name] = NewTensor(tensor.dtype, tensor.shape, produce)
        elif tensor.shape == tuple(checkpoint.tensors[name].shape):
            replace[name] = produce
        else:
            reshaped[name] = NewTensor(tensor.dtype, tensor.shape, produce)
    return replace, reshaped, new


def _rounded(
    tensor: PlannedTensor, begin: Callable[[], Feedback | None] | None
) -> Iterator[Tensor]:
    """Yield the tiles of a tensor in its storage type."""
    dtype = torch_dtype(tensor.dtype, where=tensor.name)
    rounded, start = to_storage, 0
    for tile in tensor.tiles():
        if begin is not None and start % tensor.shape[-2] == 0:
            # Each matrix of a stack is rounded for itself.
            feedback = begin()
            rounded = to_storage if feedback is None else feedback.to_storage
        start += row_count(tile.shape)
        yield rounded(tile, dtype, tensor.name)


def _fold_of(update: TensorUpdate) -> WeightFold:
    rows, columns = update.shape[-2:]
    return WeightFold(
        shape=(rows, columns),
        output_axis=update.output_axis,
        outputs=tuple((part.rows, part.map) for part in update.outputs),
        updates=update.updates,
        input=update.input,
        table=update.is_table,
        added=update.added,
    )


def _weight_tiles(
    update: TensorUpdate,
    checkpoint: Checkpoint,
    shared: SharedFactors | None,
    digests: BaseDigests | None,
) -> Producer:
    def read(start: int, stop: int) -> Tensor:
        return checkpoint.read_rows(update.source, start, stop)

    def produce() -> Iterator[Tensor]:
        if update.replacement is not None:
            if digests is not None and not update.create:
                digests.add(update.name)
            yield update.replacement
            return
        reader = read if digests is None else digests.watched(update.source, read)
        reader = reader if shared is None else shared.watched(update, reader)
        own, fold = checkpoint.tensors[update.source].shape[-2:], _fold_of(update)
        places = _places(update.placed, update.output_axis)
        for rows in _each_matrix(reader, update.shape):
            yield from fold_weight(padded(rows, own, fold.shape, places), fold)

    return produce


def _each_matrix(read: ReadRows, shape: Sequence[int]) -> Iterator[ReadRows]:
    """Yield a reader of every matrix that a tensor stacks; of the tensor itself if it is one."""

    def rows(first: int, start: int, stop: int) -> Tensor:
        return read(first + start, first + stop)

    for index in range(prod(shape[:-2])):
        yield partial(rows, index * shape[-2])


def _places(placed: Sequence[int] | None, axis: int) -> tuple[Sequence[int] | None, ...]:
    """Return where the base's rows and columns are in a wider matrix."""
    return (placed, None) if axis == 0 else (None, placed)


def _bias_tiles(
    update: BiasUpdate,
    shapes: Mapping[str, tuple[int, ...]],
    checkpoint: Checkpoint,
    digests: BaseDigests | None,
) -> Producer:
    def produce() -> Iterator[Tensor]:
        biases = torch.zeros(update.experts or 1, update.size, dtype=torch.float64)
        if not update.create:
            own = checkpoint.read(update.name)
            kept = range(own.shape[-1]) if update.placed is None else update.placed
            biases[:, torch.tensor(kept)] = own.to(torch.float64)
        if digests is not None and not update.create:
            digests.add(update.name)
        shape = (len(biases), 1, 1) if update.weight is None else shapes[update.weight]
        fold = WeightFold(
            shape=(shape[-2], shape[-1]),
            output_axis=update.output_axis,
            outputs=tuple((part.rows, part.map) for part in update.outputs),
            updates=update.updates,
        )

        def read(start: int, stop: int) -> Tensor:
            assert update.weight is not None
            return checkpoint.read_rows(update.weight, start, stop)

        of = (shape if update.weight is None else checkpoint.tensors[update.weight].shape)[-2:]
        places = _places(update.placed, update.output_axis)
        for bias, own_rows in zip(biases, _each_matrix(read, shape), strict=True):
            rows = padded(own_rows, of, fold.shape, places)
            made = fold_bias(bias, fold, read=rows, shift=update.shift, addend=update.addend)
            yield made if update.experts is None else made.unsqueeze(0)

    return produce
