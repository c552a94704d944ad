"""Whether a base is the one that an artifact was made of.

The layout of a base says nothing of its weights. A record holds the sha256 of every edited tensor
as the base has it, which decides. Records of earlier versions do not; but the base's tensors have
to lead to the artifact's: folding is deterministic, so the same base gives the same bytes.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bake import __version__
from bake.affine import EPSILON
from bake.artifact.base_digests import refuse_other_base
from bake.artifact.carrier import KINDS
from bake.artifact.schema import Record
from bake.checkpoints import Checkpoint, Producer
from bake.edit_store import EDITS, FITTED, load_edits
from bake.errors import InputError
from bake.families.fit import layout_of
from bake.families.table import parse_family
from bake.outputs.checkpoint import planned_model, stored_tensors
from bake.plan import Plan, compile_plan
from bake.plan.record import other_parts
from bake.progress import Progress, Tally
from bake.tiles import row_count

_FACTOR = 8  # two sums and their roundings, and a margin of two


def prove_base(
    record: Record,
    base: Checkpoint,
    artifact: Checkpoint,
    progress: Progress | None = None,
) -> str | None:
    """Compare a base's tensors with the recorded hashes, or fold the recorded edits into it.

    Returns None where that proves it the artifact's base, or else what there is to say instead.

    Args:
        record: the artifact's.
        base: the base that may be the recorded one.
        artifact: its checkpoint.
        progress: called with the bytes of tensors that are compared and their total.

    Raises:
        InputError: a tensor is another one, or leads to another than the artifact's.
    """
    if record.base_tensors:
        refuse_other_base(record.base_tensors, base, progress)
        return None
    if not KINDS[record.kind].exported:
        return (
            "not proven to be the recorded base, since a merge keeps no copy of its adapter: the "
            "merged tensors are those of the named base"
        )
    plan = _recompiled(record, artifact.path, base)
    if other_parts(record.plan, plan):
        return (
            f"not proven to be the recorded base: bake {__version__} compiles another plan than "
            f"the recorded one, made by bake {record.bake}; the edited tensors are those of "
            "the named base"
        )
    replaced, _, new = stored_tensors(planned_model(plan, base), base)
    produced = {**replaced, **{name: tensor.produce for name, tensor in new.items()}}
    tally = Tally(sum(artifact.tensors[name].nbytes for name in produced), progress)
    apart = 0
    for name, produce in produced.items():
        apart += _compare(name, produce, base, artifact)
        tally.advance(artifact.tensors[name].nbytes)
    if apart:
        return (
            f"not proven to the last bit to be the recorded base: {apart:,} values of the edit "
            "come out one rounding step apart, as sums in another order do on another machine; "
            "the edited tensors are those of the named base"
        )
    return None


def _recompiled(record: Record, folder: Path, base: Checkpoint) -> Plan:
    """Return the plan that the recorded edits lead to on a base, whose norms it reads.

    Raises:
        InputError: the edits are missing or malformed.
        FamilyError: no table fits the base.
    """
    # The weights hold fitted stand-ins, where there are some.
    fitted = folder / FITTED
    edits = load_edits(fitted if fitted.is_file() else folder / EDITS)
    own = record.family
    table = None if own is None else parse_family(own.text, own.file)
    # The plan was made by this table, and what it comes to again is held against the record:
    # which keys were let through then is settled.
    layout = layout_of(replace(base, harmless=tuple(base.config)), table)

    def read(name: str) -> Tensor:
        return base.read(name).to(torch.float64)

    return compile_plan(
        edits,
        layout,
        gain=read,
        config=base.config,
        allow=record.allow,
        targets=record.target or ("transformers",),
        widen=record.widen,
    )


def _compare(name: str, produce: Producer, base: Checkpoint, artifact: Checkpoint) -> int:
    """Return how many values differ, refused where another order of summation cannot explain it.

    The errors of a float64 sum of d terms add up to about √d·2⁻⁵² of their size. That changes a
    rounding only where a value lies that close to the middle of two neighbours, which of n values
    befalls about n·√d·2⁻⁵²/ε, with ε the spacing of the storage type: none at all in bfloat16, and
    a few in the largest tensors of float32.
    """
    info = artifact.tensors[name]
    start, differing, neighbours = 0, 0, True
    for tile in produce():
        stop = start + row_count(tile.shape)
        found = artifact.read_rows(name, start, stop).reshape(tile.shape)
        unequal = (tile != found) & ~(tile.isnan() & found.isnan())
        differing += int(unequal.sum())
        here, there = tile[unequal], found[unequal]
        neighbours &= bool((torch.nextafter(here, there) == there).all())
        start = stop
    elements = max(1, info.nbytes // max(1, info.torch_dtype.itemsize))
    spacing = torch.finfo(info.torch_dtype).eps
    terms = max(info.shape, default=1) ** 0.5
    allowed = int(elements * terms * EPSILON / spacing * _FACTOR)
    if differing > allowed or not neighbours:
        raise InputError(
            f"the recorded edit of this base does not give the artifact: {name} differs in "
            f"{differing:,} of {elements:,} values",
            where=base.source,
            why="the base's weights are not those that the artifact was made of, or the "
            "artifact's were changed since",
            fix="name the base that the record names, or download the artifact again",
        )
    return differing
