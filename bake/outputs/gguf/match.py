"""Whether a GGUF file holds the model that a plan was made for, and can hold what it creates.

A file of another model, or one that orders its rows in another way, would take an edit without a
word and compute something else. So the tensors have to be exactly those that the checkpoint stands
for, norms have to have the checkpoint's values, and of every matrix that is edited a corner has to
resemble the checkpoint's.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bake.checkpoints import Checkpoint
from bake.checkpoints.gguf.codec import decode
from bake.checkpoints.gguf.file import Gguf
from bake.errors import CheckpointError, InexactPlan
from bake.families import Layout, runtime_of
from bake.families.gguf import GgufPlace, gguf_names, unedited_names
from bake.plan import Plan

LLAMA_CPP = "llama.cpp"
_CORNER = (64, 256)  # rows and columns that are compared
_ALIKE = 0.5  # cosine; blocks of 1.5 bits keep 0.6, rows in another order have about 0
_NORM_ERROR = 2.0**-9  # float16's and bfloat16's own rounding of 1 + weight


def check_loadable(plan: Plan, gguf: Gguf) -> None:
    """Raise when llama.cpp would not load, or not apply, what the plan creates in this file.

    Raises:
        InexactPlan: the plan declares another architecture, or needs a tensor that llama.cpp's
            loader has no slot for.
        CheckpointError: the file is of another architecture than the checkpoint.
    """
    names = gguf_names(plan.layout)
    if gguf.arch != names.arch:
        if any(change.key == "architectures" for change in plan.config):
            raise InexactPlan(
                f"the plan declares the model as {plan.layout.family.name}, and "
                f"{gguf.path.name} is a GGUF of the architecture {gguf.arch}",
                why="that architecture has no slot for the biases of the edit",
                fix="bake the checkpoint, and convert it with --llama-cpp",
            )
        raise CheckpointError(
            f"is a GGUF of the architecture {gguf.arch!r}; {plan.layout.family.name} is "
            f"{names.arch!r} there",
            where=str(gguf.path),
        )
    runtime = runtime_of(plan.layout, LLAMA_CPP)
    if runtime is None:
        raise InexactPlan(
            f"the table {plan.layout.family.name!r} does not say what llama.cpp loads",
            fix='add a section [runtime."llama.cpp"] to it',
        )
    modules = _modules(plan.layout)
    for bias in plan.biases:
        if bias.create and not bias.is_zero() and modules.get(bias.name) not in runtime.biases:
            raise InexactPlan(
                f"llama.cpp has no slot for {bias.name} ({runtime.source})",
                why="it counts the tensors of a file and refuses one too many",
                fix="use an edit without a constant, or a llama.cpp control vector",
            )
    if plan.unties and not runtime.untied_head:
        raise InexactPlan(
            f"llama.cpp loads no output head of its own here ({runtime.source})",
            why="the edit changes the embedding, and the head would change with it",
            fix='edit the modules\' outputs (at = ["attn_out.*", "mlp_out.*"])',
        )


def _modules(layout: Layout) -> Mapping[str, str]:
    return {linear.bias.name: linear.module for linear in layout.linears}


def check_tensors(
    plan: Plan, checkpoint: Checkpoint, gguf: Gguf, places: Mapping[str, GgufPlace]
) -> None:
    """Raise unless the file holds the checkpoint's tensors, all of them and no others.

    Raises:
        CheckpointError: naming the first tensor that is missing, unknown or of another shape.
    """
    meant: dict[str, tuple[int, ...]] = {}
    experts = plan.layout.dims["experts"]
    for name, place in places.items():
        if name not in checkpoint.tensors:
            continue
        shape = checkpoint.tensors[name].shape
        shape = shape[::-1] if place.transposed else shape
        meant[place.name] = shape if place.expert is None else (experts, *shape)
    head = f"{gguf_names(plan.layout).unembed}.weight"
    for name, shape in meant.items():
        found = gguf.tensors.get(name)
        if found is None:
            raise CheckpointError(
                f"lacks {name}, which the checkpoint has",
                where=str(gguf.path),
                fix="convert the checkpoint with a current llama.cpp",
            )
        if found.shape != shape:
            raise CheckpointError(
                f"{name} has the shape {list(found.shape)} where the checkpoint has {list(shape)}",
                where=str(gguf.path),
            )
    for name in gguf.tensors:
        if name not in meant and name != head and name not in unedited_names(plan.layout):
            raise CheckpointError(
                f"holds {name}, which stands for no tensor of the checkpoint",
                where=str(gguf.path),
                why="a tensor that bake does not know could read or write the residual stream",
            )


def check_norms(
    plan: Plan, checkpoint: Checkpoint, gguf: Gguf, places: Mapping[str, GgufPlace]
) -> None:
    """Raise unless the norms of the first and the last block have the checkpoint's values.

    Raises:
        CheckpointError: the file was made from other weights.
    """
    layout = plan.layout
    ends = (b for b in layout.branches if b.layer in (0, layout.layers - 1))
    norms = [norm for branch in ends for norm in branch.norms]
    for norm in (*norms, layout.final_norm):
        if norm.weight is None:
            continue
        place = places[norm.weight]
        found = _values(gguf, place)
        meant = checkpoint.read(norm.weight).to(torch.float64) + place.addend
        if float((found - meant).abs().max()) > _NORM_ERROR * float(meant.abs().max()):
            raise CheckpointError(
                f"{place.name} differs from {norm.weight} of the checkpoint",
                where=str(gguf.path),
                why="the file was made from other weights than the plan",
                fix="name the checkpoint that the file was converted from as the base",
            )


def check_corners(
    names: Iterable[str],
    checkpoint: Checkpoint,
    gguf: Gguf,
    places: Mapping[str, GgufPlace],
) -> None:
    """Raise unless a corner of every matrix resembles that of the checkpoint.

    Raises:
        CheckpointError: the weights are others, or their rows are in another order.
    """
    for name in names:
        place = places[name]
        rows = min(_CORNER[0], gguf.tensors[place.name].shape[-2])
        raw = gguf.read_rows(place.name, 0, rows, expert=place.expert)
        found = decode(raw, gguf.tensors[place.name].kind, place.name)[:, : _CORNER[1]]
        meant = _corner(checkpoint, name, place, *found.shape)
        cosine = torch.nn.functional.cosine_similarity(found.flatten(), meant.flatten(), dim=0)
        if float(cosine) < _ALIKE:
            raise CheckpointError(
                f"{place.name} does not resemble {name} of the checkpoint (cosine {cosine:.2f})",
                where=str(gguf.path),
                why="the file was made from other weights, or by a converter that orders the rows "
                "in another way",
                fix="convert the checkpoint with a current llama.cpp",
            )


def _values(gguf: Gguf, place: GgufPlace) -> Tensor:
    return decode(gguf.read_rows(place.name, 0, 1), gguf.tensors[place.name].kind, place.name)[0]


def _corner(checkpoint: Checkpoint, name: str, place: GgufPlace, rows: int, columns: int) -> Tensor:
    """Return what the checkpoint has for the first rows and columns of a tensor of the file."""
    wanted = torch.tensor(range(rows) if place.rows is None else place.rows[:rows])
    if place.transposed:
        return checkpoint.read_rows(name, 0, columns).to(torch.float64)[:, wanted].T
    last = int(wanted.max()) + 1
    return checkpoint.read_rows(name, 0, last).to(torch.float64)[wanted, :columns]
