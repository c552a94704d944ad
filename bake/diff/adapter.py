"""A PEFT adapter as weights: the tensors of its base that a merge would write, unrounded."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from typing_extensions import override

from bake.artifact.record import RECORD
from bake.checkpoints.adapter import FoundAdapter
from bake.diff.sources import Model, base_of
from bake.diff.weights import Stored, Weights
from bake.errors import UsageError
from bake.merge.adapted import merge_work
from bake.merge.adapter_config import read_config
from bake.merge.change import ReadRows
from bake.merge.work import Work

_ROWS = 256


@dataclass(frozen=True, eq=False)
class AdaptedWeights(Weights):
    """The tensors of a base that an adapter changes, as a runtime in float64 would have them.

    Attributes:
        base: the base's weights.
        work: what becomes of which tensors.
    """

    base: Weights
    work: Work

    derived: ClassVar[bool] = True

    @cached_property
    def sources(self) -> Mapping[str, str]:
        """The base's tensor that each one is made from; what stays as it is is left out."""
        items = self.work.items.items()
        return {name: item.source for name, item in items if item.change.changes}

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:  # type: ignore[override]
        """The changed tensors, in float64."""
        found = {}
        for name, source in self.sources.items():
            shape = self.base.tensors[source].shape
            found[name] = Stored("F64", shape, 8 * torch.Size(shape).numel(), True)
        return found

    @cached_property
    def _readers(self) -> Mapping[str, ReadRows]:
        return {name: self.work.rows(name) for name in self.sources}

    @override
    def chunks(self, name: str) -> Iterator[memoryview]:
        stored = self.tensors[name]
        rows = stored.matrices * stored.matrix[0]
        for start in range(0, rows, _ROWS):
            yield self.rows(name, start, min(start + _ROWS, rows)).numpy().data

    @override
    def rows(self, name: str, start: int, stop: int) -> UInt8[Tensor, "rows bytes"]:
        stored = self.tensors[name]
        each = stored.matrix[0] if stored.stacks else 1
        first, last = start // each, -(-stop // each)
        wide = self._readers[name](first, last).reshape((last - first) * each, -1)
        return wide[start - first * each : stop - first * each].contiguous().view(torch.uint8)

    @override
    def values(self, name: str, raw: UInt8[Tensor, "rows bytes"]) -> Float[Tensor, "rows n"]:
        return raw.view(torch.float64)

    @override
    def keep(self, name: str) -> None:
        self.base.keep(self.sources[name])


def base_of_adapter(found: FoundAdapter) -> str:
    """Return the base that an adapter's record names, or its own config where it has no record.

    Raises:
        InputError: the adapter or its record is malformed.
        UsageError: neither names a base, or it has moved.
    """
    record = found.folder / RECORD
    if record.is_file():
        return base_of(str(found), record, None if found.repo else found.folder.resolve())
    named = read_config(found.folder).get("base_model_name_or_path")
    return named if isinstance(named, str) and named else base_of(str(found), None, None)


def adapted(found: FoundAdapter, base: Model) -> AdaptedWeights:
    """Return what an adapter makes of its base.

    Args:
        found: the adapter.
        base: a checkpoint.

    Raises:
        InputError: a merge would refuse it.
        UsageError: the base is no checkpoint.
    """
    if base.checkpoint is None:
        raise UsageError(
            f"{found} is an adapter, and {base.label} is a GGUF file",
            fix="name the checkpoint that the GGUF file was made from",
        )
    return AdaptedWeights(base.weights, merge_work(found.folder, base.checkpoint))
