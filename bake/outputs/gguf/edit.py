"""The GGUF output: execute a plan on an existing GGUF file of the base.

Edited tensors are decoded, folded in float64 and encoded again in their own type. Everything else
is copied byte for byte: the order of tensors, their bytes, every metadata key. Bake adds two keys
of its own, new biases (in float32, as llama.cpp's converter stores them) and a head that was tied.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bake.artifact.artifact import Artifact
from bake.checkpoints.gguf.codec import FEEDBACK, FLOATS, check_encodable, decode, encode
from bake.checkpoints.gguf.file import Gguf
from bake.checkpoints.gguf.ggml import Ggml, find_ggml
from bake.checkpoints.gguf.types import BY_NAME, GgmlType, type_named
from bake.errors import InexactPlan
from bake.families.gguf import GgufPlace, gguf_places
from bake.fold import WeightFold, fold_bias
from bake.outputs.export import CarrierRun, CarrierWriter, Export
from bake.outputs.gguf.fold import bias_fold, guarded, in_file_order, weight_fold
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
    places = gguf_places(plan.layout)
    check_loadable(plan, model)
    check_tensors(plan, base, model, places)
    check_norms(plan, base, model, places)
    edited = [u.source for u in plan.tensors if u.replacement is None]
    check_corners(edited, base, model, places)
    if len(model.parts) == 1:
        modelfile(model.path.name)  # raises for a name that a Modelfile cannot hold
    new = _new_tensors(plan, model, places, export.edited_type, export.rounding)
    return partial(_write, export, model, new)


def _write(export: Export, model: Gguf, new: Mapping[str, NewBytes], run: CarrierRun) -> Artifact:
    folder = run.place.folder
    files = write_parts(model, new, export.plan, folder, run.progress)
    if str(Exactness.APPROXIMATE) not in export.allow:
        _refuse_undone(new)
    write_small(model, new, export.plan, folder, files, run.record)
    fresh = sum(tensor.nbytes for tensor in new.values())
    size = sum((folder / name).stat().st_size for name in files)
    return Artifact("gguf", run.place.final, dict(sorted(files.items())), size, fresh)


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
            fix="use --rounding feedback, or --edited-type Q8_0, or a GGUF in F16 or BF16; or "
            'add allow = ["approximate"] to take it as it is',
        )


def _new_tensors(
    plan: Plan,
    model: Gguf,
    places: Mapping[str, GgufPlace],
    edited_type: str | None,
    rounding: Rounding,
) -> dict[str, NewBytes]:
    """Return every tensor that is written anew, by its name in the file."""
    chosen = None if edited_type is None else type_named(edited_type)
    ggml = find_ggml()
    found: dict[str, NewBytes] = {}
    stacks: defaultdict[tuple[str, str], dict[int | None, WeightFold]] = defaultdict(dict)
    for update in plan.tensors:
        place = places[update.name]
        if update.replacement is not None:
            value = partial(torch.add, update.replacement, place.addend)
            found[place.name] = _vector(place.name, model, value)
            continue
        folds = stacks[place.name, _source(update, place, places, model)]
        if not update.is_copy():
            folds[place.expert] = weight_fold(update, place)
    for (name, source), folds in stacks.items():
        found[name] = _matrix(name, source, folds, model, chosen, rounding, ggml)
    for bias in plan.biases:
        # A zero companion is for a flag of config.json; a GGUF file has no such flag.
        if not bias.is_zero():
            name = places[bias.name].name
            found[name] = _vector(name, model, _bias_value(bias, model, places), bias.size)
    return found


def _source(
    update: TensorUpdate, place: GgufPlace, places: Mapping[str, GgufPlace], model: Gguf
) -> str:
    """Return the tensor of the base file; some files store a tied head a second time."""
    return place.name if place.name in model.tensors else places[update.source].name


def _matrix(
    name: str,
    source: str,
    folds: dict[int | None, WeightFold],
    model: Gguf,
    chosen: GgmlType | None,
    rounding: Rounding,
    ggml: Ggml | None,
) -> NewBytes:
    base = model.tensors[source]
    kind = base.kind
    if folds:
        if chosen is not None and kind.name not in FLOATS:
            kind = chosen
        recoded = kind == base.kind and kind.name in FEEDBACK and rounding == "feedback"
        if not recoded or any(guarded(fold) is None for fold in folds.values()):
            check_encodable(kind, ggml, name)
        kind.row_bytes(base.shape[-1], where=name)
    edit = MatrixEdit(name, source, kind, base.shape, folds)

    def produce() -> Iterator[Tensor]:
        return edit.produce(model, rounding, ggml)

    before = base.kind.name if name in model.tensors else None
    return NewBytes(name, kind, base.shape, produce, edit.measure if folds else None, before)


def _vector(
    name: str, model: Gguf, value: Callable[[], Tensor], size: int | None = None
) -> NewBytes:
    """Return a norm or a bias, in the type that the file has it in, or in float32."""
    base = model.tensors.get(name)
    kind = BY_NAME["F32"] if base is None else base.kind
    shape = (size,) if base is None and size is not None else model.tensors[name].shape

    def produce() -> Iterator[Tensor]:
        yield encode(value().unsqueeze(0), kind, name)

    return NewBytes(name, kind, shape, produce, None, None if base is None else kind.name)


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
