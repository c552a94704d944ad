"""Merge a PEFT LoRA adapter into a checkpoint, each here or on the Hub."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.errors import FamilyError
from bake.jobs.request import table_of
from bake.progress import Bars, no_bars

if TYPE_CHECKING:
    from bake.artifact import Artifact
    from bake.checkpoints import Checkpoint
    from bake.families import Layout


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge wrote, and what is worth knowing of it."""

    artifact: "Artifact"
    notes: tuple[str, ...]
    no_table: str | None
    """Why it was merged without a family table, where it was."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**self.artifact.to_json(), "notes": list(self.notes)}


def merge(
    adapter: str,
    base: str,
    out: Path,
    *,
    revision: str | None = None,
    family: Path | None = None,
    assume_harmless: tuple[str, ...] = (),
    force: bool = False,
    bars: Bars = no_bars,
) -> Merged:
    """Merge an adapter into a checkpoint, and write that to a new folder.

    Args:
        adapter: a folder or a Hub id.
        base: the same.
        out: the folder to create.
        revision: branch, tag or commit of a base on the Hub.
        family: the user's own table; the one that fits when None.
        assume_harmless: keys of config.json that the user answers for.
        force: whether to replace what is at ``out``.
        bars: where progress is shown.

    Raises:
        BakeError: what is no sum of base and factors, or the disk; nothing is left behind.
    """
    from bake.artifact.record import read_record
    from bake.checkpoints import open_checkpoint
    from bake.checkpoints.adapter import find_adapter
    from bake.merge.merge import merge_adapter

    found = find_adapter(adapter)
    checkpoint = open_checkpoint(base, revision=revision, complete=True)
    checkpoint = replace(checkpoint, harmless=assume_harmless)
    layout, reason = _layout(checkpoint, family)
    with bars(f"writing {out.name}") as move:
        written = merge_adapter(
            found.folder,
            checkpoint,
            out,
            layout=layout,
            published=found,
            family=None if family is None else table_of(family),
            force=force,
            progress=move,
        )
    return Merged(written, read_record(written.path).plan.notes, reason)


def _layout(
    checkpoint: "Checkpoint", family: Path | None
) -> "tuple[Layout, None] | tuple[None, str]":
    """Return the layout, or why there is none.

    A merge needs no table where names and storage are plain; ``merge_adapter`` refuses the rest.
    """
    from bake.families.fit import layout_of

    try:
        return layout_of(checkpoint, family), None
    except FamilyError as error:
        if family is not None or checkpoint.harmless:
            raise
        return None, error.what
