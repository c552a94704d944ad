"""The checkpoint output: execute a plan on the bytes of a checkpoint."""

from collections.abc import Iterator, Mapping
from functools import partial

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
from bake.checkpoints.writer import Target
from bake.edit_store import edit_files
from bake.fold import WeightFold, fold_bias, fold_weight
from bake.outputs.export import CarrierRun, CarrierWriter, Export
from bake.outputs.functionals import feedback_of
from bake.outputs.shared import SharedFactors
from bake.plan import BiasUpdate, Plan, TensorUpdate
from bake.plan.record import plan_record
from bake.rounding import Rounding, to_storage


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
    rounding = export.rounding or "nearest"
    replace, new = planned_tensors(plan, base, run.factors, digests, rounding)

    def closing(files: Mapping[str, str]) -> Mapping[str, bytes]:
        before, made = digests.record(replace), plan_record(plan)
        record = new_record(run.record, "checkpoint", made, files=files, base_tensors=before)
        return {RECORD: record_text(record).encode()}

    extra = edit_files(plan.reference, plan.edits)
    made = NewCheckpoint(base, replace, new, edited_config(plan, base), extra)
    return write_checkpoint(made, target, closing=closing, progress=run.progress)


def edited_config(plan: Plan, checkpoint: Checkpoint) -> str:
    """Return the text of the base's ``config.json`` with the plan's changes."""
    changes = {c.key: DELETE if c.new is None else c.new for c in plan.config}
    return patch_config(checkpoint.config_text, changes)


def planned_tensors(
    plan: Plan,
    checkpoint: Checkpoint,
    shared: SharedFactors | None = None,
    digests: BaseDigests | None = None,
    rounding: Rounding = "nearest",
) -> tuple[dict[str, Producer], dict[str, NewTensor]]:
    """Return producers of the tensors that a plan replaces, and those that it adds, by name.

    Args:
        plan: made for this checkpoint.
        checkpoint: the base.
        shared: takes the factors that adapters need from the tiles that pass.
        digests: takes the sha256 of every replaced tensor from the bytes that pass.
        rounding: of weights; norms and biases are rounded to nearest.
    """
    replace: dict[str, Producer] = {}
    new: dict[str, NewTensor] = {}
    for update in plan.tensors:
        producer = _weight_producer(update, checkpoint, shared, digests, rounding)
        if update.create:
            dtype = checkpoint.tensors[update.source].dtype
            new[update.name] = NewTensor(dtype, update.shape, producer)
        else:
            replace[update.name] = producer
    for bias in plan.biases:
        producer = _bias_producer(bias, plan, checkpoint, digests)
        if bias.create:
            new[bias.name] = NewTensor(plan.layout.dtype, (bias.size,), producer)
        else:
            replace[bias.name] = producer
    return replace, new


def _fold_of(update: TensorUpdate) -> WeightFold:
    rows, columns = update.shape
    return WeightFold(
        shape=(rows, columns),
        output_axis=update.output_axis,
        outputs=tuple((part.rows, part.map) for part in update.outputs),
        updates=update.updates,
        input=update.input,
        table=update.is_table,
    )


def _weight_producer(
    update: TensorUpdate,
    checkpoint: Checkpoint,
    shared: SharedFactors | None,
    digests: BaseDigests | None,
    rounding: Rounding,
) -> Producer:
    dtype = checkpoint.tensors[update.source].torch_dtype

    def read(start: int, stop: int) -> Tensor:
        return checkpoint.read_rows(update.source, start, stop)

    def produce() -> Iterator[Tensor]:
        if update.replacement is not None:
            if digests is not None and not update.create:
                digests.add(update.name)
            yield to_storage(update.replacement, dtype, update.name)
            return
        reader = read if digests is None else digests.watched(update.source, read)
        reader = reader if shared is None else shared.watched(update, reader)
        fold = _fold_of(update)
        feedback = feedback_of(fold, rounding)
        round_ = to_storage if feedback is None else feedback.to_storage
        for tile in fold_weight(reader, fold):
            yield round_(tile, dtype, update.name)

    return produce


def _bias_producer(
    update: BiasUpdate, plan: Plan, checkpoint: Checkpoint, digests: BaseDigests | None
) -> Producer:
    info = checkpoint.tensors.get(update.name)
    dtype = checkpoint.tensors[plan.layout.embed].torch_dtype if info is None else info.torch_dtype

    def produce() -> Iterator[Tensor]:
        zeros = torch.zeros(update.size, dtype=torch.float64)
        bias = zeros if update.create else checkpoint.read(update.name)
        if digests is not None and not update.create:
            digests.add(update.name)
        shape = (1, 1) if update.weight is None else checkpoint.tensors[update.weight].shape
        fold = WeightFold(
            shape=(shape[0], shape[1]),
            output_axis=update.output_axis,
            outputs=tuple((part.rows, part.map) for part in update.outputs),
            updates=update.updates,
        )

        def read(start: int, stop: int) -> Tensor:
            assert update.weight is not None
            return checkpoint.read_rows(update.weight, start, stop)

        value = fold_bias(bias, fold, read=read, shift=update.shift, addend=update.addend)
        yield to_storage(value, dtype, update.name)

    return produce
