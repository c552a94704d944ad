"""Which reader says what an artifact's files hold."""

from pathlib import Path

from bake.artifact.carrier import Part
from bake.checkpoints import Checkpoint
from bake.checkpoints.gguf.file import open_gguf
from bake.errors import InputError
from bake.families import Layout
from bake.verify.artifact import Baked
from bake.verify.planned import Planned
from bake.verify.stored.beside import base_beside
from bake.verify.stored.factors import over_checkpoint, over_converted, over_gguf
from bake.verify.stored.files import StoredFiles, untied, untied_by_merge, written_directions
from bake.verify.stored.gguf import StoredGguf
from bake.verify.stored.tensors import StoredTensors
from bake.verify.stored.vectors import StoredVectors


def stored_files(
    artifact: Baked,
    base: Checkpoint,
    baked: Checkpoint | None,
    layout: Layout | None,
    planned: Planned,
) -> StoredFiles:
    """Return what answers for the files of an artifact.

    Args:
        artifact: with its record and edits.
        base: its base.
        baked: its own weights, where it is a checkpoint.
        layout: of the base; None for a merge.
        planned: what its plan comes to.
    """
    edits = artifact.edits if artifact.fitted is None else artifact.fitted
    if layout is None:
        assert baked is not None, "a merge is a checkpoint"
        tied = untied_by_merge(artifact.record.plan, base)
        return StoredTensors(baked, base, planned.model, planned.model.narrowest, tied, {})
    if baked is not None:
        tied, along = untied(layout, planned.model.tensors), written_directions(layout, edits)
        return StoredTensors(baked, base, planned.model, layout.dtype, tied, along)
    carrier, model = artifact.carrier, planned.model.tensors
    if carrier.suffix != ".gguf":
        return over_checkpoint(artifact.path, base, layout, model)
    file = open_gguf(gguf_file(artifact))
    if carrier.whole:
        return StoredGguf(file, planned.gguf, layout, edits)
    if Part.CONSTANTS in carrier.holds:
        return StoredVectors(file, edits)
    if planned.gguf is not None:
        own = base_beside(artifact)
        return over_gguf(file, planned.gguf, layout, None if own is None else open_gguf(own))
    options = artifact.record.export
    if options is not None and options.gguf:  # made for a GGUF that is not at hand
        model = {}
    return over_converted(file, base, layout, model)


def gguf_file(artifact: Baked) -> Path:
    """Return the GGUF file of an artifact, the first of a split one, as runtimes are given it.

    The file of a base beside it is not the artifact's.

    Raises:
        InputError: there is none.
    """
    carrier = artifact.carrier
    files = sorted(
        file for file in artifact.path.glob(f"*{carrier.suffix}") if file.name != carrier.beside
    )
    if not files:
        raise InputError("the artifact holds no GGUF file", where=str(artifact.path))
    return files[0]
