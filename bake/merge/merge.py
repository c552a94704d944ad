"""Merge a PEFT LoRA into its base: the checkpoint that computes what base and adapter compute.

The writer is that of every checkpoint output: untouched tensors keep their bytes, large ones pass
in tiles. A head that is tied to the embedding is untied where the adapter changes one of the two,
because that is what PEFT computes with the adapter at work (``merge_and_unload`` edits both).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from bake.artifact.artifact import Artifact
from bake.artifact.base_digests import BaseDigests
from bake.artifact.record import RECORD, new_record, record_text
from bake.artifact.staged import Place, check_apart, identity_of, write_staged
from bake.checkpoints import Checkpoint, NewCheckpoint, write_checkpoint
from bake.checkpoints.adapter import FoundAdapter
from bake.checkpoints.planned import PlannedModel
from bake.checkpoints.source import Stamps
from bake.merge.adapted import merge_work
from bake.merge.adapter_config import read_config
from bake.merge.beside import own_files
from bake.merge.record import merge_plan, merge_provenance
from bake.outputs.checkpoint import stored_tensors
from bake.progress import Progress

KIND = "merge"
Side = Literal["base", "adapter"]


def merge_adapter(
    adapter: Path,
    base: Checkpoint,
    out: Path,
    *,
    published: FoundAdapter | None = None,
    tokenizer: Side = "base",
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Write the base with the adapter merged into it to ``out``.

    Args:
        adapter: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: a complete checkpoint of the model that the adapter is for.
        out: a folder that does not exist, unless ``force``.
        published: where on the Hub the adapter is from, for the record; None for a folder.
        tokenizer: whose tokenizer, templates and generation settings go with the result.
        force: replace an artifact of bake at ``out``.
        progress: called with the bytes of weights that are done and their total.

    Raises:
        InputError: the adapter is malformed or no sum of base and factors, PEFT would not load all
            of it, or a merged value does not fit the storage dtype.
        CheckpointError: transformers does not read the base, or the disk is too small.
        UsageError: ``out`` exists, overlaps the base or holds the adapter.
    """
    check_apart(out, base.path, adapter=adapter)
    read = Stamps.of(path for path in sorted(adapter.glob("*")) if path.is_file())
    work = merge_work(adapter, base)
    config = read_config(adapter)
    digests = BaseDigests(base)
    provenance = merge_provenance(adapter, config, base, out, published=published)
    own = own_files(adapter, base)
    plan = merge_plan(adapter, config, work, left=() if tokenizer == "adapter" else tuple(own))
    planned = work.planned(plan.digest, digests)
    replace, _, new = stored_tensors(planned, base)

    def closing(files: Mapping[str, str]) -> Mapping[str, bytes]:
        before = digests.record(replace)
        record = new_record(provenance, KIND, plan, files=files, base_tensors=before)
        return {RECORD: record_text(record).encode()}

    def write(place: Place) -> Artifact:
        taken = own if tokenizer == "adapter" else {}
        merged = NewCheckpoint(base, replace, new, planned.config_text, taken)
        found = write_checkpoint(merged, place, closing=closing, progress=progress)
        return Artifact(KIND, out, found.files, found.bytes_written, found.bytes_edited)

    what = [KIND, str(base.path), tokenizer, provenance.to_json(), plan.to_json()]
    identity = identity_of(what, base.files.stamps | read)
    return write_staged(out, identity, force=force, write=write)


def planned_merge(adapter: Path, base: Checkpoint, digest: str) -> PlannedModel:
    """Return what an adapter makes of its base, in float64 and not rounded.

    Args:
        adapter: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: a complete checkpoint of the model that the adapter is for.
        digest: of the plan of the merge.

    Raises:
        InputError: as ``merge_adapter`` does, for all but the values.
    """
    return merge_work(adapter, base).planned(digest, BaseDigests(base))
