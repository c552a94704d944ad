"""Merge a PEFT LoRA into its base: the checkpoint that computes what base and adapter compute.

The writer is that of every checkpoint output: untouched tensors keep their bytes, large ones pass
in tiles. A head that is tied to the embedding is untied where the adapter changes one of the two,
because that is what PEFT computes with the adapter at work (``merge_and_unload`` edits both).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bake.artifact.artifact import Artifact
from bake.artifact.base_digests import BaseDigests
from bake.artifact.record import RECORD, new_record, record_text
from bake.artifact.schema import FamilyRecord
from bake.artifact.staged import Place, check_apart, identity_of, write_staged
from bake.checkpoints import (
    Checkpoint,
    NewCheckpoint,
    Producer,
    patch_config,
    write_checkpoint,
)
from bake.checkpoints.adapter import FoundAdapter
from bake.checkpoints.planned import PlannedModel, PlannedTensor
from bake.errors import CheckpointError, InputError
from bake.families import Layout
from bake.fold import spans
from bake.merge.peft_adapter import CONFIG, WEIGHTS, Module, PeftAdapter, open_adapter
from bake.merge.record import merge_plan, merge_provenance
from bake.outputs.checkpoint import stored_tensors
from bake.progress import Progress

KIND = "merge"


@dataclass(slots=True)
class _Work:
    """What becomes of every tensor, by its name in the base."""

    tensors: dict[str, PlannedTensor] = field(default_factory=dict)
    untied: bool = False
    sides: dict[str, str] = field(default_factory=dict)
    """Whether the adapter adds to a tensor (``update``) or replaces it; a copy is not named."""

    def planned(self, base: Checkpoint, digest: str) -> PlannedModel:
        """Return it as what is written, and judged by a verification."""
        changes = {"tie_word_embeddings": False} if self.untied else {}
        return PlannedModel(digest, self.tensors, patch_config(base.config_text, changes))


def merge_adapter(
    adapter: Path,
    base: Checkpoint,
    out: Path,
    *,
    layout: Layout | None = None,
    published: FoundAdapter | None = None,
    family: FamilyRecord | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Write the base with the adapter merged into it to ``out``.

    Args:
        adapter: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: a complete checkpoint of the model that the adapter is for.
        out: a folder that does not exist, unless ``force``.
        layout: the base's family resolved. It says which tensor a module of a loaded model is,
            how it is stored, and what a tied head is; without it names and storage must be plain.
        published: where on the Hub the adapter is from, for the record; None for a folder.
        family: the user's own table, for the record.
        force: replace an artifact of bake at ``out``.
        progress: called with the bytes of weights that are done and their total.

    Raises:
        InputError: the adapter is malformed or no sum of base and factors, a tensor of it has no
            place in the base, or a merged value does not fit the storage dtype.
        CheckpointError: the base lacks a tensor, has another shape, or the disk is too small.
        UsageError: ``out`` exists, overlaps the base or holds the adapter.
    """
    opened = open_adapter(adapter)
    check_apart(out, base.path, adapter=adapter)
    digests = BaseDigests(base)
    work = _Merger(opened, base, layout, digests).work()
    provenance = merge_provenance(opened, base, out, published=published, family=family)
    plan = merge_plan(opened, base, layout, names=tuple(work.tensors), sides=work.sides)
    planned = work.planned(base, plan.digest)
    replace, new = stored_tensors(planned, base)

    def closing(files: Mapping[str, str]) -> Mapping[str, bytes]:
        before = digests.record(replace)
        record = new_record(provenance, KIND, plan, files=files, base_tensors=before)
        return {RECORD: record_text(record).encode()}

    def write(place: Place) -> Artifact:
        merged = NewCheckpoint(base, replace, new, planned.config_text, {})
        found = write_checkpoint(merged, place, closing=closing, progress=progress)
        return Artifact(KIND, out, found.files, found.bytes_written, found.bytes_edited)

    shards = [base.file(shard) for shard in base.shards] if base.complete else []
    identity = identity_of([KIND, str(base.path), provenance.to_json(), plan.to_json()], shards)
    return write_staged(out, identity, force=force, write=write)


