"""Merge a PEFT LoRA adapter into a checkpoint, each here or on the Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.progress import Bars, no_bars

if TYPE_CHECKING:
    from bake.artifact import Artifact
    from bake.artifact.schema import PlanRecord
    from bake.merge.merge import Side


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge wrote, and what is worth knowing of it."""

    artifact: "Artifact"
    plan: "PlanRecord"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        runtimes = [verdict.to_json() for verdict in self.plan.runtimes]
        return {**self.artifact.to_json(), "notes": list(self.plan.notes), "runtimes": runtimes}


def merge(
    adapter: str,
    base: str,
    out: Path,
    *,
    revision: str | None = None,
    tokenizer: "Side" = "base",
    force: bool = False,
    bars: Bars = no_bars,
) -> Merged:
    """Merge an adapter into a checkpoint, and write that to a new folder.

    Args:
        adapter: a folder or a Hub id.
        base: the same.
        out: the folder to create.
        revision: branch, tag or commit of a base on the Hub.
        tokenizer: whose tokenizer, templates and generation settings go with the result.
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
    with bars(f"writing {out.name}") as move:
        written = merge_adapter(
            found.folder,
            checkpoint,
            out,
            published=found,
            tokenizer=tokenizer,
            force=force,
            progress=move,
        )
    return Merged(written, read_record(written.path).plan)
