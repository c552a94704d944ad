"""The checkpoint output: execute a plan on the bytes of a checkpoint."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
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
from bake.checkpoints.quantised.view import left_alone
from bake.checkpoints.writer import Target
from bake.edit_store import edit_files
from bake.fold import ReadRows, WeightFold, fold_bias, fold_weight, padded
from bake.outputs.coded import (
    CodedEdit,
    Cost,
    coded_edits,
    costs,
    dequantised,
    not_as_codes,
    refuse_undone,
    written_back,
)
from bake.outputs.export import CarrierRun, CarrierWriter, Export
from bake.outputs.functionals import feedback_of
from bake.outputs.shared import SharedFactors
from bake.plan import BiasUpdate, Exactness, Plan, TensorUpdate
from bake.plan.record import plan_record
from bake.rounding import Feedback, Rounding, to_storage
from bake.tiles import row_count


def prepare_checkpoint(export: Export) -> CarrierWriter:
    """Return what writes the edited checkpoint.

    Raises:
        UsageError: a quantised base cannot hold the plan as codes.
    """
    _made(export, planned_model(export.plan, export.checkpoint))  # raises where it cannot
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
    made, edits = _made(export, planned)

    def closing(files: Mapping[str, str]) -> Mapping[str, bytes]:
        if str(Exactness.APPROXIMATE) not in export.allow:
            refuse_undone(edits)
        before = digests.record([name for name in planned.tensors if name in base.tensors])
        record = new_record(
            run.record,
            "checkpoint",
            plan_record(plan),
            files=files,
            base_tensors=before,
            codes=[edit.record() for edit in edits.values()],
        )
        return {RECORD: record_text(record).encode()}

    return write_checkpoint(made, target, closing=closing, progress=run.progress)


def coded_costs(export: Export) -> tuple[Cost, Cost]:
    """Return what the edits of a quantised base cost as codes, and in a floating-point type.

    Some rows of a few edited weights are read. At least one is edited.
    """
    planned = planned_model(export.plan, export.checkpoint)
    return costs(_coded_edits(export, planned))


def _coded_edits(export: Export, planned: PlannedModel) -> dict[str, CodedEdit]:
    folds = {u.name: _fold_of(u) for u in export.plan.tensors if u.replacement is None}
    rounding = export.rounding or "feedback"
    return coded_edits(planned, export.checkpoint, folds.get, rounding)


def _made(export: Export, planned: PlannedModel) -> tuple[NewCheckpoint, Mapping[str, CodedEdit]]:
    """Return the checkpoint to write, and what of it is written back as codes."""
    plan, base = export.plan, export.checkpoint
    extra = edit_files(plan.reference, plan.edits)
    edits: Mapping[str, CodedEdit] = {}
    if base.coded and not export.dequantize:
        edits = _coded_edits(export, planned)
    plain = replace(planned, tensors={n: t for n, t in planned.tensors.items() if n not in edits})
    rounding = _feedbacks(plan, export.rounding or "nearest")
    kept, reshaped, new = stored_tensors(plain, base, rounding)
    text = planned.config_text
    if export.dequantize:
        return dequantised(kept, reshaped, new, base, text, extra), edits
    if base.coded:
        if reshaped:
            raise not_as_codes(min(reshaped))
        changes = {**_changes(plan), **left_alone(base.as_stored.config, new)}
        text = patch_config(base.as_stored.config_text, changes)
        return written_back(kept, new, edits, base, text, extra), edits
    return NewCheckpoint(base, kept, new, text, extra, reshaped), edits


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
    text = patch_config(checkpoint.config_text, _changes(plan))
    return PlannedModel(plan.digest, tensors, text)


def _changes(plan: Plan) -> dict[str, object]:
    return {c.key: DELETE if c.new is None else c.new for c in plan.config}


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
