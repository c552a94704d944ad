"""``Claims``: what an artifact's own record says was changed, read as data.

Nothing of the code that makes and executes plans is used here: the record is held against the
bytes, and not against the program that wrote both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap, LowRankMap
from bake.artifact.carrier import KINDS
from bake.artifact.record import RECORD, record_at
from bake.artifact.schema import Record, TensorChange
from bake.diff.sources import Model
from bake.edit_store import EDITS, load_edits
from bake.edits import Edit, EditKind
from bake.sites import STREAM_KINDS, SiteKind

# Kinds of edit whose maps change a weight by no more than their own rank, and the sites at which
# each of them acts on the whole width of the stream: elsewhere one map may act on several parts.
_LOW_RANK = (EditKind.ABLATE, EditKind.AFFINE, EditKind.ERASE, EditKind.OFFSET)
_WHOLE = (*STREAM_KINDS, SiteKind.EMBED, SiteKind.ATTN_OUT, SiteKind.MLP_OUT, SiteKind.EXTRA_OUT)


@dataclass(frozen=True, slots=True)
class Claim:
    """What the record says of one tensor.

    Attributes:
        name: as the artifact calls it.
        source: the base's tensor that it was made from; None for a new bias.
        created: whether the base has no such tensor.
        zero: whether it is new and holds zeros.
        same: whether it is a copy of its source.
        rank: the most that the edits can change, or None where that is not derived.
        dtype: the type that it was written in, where the record says so.
        shape: its shape, where the record says so.
    """

    name: str
    source: str | None
    created: bool
    zero: bool = False
    same: bool = False
    rank: int | None = None
    dtype: str | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Claims:
    """Everything that a record says of the difference between an artifact and its base.

    Attributes:
        record: the record itself.
        tensors: by name.
        edits: the edits, where the artifact carries them.
    """

    record: Record
    tensors: Mapping[str, Claim]
    edits: tuple[Edit, ...]


def read_claims(out: Model) -> tuple[Claims | None, str | None]:
    """Return what an artifact claims, or None and the reason why it claims nothing.

    Raises:
        InputError: the record or the edits are malformed.
    """
    path = out.small_file(RECORD)
    if path is None:
        return None, None
    record = record_at(path, out.label)
    kind = record.kind
    carrier = KINDS[kind]
    if not carrier.whole or carrier.checkpoint != (out.checkpoint is not None):
        return None, f"its {RECORD} is of the kind {kind!r}, and these are other files"
    if out.gguf is not None and out.gguf.path.name not in (record.files or {}):
        return None, f"the {RECORD} beside it does not list {out.gguf.path.name}"
    edits_path = out.small_file(EDITS)
    edits = () if edits_path is None else load_edits(edits_path)
    claims = _of_checkpoint(record, edits) if out.checkpoint is not None else _of_gguf(record)
    return Claims(record, {claim.name: claim for claim in claims}, edits), None


def _of_checkpoint(record: Record, edits: tuple[Edit, ...]) -> list[Claim]:
    claims = [_tensor(row, edits) for row in record.plan.tensors]
    for row in record.plan.biases:
        source = None if row.created else row.name
        claims.append(Claim(row.name, source, row.created, zero=row.zero, shape=row.shape))
    return claims


def _of_gguf(record: Record) -> list[Claim]:
    rows = () if record.gguf is None else record.gguf.tensors
    return [
        Claim(row.name, None if new else row.name, new, dtype=row.type)
        for row in rows
        for new in [row.base_type is None]
    ]


def _tensor(row: TensorChange, edits: Sequence[Edit]) -> Claim:
    # The record of a merge has no axes, and no edit whose rank would be derived.
    table = bool(edits) and row.output_axis == 1 and row.sides == ("output",)
    return Claim(
        name=row.name,
        source=row.source,
        created=row.is_new,
        same=row.sides == ("copied",),
        rank=_most(edits, row.sides, table=table),
        shape=row.shape,
    )


def _most(edits: Sequence[Edit], sides: Sequence[str], *, table: bool) -> int | None:
    """Return the most directions that the edits can change of a tensor; None if not derived.

    Maps x ↦ x + L(Rx) compose to I + something in the span of all L on the left and of all R on
    the right, so a weight with them on one side changes by no more than the sum of the ranks of
    those that differ, and on both sides by twice that. Rows of a table may get a constant as well.
    """
    if not edits or not set(sides) <= {"output", "input"}:
        return None
    ranks: dict[int, int] = {}
    for edit in edits:
        whole = all(site.kind in _WHOLE for site in edit.sites)
        if edit.kind not in _LOW_RANK or not isinstance(edit.map, LowRankMap) or not whole:
            return None
        ranks[id(edit.map)] = edit.map.left.shape[1]
    return sum(ranks.values()) * len(sides) + table


def edit_directions(edits: Sequence[Edit], side: str) -> dict[str, Float[Tensor, "n d"]]:
    """Return, by concept, what the edits add to the stream, or what they read of it.

    Args:
        edits: of an artifact.
        side: ``read`` for what they read, anything else for what they add.
    """
    rows: dict[str, list[Tensor]] = {}
    for edit in edits:
        if not isinstance(edit.map, AffineMap):
            continue
        left, right = edit.map.delta_factors()
        if left.shape[1] >= edit.map.width:
            continue  # it turns every direction and singles none out
        factor = right if side == "read" else left.T
        bias = edit.map.bias[None, :]
        found = factor if side == "read" or not bool(bias.any()) else torch.cat([factor, bias])
        if len(found):
            rows.setdefault(f"edit {edit.concept}", []).append(found.to(torch.float64))
    return {
        label: torch.cat(parts)
        for label, parts in rows.items()
        if len({part.shape[1] for part in parts}) == 1
    }
