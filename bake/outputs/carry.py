"""One export, one carrier: which function writes which, and what each needs to be refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from bake.artifact.artifact import Artifact
from bake.artifact.base_digests import BASE_TENSORS
from bake.checkpoints import Checkpoint
from bake.checkpoints.gguf.file import Gguf, open_gguf
from bake.errors import UsageError
from bake.outputs.checkpoint import export_checkpoint
from bake.outputs.control_vector import check_control_vector, export_control_vector
from bake.outputs.folder import RECORD, check_apart, scratch_beside
from bake.outputs.gguf.convert import check_convertible, convert_checkpoint
from bake.outputs.gguf.edit import check_gguf, export_gguf
from bake.outputs.gguf.lora import check_gguf_lora, export_gguf_lora
from bake.outputs.lora import check_lora, export_lora
from bake.outputs.shared import SharedFactors
from bake.plan import Plan
from bake.plan import carriers as plan_carriers
from bake.progress import Progress
from bake.rounding import Rounding


@dataclass(frozen=True, slots=True)
class Options:
    """What an export is told beyond its plan."""

    allow: frozenset[str] = frozenset()
    force: bool = False
    gguf: Path | None = None
    """The base in GGUF: to be edited, or to make an adapter for."""
    llama_cpp: Path | None = None
    """A checkout of llama.cpp, whose converter makes a GGUF of the baked checkpoint."""
    edited_type: str | None = None
    outtype: str = "f16"
    rounding: str = "feedback"

    @property
    def rounds(self) -> Rounding:
        """How edited tensors of a GGUF are rounded."""
        return "feedback" if self.rounding == "feedback" else "nearest"

    def model(self) -> Gguf | None:
        """Return the base in GGUF, opened, where one is named."""
        return None if self.gguf is None else open_gguf(self.gguf)


@dataclass(frozen=True, slots=True)
class Beside:
    """What the other carriers of the same run have made, for the next one to use."""

    factors: SharedFactors | None = None
    baked: Path | None = None
    """The baked checkpoint, which llama.cpp's converter reads."""
    place: Path | None = None
    """Where the carrier's folder will be when the run is done."""


def refuse(carrier: str, plan: Plan, options: Options) -> None:
    """Raise when a carrier does not hold the plan, or lacks an option. No file is read.

    Raises:
        InexactPlan: a finding is not exact and not allowed, or a wanted runtime refuses the result.
        UsageError: an option is missing or contradicts another.
    """
    if options.rounding not in get_args(Rounding):
        raise UsageError(f"rounding is {options.rounding!r}, and has to be nearest or feedback")
    if carrier == "gguf" and (options.gguf is None) == (options.llama_cpp is None):
        raise UsageError(
            "a GGUF is made from one of two things",
            fix="name the base's GGUF with --gguf FILE, or a llama.cpp checkout with "
            "--llama-cpp DIR",
        )
    plan_carriers.refuse(plan, carrier, options.allow)


def check(carrier: str, plan: Plan, checkpoint: Checkpoint, options: Options) -> None:
    """Raise whatever can be known to be wrong before the first byte is written.

    Of the weights only what shows that a GGUF is one of the base is read.

    Raises:
        BakeError: what ``write`` would raise, save for what a weight or the disk decides.
    """
    refuse(carrier, plan, options)
    if carrier == "lora":
        check_lora(plan, options.allow)
    elif carrier == "gguf-lora":
        check_gguf_lora(plan, checkpoint, options.model(), options.allow)
    elif carrier == "control-vector":
        check_control_vector(plan)
    elif carrier == "gguf" and options.gguf is not None:
        check_gguf(
            plan,
            checkpoint,
            options.gguf,
            allow=options.allow,
            edited_type=options.edited_type,
            rounding=options.rounds,
        )
    elif carrier == "gguf":
        assert options.llama_cpp is not None
        check_convertible(plan, options.llama_cpp)


def write(
    carrier: str,
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    *,
    record: Mapping[str, Any],
    options: Options,
    beside: Beside = Beside(),
    progress: Progress | None = None,
) -> Artifact:
    """Write one carrier of a plan to the folder ``out`` and return what was written.

    Raises:
        BakeError: what the carrier's own function raises; nothing is left behind.
    """
    refuse(carrier, plan, options)
    check_apart(out, checkpoint.path, options.gguf)
    allow, force, shared = options.allow, options.force, beside.factors
    source = None if shared is None else shared.source
    if carrier == "checkpoint":
        return export_checkpoint(
            plan,
            checkpoint,
            out,
            record=record,
            allow=allow,
            force=force,
            shared=shared,
            progress=progress,
        )
    if carrier == "lora":
        return export_lora(
            plan,
            checkpoint,
            out,
            record=record,
            allow=allow,
            force=force,
            factors=source,
            progress=progress,
        )
    if carrier == "gguf-lora":
        return export_gguf_lora(
            plan,
            checkpoint,
            out,
            record=record,
            # For a quantised base the factors come from the weights that are served.
            model=options.model(),
            allow=allow,
            force=force,
            factors=source,
            place=beside.place,
            progress=progress,
        )
    if carrier == "control-vector":
        return export_control_vector(plan, out, record=record, force=force)
    if carrier != "gguf":
        raise UsageError(f"there is no carrier {carrier!r}")
    if options.gguf is None:
        return _convert(plan, checkpoint, out, record, options, beside, progress)
    return export_gguf(
        plan,
        checkpoint,
        options.gguf,
        out,
        record=record,
        allow=allow,
        edited_type=options.edited_type,
        rounding=options.rounds,
        force=force,
        progress=progress,
    )


def _convert(
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    record: Mapping[str, Any],
    options: Options,
    beside: Beside,
    progress: Progress | None,
) -> Artifact:
    """Convert the baked checkpoint, which is made for the moment where no carrier has made it."""
    assert options.llama_cpp is not None
    # Beside the output, on the same disk. The converter takes the model's name from the folder's.
    with scratch_beside(out.resolve()) as folder:
        baked = folder / out.name
        if beside.baked is not None:
            _link(beside.baked, baked, record)
        else:
            export_checkpoint(
                plan,
                checkpoint,
                baked,
                record=record,
                allow=options.allow,
                shared=beside.factors,
                progress=progress,
            )
        return convert_checkpoint(
            baked,
            out,
            llama_cpp=options.llama_cpp,
            outtype=options.outtype,
            name=out.name,
            force=options.force,
        )


def _link(folder: Path, link: Path, record: Mapping[str, Any]) -> None:
    """Make a folder of another name with links to the same files, and a record of its own."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            target = link / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path.resolve())
    content = json.loads((link / RECORD).read_text(encoding="utf-8"))
    own = {key: content[key] for key in ("bake", "kind")} | dict(record)
    own |= {key: content[key] for key in ("plan", BASE_TENSORS, "files")}
    (link / RECORD).unlink()
    (link / RECORD).write_text(json.dumps(own), encoding="utf-8")
