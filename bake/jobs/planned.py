"""What an artifact's plan comes to, for verification: made again from its base and its edits."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bake.errors import UsageError
from bake.jobs.recorded import Source, replan

if TYPE_CHECKING:
    from bake.checkpoints import Checkpoint
    from bake.checkpoints.planned import PlannedModel
    from bake.jobs.recorded import Replanned
    from bake.verify.artifact import Baked
    from bake.verify.planned import Planned, PlannedGguf
    from bake.verify.report import Report
    from bake.verify.verification import Verification


def judged(asked: "Verification") -> "Report":
    """Make the plan of an artifact again, and measure the artifact against hooks and plan.

    Raises:
        BakeError: whatever is wrong with the artifact or its base, or with what is asked of it.
    """
    from bake.verify.compare import compare

    where = Source(asked.artifact, str(asked.artifact), published=False)
    return compare(asked, planned_of(where, asked))


def planned_of(source: Source, asked: "Verification") -> "Planned":
    """Return what the plan of an artifact comes to, in float64 and not rounded.

    Args:
        source: the artifact.
        asked: which says where base, adapter and table are, where they have moved.

    Raises:
        BakeError: whatever is wrong with the artifact, its base or their fit.
    """
    from bake.outputs.checkpoint import planned_model
    from bake.verify.artifact import open_baked
    from bake.verify.inputs import open_base
    from bake.verify.planned import Planned

    artifact = open_baked(source.folder)
    asked.check(artifact)
    if artifact.merged:
        return Planned(_merged(artifact, asked))
    made = replan(
        source, base=asked.base, family=asked.family, assume_harmless=asked.assume_harmless
    )
    plan, base = made.request.plan, open_base(artifact, asked.base)
    gguf = _gguf_of(made, asked.gguf, base)
    return Planned(planned_model(plan, base), gguf, made.differences)


def _gguf_of(made: "Replanned", named: Path | None, base: "Checkpoint") -> "PlannedGguf | None":
    """Return what becomes of the base's GGUF, where the artifact was made from one that is here.

    Raises:
        InputError: the one that is named is another one.
    """
    from bake.jobs.reproduce import from_gguf, recorded_options
    from bake.outputs.gguf.edit import planned_gguf
    from bake.verify.planned import PlannedGguf

    if not from_gguf(made):
        if named is not None:
            raise UsageError("--gguf is for what was made from a GGUF of the base")
        return None
    folder = made.artifact.path
    path = named or _beside(made.artifact, (folder.resolve().parent, base.path, base.path.parent))
    if path is None:
        return None
    export = recorded_options(made, out=folder, gguf=path, llama_cpp=None, force=False)
    model = export.model()
    assert model is not None
    return PlannedGguf(model, planned_gguf(export, model))


def _beside(artifact: "Baked", folders: Sequence[Path]) -> Path | None:
    """Return the recorded GGUF, by name and digest, in one of the folders where it would lie."""
    from bake.outputs.export import gguf_parts

    options = artifact.record.export
    recorded = () if options is None else options.gguf
    for folder in folders if recorded else ():
        path = folder / recorded[0].name
        if path.is_file() and gguf_parts(path) == recorded:
            return path
    return None


def _merged(artifact: "Baked", asked: "Verification") -> "PlannedModel":
    """Return what the adapter of a merge makes of its base."""
    from bake.merge.merge import planned_merge
    from bake.verify.adapter import adapter_of
    from bake.verify.inputs import open_base

    base = open_base(artifact, asked.base)
    return planned_merge(adapter_of(artifact, asked.adapter), base, artifact.plan_digest)
