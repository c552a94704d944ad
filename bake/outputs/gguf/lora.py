"""The GGUF LoRA output: an adapter that llama.cpp loads beside a GGUF of the base.

Read from llama.cpp's ``src/llama-adapter.cpp`` and ``src/llama-graph.cpp: build_lora_mm``. For a
matrix [out, in] the file holds ``NAME.lora_a`` [r, in] and ``NAME.lora_b`` [out, r]; for experts
both are stacked; for the token embedding A is [tokens, r] and B [d, r]. ``adapter.lora.alpha`` is
0, which llama.cpp takes as "the scale is the user's", whatever the rank of a tensor. The rows of B
are in the order of the file that llama.cpp's converter makes, which reorders some layers.

A tied head has no tensor in a GGUF, and llama.cpp multiplies by the embedding's in its place, with
an adapter of that name where there is one: the factors do not fit, and the process aborts. So an
adapter of embedding or head goes over a copy of the base's file in which the head is a tensor of
its own, with the bytes of the embedding: everything else in it is the base's, byte for byte.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from bake.artifact.artifact import Artifact
from bake.artifact.carrier import carrier_of
from bake.artifact.schema import BaseRef
from bake.checkpoints.gguf.codec import decode
from bake.checkpoints.gguf.file import Gguf
from bake.checkpoints.stream import Piece
from bake.checkpoints.workers import write_file
from bake.checkpoints.writer import require_space
from bake.errors import CheckpointError, UsageError
from bake.families.gguf import GgufPlace, gguf_names, gguf_places
from bake.outputs.export import CarrierRun, CarrierWriter, Export
from bake.outputs.factors import FactorSource, factors_from, padded, weight_factors
from bake.outputs.folder import close_artifact
from bake.outputs.gguf.edit import new_matrix
from bake.outputs.gguf.match import check_corners
from bake.outputs.gguf.modelfile import MODELFILE, modelfile
from bake.outputs.gguf.tensor import MatrixEdit
from bake.outputs.gguf.write import NewBytes, with_tensor
from bake.outputs.lora import nonempty, target_factors
from bake.plan import Plan
from bake.plan.carriers import beside_head
from bake.plan.lowrank import LowRank, Target, low_rank, rank_of, targets_of
from bake.progress import Tally
from bake.rounding import to_storage

FILE, BASE = "lora.gguf", str(carrier_of("gguf-lora").beside)
"""The adapter, and the copy of the base that it goes over, where it is not for the base itself."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The factors of one tensor of the base's GGUF: of one matrix, or of a stack of experts."""

    name: str
    members: tuple[tuple[Target, GgufPlace], ...]
    stacked: bool
    is_table: bool
    rank: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B as they are stored."""
        target = self.members[0][0]
        outer, inner = target.shape[target.output_axis], target.shape[1 - target.output_axis]
        if self.is_table:
            return (inner, self.rank), (outer, self.rank)
        stack = (len(self.members),) if self.stacked else ()
        return (*stack, self.rank, inner), (*stack, outer, self.rank)


def prepare_gguf_lora(export: Export) -> CarrierWriter:
    """Return what writes the plan as ``lora.gguf``.

    With a GGUF of the base the factors are made from its own weights, dequantised, so that the edit
    is exact for what is served; where it is one file, a Modelfile for Ollama names both. Of weights
    only what shows that the GGUF fits is read here.

    Raises:
        InexactPlan: a finding is not exact and not allowed, or llama.cpp would drop or refuse a
            part of the adapter.
        CheckpointError: the GGUF is not one of this model.
        UsageError: the plan changes no weight, a Modelfile cannot name the GGUF, or a tied head
            needs a tensor of its own and no GGUF of one file is named.
    """
    plan, model = export.plan, export.model()
    pairs = _pairs(plan, nonempty(targets_of(plan)))
    head = _head(plan, model) if beside_head(plan, "gguf-lora") else None
    if model is not None:
        _check_model(model, plan, pairs)
        members = (target.update for pair in pairs for target, _ in pair.members)
        edited = [update.source for update in members if update is not None]
        check_corners(edited, export.checkpoint, model, gguf_places(plan.layout))
        if len(model.parts) == 1 and head is None:
            modelfile(model.path.name, FILE)
    return partial(_write, export, model, pairs, head)


def _head(plan: Plan, model: Gguf | None) -> NewBytes | None:
    """Return the tied head as a tensor of its own; None where the file has one already.

    Raises:
        UsageError: there is no file of the base to write it into, or several.
    """
    layout = plan.layout
    if model is None:
        raise UsageError(
            "an adapter of a tied embedding goes over a GGUF in which the head is a tensor of its "
            "own",
            why="llama.cpp takes one tensor for both, and aborts",
            fix=f"name the base's GGUF with --gguf: {BASE} is written beside the adapter",
        )
    places = gguf_places(layout)
    name, source = places[layout.unembed.weight].name, places[layout.embed].name
    if name in model.tensors or source not in model.tensors:
        return None
    if len(model.parts) > 1:
        raise UsageError(
            "the head of a split GGUF is tied, and gets a tensor of its own in one file only",
            where=str(model.path),
            fix="put the parts together with `llama-gguf-split --merge`",
        )
    info = model.tensors[source]
    return new_matrix(
        MatrixEdit(name, source, info.kind, info.shape, {}, "head"), model, "nearest", None
    )


def _write(
    export: Export,
    model: Gguf | None,
    pairs: tuple[Pair, ...],
    head: NewBytes | None,
    run: CarrierRun,
) -> Artifact:
    folder = run.place.folder
    size = sum(4 * torch.Size(shape).numel() for pair in pairs for shape in pair.shapes)
    copy: tuple[Sequence[Piece], int] = ((), 0)
    if model is not None and head is not None:
        copy = with_tensor(model, head)
    tally = Tally(size + copy[1], run.progress)
    if head is not None:
        require_space(folder, copy[1])
        write_file(folder / BASE, copy[0], origin=None, advance=tally.advance)
    source = factors_from(export.checkpoint) if run.factors is None else run.factors.source
    make, arch = _maker(source, model, export.plan), gguf_names(export.plan.layout).arch
    _write_file(folder / FILE, arch, run.record.base, pairs, make, tally)
    if model is not None and len(model.parts) == 1:
        own = head is not None
        text = modelfile(BASE, FILE) if own else _modelfile(model, run.place.final)
        (folder / MODELFILE).write_text(text, encoding="utf-8")
    return close_artifact(export.plan, "gguf-lora", run)


def _modelfile(model: Gguf, out: Path) -> str:
    """Return a Modelfile that finds the base from the adapter's folder."""
    where = os.path.relpath(model.path.resolve(), out.resolve())
    return modelfile(Path(where).as_posix(), FILE)