def planned_merge(
    adapter: Path, base: Checkpoint, layout: Layout | None, digest: str
) -> PlannedModel:
    """Return what an adapter makes of its base, in float64 and not rounded.

    Args:
        adapter: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: a complete checkpoint of the model that the adapter is for.
        layout: the base's family resolved, as ``merge_adapter`` takes it.
        digest: of the plan of the merge.

    Raises:
        InputError: as ``merge_adapter`` does, for all but the values.
    """
    return (
        _Merger(open_adapter(adapter), base, layout, BaseDigests(base)).work().planned(base, digest)
    )


class _Merger:
    """Finds the tensor of every part of an adapter, each part and each tensor once."""

    def __init__(
        self, adapter: PeftAdapter, base: Checkpoint, layout: Layout | None, digests: BaseDigests
    ) -> None:
        self.adapter, self.base, self.layout, self.digests = adapter, base, layout, digests
        self.where = str(adapter.path / WEIGHTS)
        self.names = {} if layout is None else layout.stems
        self.result = _Work()

    def work(self) -> _Work:
        """Return the producers of every changed tensor."""
        for module in self.adapter.modules:
            self._module(module)
        for target, name in self.adapter.replaced.items():
            self._replaced(target, name)
        for target, name in self.adapter.copies.items():
            self._copy(target, name)
        if self.result.untied:
            self._untie()
        return self.result

    def _disk(self, module: str, parameter: str) -> str:
        """Return the base's name of a module's tensor."""
        return f"{self.names.get(module, module)}.{parameter}"

    def _module(self, module: Module) -> None:
        name = self._disk(module.path, "weight")
        source = name
        layout = self.layout
        if name not in self.base.tensors:
            if layout is None or not layout.tied or name != layout.unembed.weight:
                raise self._missing(module.a, name)
            source = layout.embed  # a tied head is the embedding's tensor
        transposed = self._transposed(module, source)
        info = self.base.tensors[source]
        outer = self.adapter.shapes[module.b][0]
        inner = self.adapter.shapes[module.a][1]
        shape = (inner, outer) if transposed else (outer, inner)
        if info.shape != shape:
            raise InputError(
                f"the factors of {module.path} make a matrix {list(shape)}, and {source} is "
                f"{list(info.shape)}",
                where=self.where,
                fix="name the base that the adapter was made for",
            )
        if self._is_tied_pair(name):
            self.result.untied = True
        self._put(name, source, self._sum(module, source, transposed), "update")
        if module.bias is not None:
            self._bias(module)

    def _transposed(self, module: Module, source: str) -> bool:
        """Whether the base stores the weight as [in, out]; a table's rows are its inputs."""
        if module.is_table:
            return True
        layers = [] if self.layout is None else (self.layout.unembed, *self.layout.linears)
        for linear in layers:
            if linear.weight == self._disk(module.path, "weight"):
                return linear.output_axis == 1
        if self.adapter.transposed:
            raise InputError(
                f"{CONFIG} says fan_in_fan_out, and bake has no table that says how {source} is "
                "stored",
                where=str(self.adapter.path),
                fix="bring a family table of the base",
            )
        return False

    def _is_tied_pair(self, name: str) -> bool:
        if self.layout is None:
            if self.base.config.get("tie_word_embeddings") is not False and (
                name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight"))
            ):
                raise InputError(
                    f"the adapter changes {name}, and without a family table bake cannot tell "
                    "whether the head is tied to it",
                    where=self.where,
                    fix="bring a family table of the base",
                )
            return False
        return self.layout.tied and name in (self.layout.embed, self.layout.unembed.weight)

    def _sum(self, module: Module, source: str, transposed: bool) -> Producer:
        """Return the producer of W + s B A, tile by tile, in float64."""
        info = self.base.tensors[source]

        def produce() -> Iterator[Tensor]:
            a, b = self.adapter.read(module.a), self.adapter.read(module.b) * module.scale
            left, right = (a.T, b.T) if transposed else (b, a)
            read = self.digests.watched(source, partial(self.base.read_rows, source))
            for start, stop in spans(info.shape):
                tile = read(start, stop).to(torch.float64, copy=True)
                yield tile.addmm_(left[start:stop], right)

        return produce

    def _bias(self, module: Module) -> None:
        """Add the bias of B to the layer's own."""
        assert module.bias is not None
        name, added = self._disk(module.path, "bias"), module.bias
        if name not in self.base.tensors:
            raise InputError(
                f"the adapter adds a bias to {module.path}, which has none",
                where=self.where,
                why="PEFT cannot merge it either: the base has no place for it",
            )
        self._check_shape(added, name)

        def produce() -> Iterator[Tensor]:
            total = self.base.read(name).to(torch.float64)
            yield total + module.scale * self.adapter.read(added)

        self._put(name, name, produce, "update")

    def _replaced(self, target: str, tensor: str) -> None:
        """Put a tensor that the adapter stores whole in the place of the base's."""
        module, _, parameter = target.rpartition(".")
        name = self._disk(module, parameter)
        if name not in self.base.tensors:
            raise self._missing(tensor, name)
        if self._is_tied_pair(name):
            raise InputError(
                f"the adapter stores {target} whole, and the head is tied to the embedding",
                where=self.where,
                why="PEFT's versions disagree on whether the other one changes with it",
            )
        self._check_shape(tensor, name)

        def produce() -> Iterator[Tensor]:
            yield self.adapter.read(tensor)

        self._put(name, name, produce, "replaced")

    def _copy(self, target: str, tensor: str) -> None:
        """Require that what PEFT saved of the base is the base's: it saves embeddings whole."""
        module = target.removesuffix(".weight")
        name = self._disk(module, "weight")
        layout = self.layout
        if name not in self.base.tensors and layout is not None and layout.tied:
            name = layout.embed
        self._check_shape(tensor, name)
        if not torch.equal(self.adapter.read(tensor), self.base.read(name).to(torch.float64)):
            raise InputError(
                f"the adapter holds another {target} than the base",
                where=self.where,
                why="its factors are meant for that one",
                fix="name the base that the adapter was made for",
            )

    def _untie(self) -> None:
        """Give the head a tensor of its own, the embedding as it was where no factors are."""
        assert self.layout is not None
        head, embed = self.layout.unembed.weight, self.layout.embed
        if head in self.result.tensors or self.layout.head_is_stored:
            return
        info = self.base.tensors[embed]

        def produce() -> Iterator[Tensor]:
            for start, stop in spans(info.shape):
                yield self.base.read_rows(embed, start, stop).to(torch.float64)

        self.result.tensors[head] = PlannedTensor(head, info.dtype, info.shape, produce)

    def _put(self, name: str, source: str, produce: Producer, side: str) -> None:
        """Let a tensor be what is produced, in type and shape of the base's that it is made of."""
        if name in self.result.tensors:
            raise InputError(f"the adapter changes {name} twice", where=self.where)
        info = self.base.tensors[source]
        self.result.tensors[name] = PlannedTensor(name, info.dtype, info.shape, produce)
        self.result.sides[name] = side

    def _check_shape(self, tensor: str, name: str) -> None:
        have, want = self.adapter.shapes[tensor], self.base.tensors[name].shape
        if have != want:
            raise InputError(
                f"{tensor} has the shape {list(have)}, and {name} is {list(want)}",
                where=self.where,
                fix="name the base that the adapter was made for",
            )

    def _missing(self, tensor: str, name: str) -> CheckpointError:
        return CheckpointError(
            f"the adapter's tensor {tensor} has no place in the base: there is no tensor {name}",
            where=self.base.source,
            fix="name the base that the adapter was made for"
            + ("" if self.layout else ", or bring a family table of it"),
        )
