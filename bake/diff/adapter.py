"""A PEFT LoRA adapter as weights: the base with the products of its factors added, row by row."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from typing_extensions import override

from bake.artifact.record import RECORD
from bake.diff.sources import Model, base_of
from bake.diff.weights import Stored, Weights
from bake.errors import InputError, UsageError
from bake.families import Layout
from bake.merge.peft_adapter import Module, PeftAdapter, open_adapter

_ROWS = 256


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedWeights(Weights):
    """The tensors of a base that an adapter changes, as a runtime in float64 would have them.

    Attributes:
        base: the base's weights.
        factors: by tensor, left [m, r] and right [r, n] of what is added to it.
        tensors: those tensors, in float64.
    """

    base: Weights
    factors: Mapping[str, tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]]
    tensors: Mapping[str, Stored]

    derived: ClassVar[bool] = True

    @override
    def chunks(self, name: str) -> Iterator[memoryview]:
        rows = self.tensors[name].matrix[0]
        for start in range(0, rows, _ROWS):
            yield self.rows(name, start, min(start + _ROWS, rows)).numpy().data

    @override
    def rows(self, name: str, start: int, stop: int) -> UInt8[Tensor, "rows bytes"]:
        left, right = self.factors[name]
        raw = self.base.rows(name, start, stop)
        wide = self.base.values(name, raw).to(torch.float64) + left[start:stop] @ right
        return wide.contiguous().view(torch.uint8)

    @override
    def values(self, name: str, raw: UInt8[Tensor, "rows bytes"]) -> Float[Tensor, "rows n"]:
        return raw.view(torch.float64)

    @override
    def keep(self, name: str) -> None:
        self.base.keep(name)


def base_of_adapter(source: str) -> str:
    """Return the base that an adapter's record names, or its own config where it has no record.

    Raises:
        InputError: the adapter or its record is malformed.
        UsageError: neither names a base, or it has moved.
    """
    folder = Path(source).expanduser()
    record = folder / RECORD
    if record.is_file():
        return base_of(source, record, folder.resolve())
    named = open_adapter(folder).config.get("base_model_name_or_path")
    return named if isinstance(named, str) and named else base_of(source, None, None)


def adapted(source: str, base: Model, layout: Layout | None) -> AdaptedWeights:
    """Return a base with an adapter's factors.

    Args:
        source: the adapter's folder.
        base: a checkpoint.
        layout: the base's family resolved, which says what the modules of a live model are on disk;
            without it names have to be plain.

    Raises:
        InputError: the adapter is malformed, or a module of it has no place in the base.
        UsageError: it is more than factors.
    """
    opened = open_adapter(Path(source).expanduser())
    whole = [*opened.replaced, *(m.path for m in opened.modules if m.bias is not None)]
    if whole or base.checkpoint is None:
        what = f"holds more than factors: {', '.join(whole[:3])}" if whole else "is no GGUF file"
        raise UsageError(
            f"{source} {what}",
            fix=f"`bake merge {source} BASE --out DIR`, then `bake diff BASE DIR`",
        )
    stems = {} if layout is None else layout.stems
    factors, tensors = {}, {}
    for module in opened.modules:
        name = f"{stems.get(module.path, module.path)}.weight"
        stored = base.weights.tensors.get(name)
        left, right = _factors(opened, module)
        if stored is None or stored.shape != (left.shape[0], right.shape[1]) or not stored.numeric:
            found = "is not there" if stored is None else f"is {stored.dtype} {list(stored.shape)}"
            raise InputError(
                f"{module.path} has no place in the base: {name} {found}",
                where=source,
                fix="name the base that the adapter was made for",
            )
        factors[name] = (left, right)
        tensors[name] = replace(stored, dtype="F64", nbytes=8 * left.shape[0] * right.shape[1])
    return AdaptedWeights(base.weights, factors, tensors)


def _factors(opened: PeftAdapter, module: Module) -> tuple[Tensor, Tensor]:
    """Return what is added to the stored weight, as left and right factor."""
    a, b = opened.read(module.a), module.scale * opened.read(module.b)
    # A table stores a row for every token, and its factors are A [r, V] and B [d, r].
    return (a.T, b.T) if module.is_table or opened.transposed else (b, a)
