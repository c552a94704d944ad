"""Write the carriers of an export: all of them or none, with the base's weights read once for them.

A checkpoint is written first, since it reads every edited weight; adapters take their factors from
the tiles that pass (``bake.outputs.shared``), and llama.cpp's converter reads what is baked. A run
that is killed is taken up by the same command: finished carriers, once their hashes have been
checked, and the shards of an unfinished checkpoint (``bake.artifact.staged``).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from msgspec import structs

from bake.artifact.artifact import Artifact
from bake.artifact.base import base_ref
from bake.artifact.carrier import in_writing_order
from bake.artifact.schema import ExportOptions, Provenance
from bake.artifact.staged import Identity, Stage, check_apart, identity_of, staged
from bake.checkpoints.gguf.storage import storage_types
from bake.checkpoints.source import Stamps
from bake.outputs.export import CarrierRun, CarrierWriter, Export, options_record
from bake.outputs.registry import prepare
from bake.outputs.shared import SharedFactors
from bake.plan.lowrank import targets_of


def export(what: Export, carriers: Sequence[str], out: Path) -> tuple[Artifact, ...]:
    """Write one carrier to the folder ``out``, or several, each to the folder of its name in it.

    The bytes are the same either way.

    Args:
        what: the plan, its base, and the options.
        carriers: their names.
        out: a folder that does not exist, unless ``what.force``.

    Returns:
        what was written, in the order of ``carriers``.

    Raises:
        BakeError: one of the carriers refuses; nothing is written, or nothing is left of it.
    """
    names = tuple(dict.fromkeys(carriers))
    writers = {name: prepare(what, name) for name in names}
    check_apart(out, what.checkpoint.path, **({} if what.gguf is None else {"base": what.gguf}))
    folders = {name: name if len(names) > 1 else "" for name in names}
    if what.record is None:
        base = base_ref(what.checkpoint, out=out)
        allow = tuple(sorted(what.allow))
        what = replace(what, record=Provenance(base=base, allow=allow, target=()))
    with staged(out, _identity(what, names), force=what.force) as stage:
        _write_missing(what, stage, writers, folders)
        stage.publish()
        made = {name: stage.artifacts[folder] for name, folder in folders.items()}
    return tuple(replace(made[name], path=out / folders[name]) for name in names)


def _write_missing(
    what: Export,
    stage: Stage,
    writers: Mapping[str, CarrierWriter],
    folders: Mapping[str, str],
) -> None:
    """Write the carriers that an earlier run has not finished."""
    missing = [n for n in in_writing_order(writers) if folders[n] not in stage.artifacts]
    with ExitStack() as stack:
        factors = None
        if missing and len(writers) > 1 and _adapters(what, writers):
            shared = SharedFactors(what.checkpoint, targets_of(what.plan), stage.work)
            factors = stack.enter_context(shared)
        for name in missing:
            label = name if len(writers) > 1 else stage.out.name
            with what.bars(f"writing {label}") as progress:
                place = stage.place(folders[name])
                options = options_record(what, name, place.final.name)
                record = _told_from(what, place.name, options)
                baked = stage.artifacts.get("checkpoint")
                path = None if baked is None else baked.path
                run = CarrierRun(place, record, factors, path, progress)
                stage.finish(place.name, writers[name](run))


def _told_from(what: Export, folder: str, options: ExportOptions | None) -> Provenance:
    """Return the record for a folder in the output: the path of a local base leads from there."""
    assert what.record is not None
    base = what.record.base
    if folder and base.path is not None:
        base = structs.replace(base, path=f"../{base.path}")
    return structs.replace(what.record, base=base, export=options)


def _adapters(what: Export, names: Mapping[str, object]) -> bool:
    """Whether a carrier takes factors of the checkpoint's weights; a GGUF's are its own."""
    return "lora" in names or ("gguf-lora" in names and what.gguf is None)


def _identity(what: Export, names: Sequence[str]) -> Identity:
    types = dict(storage_types(what.gguf_type, "gguf_type"))
    options = [sorted(what.allow), types, what.most_kl, what.outtype, what.rounding]
    options.append(what.dequantize)
    base = [str(what.checkpoint.path), what.checkpoint.digest()]
    places = [None if path is None else str(path.resolve()) for path in (what.gguf, what.llama_cpp)]
    record = None if what.record is None else what.record.to_json()
    facts = [what.plan.digest, base, sorted(names), options, places, record]
    read = Stamps.of([] if what.gguf is None else [what.gguf])
    return identity_of(facts, what.checkpoint.files.stamps | read)