def _pairs(plan: Plan, targets: Sequence[Target]) -> tuple[Pair, ...]:
    """Return the tensors of the file, the experts of one projection together."""
    places = gguf_places(plan.layout)
    grouped: defaultdict[str, list[tuple[Target, GgufPlace]]] = defaultdict(list)
    for target in targets:
        place = places[target.name]
        grouped[place.name].append((target, place))
    pairs = []
    for name, members in grouped.items():
        members.sort(key=lambda member: member[1].expert or 0)
        stacked = members[0][1].expert is not None
        assert [place.expert or 0 for _, place in members] == list(range(len(members)))
        ranks = [rank_of(target.update) for target, _ in members if target.update is not None]
        is_table = members[0][0].role == "embed"
        pairs.append(Pair(name, tuple(members), stacked, is_table, max(1, *ranks, 0)))
    return tuple(pairs)


Make = Callable[[Target, GgufPlace, int], tuple[Tensor, Tensor]]


def _maker(source: FactorSource, model: Gguf | None, plan: Plan) -> Make:
    """Return what makes the factors of one weight, B in the order of the file's rows."""

    def from_checkpoint(target: Target, place: GgufPlace, rank: int) -> tuple[Tensor, Tensor]:
        a, b = target_factors(source, target, rank)
        return a, b if place.rows is None else b[torch.tensor(place.rows)]

    def from_model(target: Target, place: GgufPlace, rank: int) -> tuple[Tensor, Tensor]:
        assert model is not None
        if target.update is None:
            return from_checkpoint(target, place, rank)
        name = _held(model, place.name, plan)
        info = model.tensors[name]

        def read(start: int, stop: int) -> Float[Tensor, "rows columns"]:
            raw = model.read_rows(name, start, stop, expert=place.expert)
            return decode(raw, info.kind, place.name)

        change, shape = _reordered(low_rank(target.update), place), info.shape[-2:]
        output_axis = 1 if target.role == "embed" else 0
        return padded(*weight_factors(read, shape, output_axis, change), rank)

    return from_checkpoint if model is None else from_model


