"""The GGUF output: execute a plan on an existing GGUF file of the base.

Edited tensors are decoded, folded in float64 and encoded again, in their own type or in a wider one
(``choice``). Everything else is copied byte for byte: the order of tensors, their bytes, every
metadata key. Bake adds two keys of its own, new biases (in float32, as llama.cpp's converter stores
them) and a head that was tied.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from msgspec import structs
from torch import Tensor

from bake.artifact.artifact import Artifact
from bake.artifact.schema import Provenance, StorageRecord
from bake.checkpoints.gguf.codec import FLOATS, decode, encode
from bake.checkpoints.gguf.file import Gguf
from bake.checkpoints.gguf.ggml import Ggml, find_ggml
from bake.checkpoints.gguf.storage import KEEP, storage_types
from bake.checkpoints.gguf.types import BY_NAME
from bake.checkpoints.planned import PlannedTensor
from bake.errors import InexactPlan
from bake.families.gguf import GgufPlace, gguf_places
from bake.fold import WeightFold, fold_bias
from bake.outputs.export import CarrierRun, CarrierWriter, Export
from bake.outputs.gguf.choice import (
    CANDIDATES,
    Choice,
    Part,
    choice_of,
    chosen,
    measured,
)
from bake.outputs.gguf.fold import bias_fold, in_file_order, weight_fold
from bake.outputs.gguf.match import check_corners, check_loadable, check_norms, check_tensors
from bake.outputs.gguf.modelfile import modelfile
from bake.outputs.gguf.tensor import MatrixEdit
from bake.outputs.gguf.write import NewBytes, write_parts, write_small
from bake.plan import BiasUpdate, Exactness, Plan, TensorUpdate
from bake.plan.carriers import refuse
from bake.rounding import Rounding

_LOSS = 0.1  # of an edit; what rounding may take of it unless the user allows more


def prepare_gguf(export: Export) -> CarrierWriter:
    """Return what writes the edited GGUF file, or files, under the names of the base.

    Beside it lie a Modelfile for Ollama, the edits and the record ``bake.json``, which has the leak
    and the rounding error of every edited tensor. Of the base's checkpoint only norms and corners
    of the edited matrices are read, to see that the GGUF is one of it.

    Raises:
        InexactPlan: a finding is not exact and not allowed, llama.cpp has no slot for a tensor that
            the plan creates, or rounding undoes the edit and ``approximate`` is not allowed.
        CheckpointError: the GGUF is malformed, or of another model.
        UsageError: a type that cannot be written.
        InputError: a value does not fit its type.
    """
    plan, base, model = export.plan, export.checkpoint, export.model()
    assert model is not None
    refuse(replace(plan, runtimes=()), "checkpoint", export.allow)
    if plan.widened:
        raise InexactPlan(
            "a GGUF of the base cannot be widened",
            why="the edit gives every tensor of the stream another shape",
            fix="convert the edited checkpoint with --llama-cpp, or allow relocate, not widen",
        )
    places = gguf_places(plan.layout)
    check_loadable(plan, model)
    check_tensors(plan, base, model, places)
    check_norms(plan, base, model, places)
    edited = [u.source for u in plan.tensors if u.replacement is None]
    check_corners(edited, base, model, places)
    if len(model.parts) == 1:
        modelfile(model.path.name)  # raises for a name that a Modelfile cannot hold
    new, choice = new_tensors(export, model)
    return partial(_write, export, model, new, choice)


def storage_choices(export: Export) -> tuple[tuple[Choice, ...], Choice, int]:
    """Return every type for all edited tensors, the choice of the export, and the other bytes.

    Raises:
        InexactPlan: llama.cpp has no slot for a tensor that the plan creates.
        CheckpointError: the GGUF is malformed, or of another model.
        UsageError: there is no such type, or nothing here encodes it.
    """
    plan, model = export.plan, export.model()
    assert model is not None
    check_loadable(plan, model)
    check_tensors(plan, export.checkpoint, model, gguf_places(plan.layout))
    edits, parts = _trials(export, model, find_ggml())
    tried = ([part.trial(word) for part in parts] for word in (KEEP, *CANDIDATES))
    single = [
        choice_of(parts, [t for t in row if t is not None]) for row in tried if row and all(row)
    ]
    held = {edit.source for edit in edits if edit.folds and edit.kind.name not in FLOATS}
    rest = sum(info.nbytes for name, info in model.tensors.items() if name not in held)
    copied = [edit for edit in edits if not edit.folds and edit.name not in model.tensors]
    rest += sum(model.tensors[edit.source].nbytes for edit in copied)
    return tuple(single), chosen(parts, export.most_kl), rest


def _trials(
    export: Export, model: Gguf, ggml: Ggml | None
) -> tuple[tuple[MatrixEdit, ...], tuple[Part, ...]]:
    """Return the matrices that are written anew, in their own types, and what others come to."""
    asked = storage_types(export.gguf_type, "gguf_type")
    edits = _matrices(export.plan, model, gguf_places(export.plan.layout))
    return edits, measured(edits, model, asked, export.rounding or "feedback", ggml)


def _write(
    export: Export, model: Gguf, new: Mapping[str, NewBytes], choice: Choice, run: CarrierRun
) -> Artifact:
    folder = run.place.folder
    files = write_parts(model, new, export.plan, folder, run.progress)
    if str(Exactness.APPROXIMATE) not in export.allow:
        _refuse_undone(new)
    write_small(model, new, export.plan, folder, files, _settled(run.record, choice, export))
    fresh = sum(tensor.nbytes for tensor in new.values())
    size = sum((folder / name).stat().st_size for name in files)
    return Artifact("gguf", run.place.final, dict(sorted(files.items())), size, fresh)


def _settled(record: Provenance, choice: Choice, export: Export) -> Provenance:
    """Return the record with what was chosen, so that the same file can be made again."""
    if not choice.types:
        return record
    assert record.export is not None
    asked = storage_types(export.gguf_type, "gguf_type")
    told = export.storage or StorageRecord(
        asked={part: asked[part] for part in choice.types},
        lost=float(f"{choice.lost:.2g}"),
        limit=export.most_kl,
    )
    options = structs.replace(record.export, gguf_type=dict(choice.types), storage=told)
    return structs.replace(record, export=options)


def _refuse_undone(new: Mapping[str, NewBytes]) -> None:
    """Raise when rounding took back a part of the edit that nobody would overlook.

    In few bits a step is larger than what an edit of low rank changes of a value, so rounding to
    nearest mostly returns the old weights.

    Raises:
        InexactPlan: naming the tensor that lost most.
    """
    measured = [(t, t.measure) for t in new.values() if t.measure is not None]
    for tensor, measure in sorted(measured, key=lambda pair: pair[1].change):
        if abs(1 - measure.change) <= _LOSS and (measure.leak or 0.0) <= _LOSS:
            continue
        leak = (
            "" if measure.leak is None else f", and {measure.leak:.0%} of what it removes is back"
        )
        raise InexactPlan(
            f"rounding to {tensor.kind.name} leaves {measure.change:.0%} of the edit of "
            f"{tensor.name}{leak}",
            why="its steps are coarser than the change of a single value",
            fix="use --rounding feedback, or --gguf-type Q8_0, or a GGUF in F16 or BF16; or "
            'add allow = ["approximate"] to take it as it is',
        )


def new_tensors(export: Export, model: Gguf) -> tuple[dict[str, NewBytes], Choice]:
    """Return every tensor that is written anew, by its name in the file, and the types chosen.

    Raises:
        UsageError: there is no such type, or nothing here encodes it.
        CheckpointError: rows of a tensor are no whole blocks of a type.
    """
    plan, ggml, rounding = export.plan, find_ggml(), export.rounding or "feedback"
    places = gguf_places(plan.layout)
    edits, parts = _trials(export, model, ggml)
    choice = chosen(parts, export.most_kl)
    found: dict[str, NewBytes] = {}
    for update in plan.tensors:
        if update.replacement is not None:
            place = places[update.name]
            value = partial(torch.add, update.replacement, place.addend)
            found[place.name] = _vector(place.name, model, value)
    for edit in edits:
        found[edit.name] = new_matrix(replace(edit, kind=choice.kind(edit)), model, rounding, ggml)
    for bias in plan.biases:
        # A zero companion is for a flag of config.json; a GGUF file has no such flag.
        if not bias.is_zero():
            name = places[bias.name].name
            found[name] = _vector(name, model, _bias_value(bias, model, places), bias.size)
    return found, choice


def planned_gguf(export: Export, model: Gguf) -> dict[str, PlannedTensor]:
    """Return every tensor that is written anew as the plan means it, in float64 and not rounded.

    Raises:
        BakeError: as ``new_tensors``.
    """
    return {
        name: PlannedTensor(name, tensor.kind.name, tensor.shape, tensor.exact)
        for name, tensor in new_tensors(export, model)[0].items()
    }


def _matrices(plan: Plan, model: Gguf, places: Mapping[str, GgufPlace]) -> tuple[MatrixEdit, ...]:
    """Return the matrices that are written anew, in the types that their sources have."""
    stacks: defaultdict[tuple[str, str, str], dict[int | None, WeightFold]] = defaultdict(dict)
    for update in plan.tensors:
        if update.replacement is None:
            place = places[update.name]
            source, part = _source(update, place, places, model), _part(update, plan)
            folds = stacks[place.name, source, part]
            if not update.is_copy():
                folds[place.expert] = weight_fold(update, place)
    return tuple(
        MatrixEdit(
            name, source, model.tensors[source].kind, model.tensors[source].shape, folds, part
        )
        for (name, source, part), folds in stacks.items()
    )


def _part(update: TensorUpdate, plan: Plan) -> str:
    """Return which kind of tensor an update is of, one of ``storage.PARTS``."""
    layout = plan.layout
    if update.is_table:
        return "embed"
    if update.name == layout.unembed.weight:
        return "head"
    writing = any(update.name == linear.weight for b in layout.branches for linear in b.writes)
    return "writers" if writing else "readers"


def _source(
    update: TensorUpdate, place: GgufPlace, places: Mapping[str, GgufPlace], model: Gguf
) -> str:
    """Return the tensor of the base file; some files store a tied head a second time."""
    return place.name if place.name in model.tensors else places[update.source].name


def new_matrix(edit: MatrixEdit, model: Gguf, rounding: Rounding, ggml: Ggml | None) -> NewBytes:
    """Return what writes a matrix anew."""
    base = model.tensors.get(edit.name)
    return NewBytes(
        edit.name,
        edit.kind,
        edit.shape,
        partial(edit.produce, model, rounding, ggml),
        edit.measure if edit.folds else None,
        None if base is None else base.kind.name,
        partial(edit.exact, model),
    )


def _vector(
    name: str, model: Gguf, value: Callable[[], Tensor], size: int | None = None
) -> NewBytes:
    """Return a norm or a bias, in the type that the file has it in, or in float32."""
    base = model.tensors.get(name)
    kind = BY_NAME["F32"] if base is None else base.kind
    shape = (size,) if base is None and size is not None else model.tensors[name].shape

    def produce() -> Iterator[Tensor]:
        yield encode(value().unsqueeze(0), kind, name)

    def exact() -> Iterator[Tensor]:
        yield value()

    before = None if base is None else kind.name
    return NewBytes(name, kind, shape, produce, None, before, exact)


def _bias_value(
    bias: BiasUpdate, model: Gguf, places: Mapping[str, GgufPlace]
) -> Callable[[], Tensor]:
    """Return a function that computes the bias from the file's own weights."""
    place = places[bias.name]
    weight = None if bias.weight is None else places[bias.weight].name

    def read(start: int, stop: int) -> Tensor:
        assert weight is not None
        return decode(model.read_rows(weight, start, stop), model.tensors[weight].kind, weight)

    def value() -> Tensor:
        old = torch.zeros(bias.size, dtype=torch.float64)
        if not bias.create:
            old = decode(
                model.read_rows(place.name, 0, 1), model.tensors[place.name].kind, place.name
            )[0]
        rows, columns = (bias.size, 1) if weight is None else model.tensors[weight].shape
        fold = bias_fold(bias, place, (rows, columns))
        addend = None if bias.addend is None else in_file_order(bias.addend, place)
        return fold_bias(old, fold, read=read, shift=bias.shift, addend=addend)

    return value
