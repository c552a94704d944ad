"""Tensors in a few rows: those of all layers that share a shape and a change are one."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from rich.table import Table

from bake.cli.render.pieces import size, table
from bake.sites import span

if TYPE_CHECKING:
    from bake.checkpoints import Checkpoint
    from bake.plan import Plan

NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Named:
    """A tensor as a row of a table."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    note: str

    @property
    def new(self) -> bool:
        """Whether the base has no such tensor."""
        return self.note.startswith("new")


def merged(texts: Sequence[str]) -> str | None:
    """Return texts that differ only in numbers as one: ``model.layers.0-31.mlp.weight``.

    None where the numbers are no full grid (every layer with every expert, say), so that one text
    would say more than the many.
    """
    columns = zip(*(map(int, NUMBER.findall(text)) for text in texts), strict=True)
    axes = list(columns)
    if prod(len(set(axis)) for axis in set(axes)) != len(set(texts)):
        return None
    spans = iter([span(axis) for axis in axes])
    return NUMBER.sub(lambda _: next(spans), texts[0])


def tensor_table(rows: Sequence[Named], *, verbose: bool) -> Table:
    """Return tensors with their sizes, those of all layers in one row unless ``verbose``."""
    made = table("tensor", "n", "shape", "bytes", "change", right=("n", "bytes"))
    groups: dict[tuple[str, tuple[int, ...], str], list[Named]] = {}
    for row in rows:
        key = (row.name if verbose else NUMBER.sub("#", row.name), row.shape, row.note)
        groups.setdefault(key, []).append(row)
    for (_, shape, note), group in groups.items():
        pattern = merged([row.name for row in group])
        shown = [group] if pattern is not None else [[row] for row in group]
        for part in shown:
            name = pattern if pattern is not None else part[0].name
            total = size(sum(row.nbytes for row in part))
            made.add_row(name, str(len(part)), "×".join(map(str, shape)), total, note)
    return made


def changed_tensors(planned: "Plan", checkpoint: "Checkpoint") -> list[Named]:
    """Return every tensor that the plan edits or creates, in the order of the plan."""
    tensors, embedding = checkpoint.tensors, checkpoint.tensors[planned.layout.embed]
    per_item = embedding.nbytes // prod(embedding.shape)
    rows = []
    for update in planned.tensors:
        note = "new" if update.create else "edited"
        rows.append(Named(update.name, update.shape, tensors[update.source].nbytes, note))
    for bias in planned.biases:
        known = tensors.get(bias.name)
        size = prod(bias.shape) * per_item if known is None else known.nbytes
        note = ("new, zeros" if bias.is_zero() else "new") if bias.create else "edited"
        rows.append(Named(bias.name, bias.shape, size, note))
    return rows