def _reordered(change: LowRank, place: GgufPlace) -> LowRank:
    """Return a change for the rows of the output in the file's order."""
    if place.rows is None:
        return change
    rows = torch.tensor(place.rows)
    return replace(
        change,
        output_left=change.output_left[rows],
        output_right=change.output_right[:, rows],
        update_left=change.update_left[rows],
    )


def _held(model: Gguf, name: str, plan: Plan) -> str:
    """Return the tensor of the base's file: a head that has none there is the embedding."""
    places = gguf_places(plan.layout)
    tied = plan.layout.tied and name == places[plan.layout.unembed.weight].name
    return places[plan.layout.embed].name if tied and name not in model.tensors else name


def _check_model(model: Gguf, plan: Plan, pairs: Sequence[Pair]) -> None:
    """Require a GGUF of the planned model: its architecture, names and shapes."""
    arch = gguf_names(plan.layout).arch
    if model.arch != arch:
        raise CheckpointError(
            f"the GGUF is of architecture {model.arch!r}, and the model is {arch!r} there",
            where=str(model.path),
        )
    for pair in pairs:
        target = pair.members[0][0]
        outer, inner = target.shape[target.output_axis], target.shape[1 - target.output_axis]
        stack = (len(pair.members),) if pair.stacked else ()
        shape = (inner, outer) if pair.is_table else (*stack, outer, inner)
        found = model.tensors.get(_held(model, pair.name, plan))
        if found is None or found.shape != shape:
            have = "no" if found is None else f"a {list(found.shape)}"
            raise CheckpointError(
                f"the GGUF has {have} tensor {pair.name} where one of {list(shape)} is meant",
                where=str(model.path),
                fix="name a GGUF that was converted from this base",
            )


def _write_file(
    path: Path,
    arch: str,
    base: BaseRef,
    pairs: Sequence[Pair],
    make: Make,
    tally: Tally,
) -> None:
    """Write the header, then one pair of factors after another."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base.model)
    if base.revision:
        writer.add_base_model_version(0, base.revision)
    for pair in pairs:
        for suffix, shape in zip(("lora_a", "lora_b"), pair.shapes, strict=True):
            size = 4 * torch.Size(shape).numel()
            writer.add_tensor_info(f"{pair.name}.{suffix}", shape, np.dtype(np.float32), size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for pair in pairs:
        for factor in _factors(pair, make):
            writer.write_tensor_data(factor.numpy())
            tally.advance(factor.numel() * 4)
    writer.close()


def _factors(pair: Pair, make: Make) -> Iterator[Float32[Tensor, "..."]]:
    """Yield A and B of one tensor in float32, in the shapes of the file."""
    made = [make(target, place, pair.rank) for target, place in pair.members]
    a = torch.stack([a for a, _ in made]) if pair.stacked else made[0][0]
    b = torch.stack([b for _, b in made]) if pair.stacked else made[0][1]
    yield to_storage(a.T if pair.is_table else a, torch.float32, f"{pair.name}.lora_a").contiguous()
    yield to_storage(b, torch.float32, f"{pair.name}.lora_b").contiguous()
