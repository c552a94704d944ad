"""The GGUF output: execute a plan on an existing GGUF file of the base.

Edited tensors are decoded, folded in float64 and encoded again in their own type. Everything else
is copied byte for byte: the order of tensors, their bytes, every metadata key. Bake adds two keys
of its own, new biases (in float32, as llama.cpp's converter stores them) and a head that was tied.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from bake.artifact.artifact import Artifact
from bake.checkpoints import Checkpoint
from bake.checkpoints.gguf.codec import FEEDBACK, FLOATS, check_encodable, decode, encode
from bake.checkpoints.gguf.file import Gguf, open_gguf
from bake.checkpoints.gguf.ggml import Ggml, find_ggml
from bake.checkpoints.gguf.types import BY_NAME, GgmlType, type_named
from bake.errors import InexactPlan, UsageError
from bake.families.gguf import GgufPlace, gguf_places
from bake.fold import WeightFold, fold_bias
from bake.outputs.folder import check_apart, new_folder, sync
from bake.outputs.gguf.fold import bias_fold, guarded, in_file_order, weight_fold
from bake.outputs.gguf.match import check_corners, check_loadable, check_norms, check_tensors
from bake.outputs.gguf.modelfile import modelfile
from bake.outputs.gguf.tensor import MatrixEdit
from bake.outputs.gguf.write import NewBytes, write_parts, write_small
from bake.plan import BiasUpdate, Exactness, Plan, TensorUpdate
from bake.plan.carriers import refuse
from bake.progress import Progress
from bake.rounding import Rounding

_LOSS = 0.1  # of an edit; what rounding may take of it unless the user allows more


def export_gguf(
    plan: Plan,
    base_checkpoint: Checkpoint,
    gguf: Path,
    out: Path,
    *,
    record: Mapping[str, Any],
    allow: frozenset[str] = frozenset(),
    edited_type: str | None = None,
    rounding: Rounding = "feedback",
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Write the edited GGUF file, or files, to the folder ``out``, under the names of the base.

    Beside it lie a Modelfile for Ollama, the edits and the record ``bake.json``, which has the leak
    and the rounding error of every edited tensor.

    Args:
        plan: made for ``base_checkpoint``.
        base_checkpoint: the checkpoint that the GGUF was converted from; of it only norms and
            corners of the edited matrices are read, to see that it is.
        gguf: the base in GGUF; the first file of a split model.
        out: a folder that does not exist, unless ``force``.
        record: what ``bake.json`` keeps besides the plan.
        allow: the exactness classes below EXACT that the recipe accepts.
        edited_type: the type for edited matrices that are stored in blocks; their own when None.
        rounding: ``feedback``, which makes the edit survive the rounding where the type allows and
            holds one matrix in memory, or ``nearest``, which under five bits undoes most edits.
        force: replace an artifact of bake at ``out``.
        progress: called with bytes done and bytes in all.

    Raises:
        InexactPlan: a finding is not exact and not allowed, llama.cpp has no slot for a tensor that
            the plan creates, or rounding undoes the edit and ``approximate`` is not allowed.
        CheckpointError: the GGUF is malformed, or of another model.
        UsageError: a type that cannot be written, or ``out`` is in the way.
        InputError: a value does not fit its type, or the disk refuses; nothing is left behind.
    """
    model, new = check_gguf(
        plan, base_checkpoint, gguf, allow=allow, edited_type=edited_type, rounding=rounding
    )
    check_apart(out, base_checkpoint.path, gguf)
    with new_folder(out, force=force) as folder:
        files = write_parts(model, new, plan, folder, progress)
        if str(Exactness.APPROXIMATE) not in allow:
            _refuse_undone(new)
        write_small(model, new, plan, folder, files, record)
        sync(folder)
    fresh = sum(tensor.nbytes for tensor in new.values())
    size = sum((out / name).stat().st_size for name in files)
    return Artifact("gguf", out, dict(sorted(files.items())), size, fresh)


def check_gguf(
    plan: Plan,
    base_checkpoint: Checkpoint,
    gguf: Path,
    *,
    allow: frozenset[str] = frozenset(),
    edited_type: str | None = None,
    rounding: Rounding = "feedback",
) -> tuple[Gguf, dict[str, NewBytes]]:
    """Return the opened file, and every tensor that is to be written anew, by its name in it.

    Raises:
        InexactPlan, CheckpointError, UsageError: as ``export_gguf``, before anything is written.
    """
    refuse(replace(plan, runtimes=()), "checkpoint", allow)
    if rounding not in get_args(Rounding):
        raise UsageError(f"rounding is {rounding!r}, and has to be nearest or feedback")
    model = open_gguf(gguf)
    places = gguf_places(plan.layout)
    check_loadable(plan, model)
    check_tensors(plan, base_checkpoint, model, places)
    check_norms(plan, base_checkpoint, model, places)
    edited = [u.source for u in plan.tensors if u.replacement is None]
    check_corners(edited, base_checkpoint, model, places)
    if len(model.parts) == 1:
        modelfile(model.path.name)  # raises for a name that a Modelfile cannot hold
    return model, _new_tensors(plan, model, places, edited_type, rounding)


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
