"""One carrier of a plan, written: for tests that need an artifact and no command."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from bake.artifact import Artifact
from bake.artifact.base import base_ref
from bake.artifact.schema import Provenance
from bake.artifact.staged import Identity, Place, check_apart, identity_of, write_staged
from bake.checkpoints import Checkpoint, NewCheckpoint, write_checkpoint
from bake.outputs.export import Export
from bake.outputs.gguf.convert import Conversion, convert_checkpoint
from bake.outputs.write import export
from bake.plan import Plan
from bake.progress import Progress


def written(
    carrier: str,
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    *,
    record: dict[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Artifact:
    """Write one carrier and return what was written; the options are fields of ``Export``."""

    def bars(label: str, *, unit: str | None = None) -> AbstractContextManager[Progress | None]:
        return nullcontext(progress)

    if record is not None:  # what was allowed is needed to make the plan again
        record = {"allow": sorted(options.get("allow", ())), **record}
    what = Export(plan, checkpoint, provenance(checkpoint, record), bars=bars, **options)
    return export(what, (carrier,), out)[0]


def provenance(checkpoint: Checkpoint, told: dict[str, Any] | None) -> Provenance | None:
    """Return what a test says that an artifact is made from; what it leaves out is the base's."""
    if told is None:
        return None
    base = {**base_ref(checkpoint).to_json(), **told.get("base", {})}
    return Provenance.of({"allow": (), "target": (), **told, "base": base})


def convert_baked(baked: Path, out: Path, llama_cpp: Path, **options: Any) -> Artifact:
    """Convert a baked checkpoint with llama.cpp's own converter."""

    def write(place: Place) -> Artifact:
        return convert_checkpoint(baked, place, Conversion(llama_cpp, **options))

    return write_staged(out, Identity(""), force=False, write=write)


def write_new(source: Checkpoint, out: Path, **options: Any) -> Artifact:
    """Write a checkpoint with some tensors replaced and some added, as a whole or not at all.

    The options are fields of ``NewCheckpoint``, arguments of ``write_checkpoint``, ``force``, and
    ``digest``, for what the producers depend on.
    """
    force, digest = options.pop("force", False), options.pop("digest", "d")
    extra = {key: options.pop(key) for key in ("closing", "progress") if key in options}
    fields = {"replace": {}, "new": {}, "config_text": source.config_text, "extra_files": {}}
    made = NewCheckpoint(source, **{**fields, **options})

    def write(place: Place) -> Artifact:
        found = write_checkpoint(made, place, **extra)
        return Artifact("test", out, found.files, found.bytes_written, found.bytes_edited)

    check_apart(out, source.path)
    identity = identity_of([digest, source.digest()], source.files.stamps)
    return write_staged(out, identity, force=force, write=write)
