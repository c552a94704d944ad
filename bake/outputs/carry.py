"""One export, several carriers: which function writes which, and what each needs to be refused."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from bake.checkpoints import Checkpoint
from bake.checkpoints.gguf_file import open_gguf
from bake.errors import UsageError
from bake.outputs.artifact import Artifact
from bake.outputs.checkpoint import export_checkpoint, refuse_inexact
from bake.outputs.control_vector import export_control_vector
from bake.outputs.folder import refuse_unfit
from bake.outputs.gguf import export_gguf
from bake.outputs.gguf_convert import convert_checkpoint
from bake.outputs.gguf_lora import export_gguf_lora
from bake.outputs.lora import export_lora
from bake.plan import Plan
from bake.rounding import Rounding

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What an export is told beyond its plan."""

    allow: frozenset[str] = frozenset()
    force: bool = False
    gguf: Path | None = None
    """The base in GGUF, to be edited."""
    llama_cpp: Path | None = None
    """A checkout of llama.cpp, whose converter makes a GGUF of the baked checkpoint."""
    edited_type: str | None = None
    outtype: str = "f16"
    rounding: str = "feedback"


def refuse(carrier: str, plan: Plan, options: Options) -> None:
    """Raise when a carrier does not hold the plan, or lacks an option.

    Raises:
        InexactPlan: a finding is not exact and not allowed, or a wanted runtime refuses the result.
        UsageError: an option is missing or contradicts another.
    """
    if options.rounding not in get_args(Rounding):
        raise UsageError(f"rounding is {options.rounding!r}, and has to be nearest or feedback")
    if carrier == "checkpoint":
        refuse_inexact(plan, options.allow)
    elif carrier == "gguf":
        if (options.gguf is None) == (options.llama_cpp is None):
            raise UsageError(
                "a GGUF is made from one of two things",
                fix="name the base's GGUF with --gguf FILE, or a llama.cpp checkout with "
                "--llama-cpp DIR",
            )
        only = tuple(v for v in plan.runtimes if v.runtime == "llama.cpp")
        refuse_inexact(replace(plan, runtimes=only), options.allow)
    else:
        refuse_unfit(plan, carrier, options.allow)


def write(
    carrier: str,
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    *,
    record: Mapping[str, Any],
    options: Options,
    progress: Progress | None = None,
) -> Artifact:
    """Write one carrier of a plan to the folder ``out`` and return what was written.

    Raises:
        BakeError: what the carrier's own function raises; nothing is left behind.
    """
    refuse(carrier, plan, options)
    allow, force = options.allow, options.force
    if carrier == "checkpoint":
        return export_checkpoint(
            plan,
            checkpoint,
            out,
            record=record,
            allow=allow,
            force=force,
            progress=progress,
        )
    if carrier == "lora":
        return export_lora(
            plan, checkpoint, out, record=record, allow=allow, force=force, progress=progress
        )
    if carrier == "gguf-lora":
        # For a quantised base the factors come from the weights that are served.
        model = None if options.gguf is None else open_gguf(options.gguf)
        return export_gguf_lora(
            plan,
            checkpoint,
            out,
            record=record,
            model=model,
            allow=allow,
            force=force,
            progress=progress,
        )
    if carrier == "control-vector":
        return export_control_vector(plan, out, record=record, force=force)
    if carrier != "gguf":
        raise UsageError(f"there is no carrier {carrier!r}")
    return _write_gguf(plan, checkpoint, out, record=record, options=options, progress=progress)


def _write_gguf(
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    *,
    record: Mapping[str, Any],
    options: Options,
    progress: Progress | None,
) -> Artifact:
    if options.gguf is not None:
        rounding: Rounding = "feedback" if options.rounding == "feedback" else "nearest"
        return export_gguf(
            plan,
            checkpoint,
            options.gguf,
            out,
            record=record,
            allow=options.allow,
            edited_type=options.edited_type,
            rounding=rounding,
            force=options.force,
            progress=progress,
        )
    assert options.llama_cpp is not None
    # The baked checkpoint is needed on the way only: beside the output, on the same disk.
    with tempfile.TemporaryDirectory(prefix=".bake-", dir=out.absolute().parent) as folder:
        baked = Path(folder) / out.name
        export_checkpoint(
            plan, checkpoint, baked, record=record, allow=options.allow, progress=progress
        )
        return convert_checkpoint(
            baked,
            out,
            llama_cpp=options.llama_cpp,
            outtype=options.outtype,
            name=out.name,
            force=options.force,
        )
