"""``Export``: what is written and how, and what one carrier's writer is handed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bake.artifact.artifact import Artifact
from bake.artifact.schema import ExportOptions, GgufFile, Outtype, Provenance
from bake.artifact.staged import Place
from bake.checkpoints import Checkpoint
from bake.checkpoints.gguf.file import Gguf, open_gguf
from bake.checkpoints.hashes import sha256_of
from bake.outputs.shared import SharedFactors
from bake.plan import Plan
from bake.progress import Bars, Progress, no_bars
from bake.rounding import Rounding

CONVERTER = "convert_hf_to_gguf.py"
"""Of llama.cpp, in its checkout."""


@dataclass(frozen=True, slots=True, eq=False)
class Export:
    """A plan, the base that it was made for, and what the user says of the writing.

    Attributes:
        plan: made for ``checkpoint``.
        checkpoint: the base; a checkpoint and a converted GGUF need its weights at hand.
        record: what the artifact is made from: recipe, base, directions. The path of a local base
            in it is told from the output folder. The base alone when None.
        allow: the exactness classes below EXACT that the recipe accepts.
        force: replace an artifact of bake at the output.
        gguf: the base in GGUF, the first file of a split one: to be edited, or to make an adapter
            for, whose factors then come from its own weights.
        llama_cpp: a checkout of llama.cpp, whose converter makes a GGUF of the baked checkpoint.
        edited_type: for ``gguf`` the type of edited matrices that are stored in blocks; their own
            when None.
        outtype: for ``llama_cpp`` the type of the weights.
        rounding: for ``gguf``: ``feedback``, which makes the edit survive the rounding where the
            type allows and holds one matrix in memory, or ``nearest``, which under five bits undoes
            most edits.
        bars: asked for the progress of what is written, by its name.
    """

    plan: Plan
    checkpoint: Checkpoint
    record: Provenance | None = None
    allow: frozenset[str] = frozenset()
    force: bool = False
    gguf: Path | None = None
    llama_cpp: Path | None = None
    edited_type: str | None = None
    outtype: Outtype = "f16"
    rounding: Rounding = "feedback"
    bars: Bars = no_bars

    def model(self) -> Gguf | None:
        """Return the base in GGUF, opened, where one is named."""
        return None if self.gguf is None else open_gguf(self.gguf)


@dataclass(frozen=True, slots=True, eq=False)
class CarrierRun:
    """What one carrier's writer is handed: where it writes, and what the others have made.

    Attributes:
        place: where.
        record: what the artifact is made from, told from where the folder will be.
        factors: those that the carriers of this run share.
        baked: the checkpoint of this run, where it has one.
        progress: called with bytes done and bytes in all.
    """

    place: Place
    record: Provenance
    factors: SharedFactors | None = None
    baked: Path | None = None
    progress: Progress | None = None


CarrierWriter = Callable[[CarrierRun], Artifact]
"""Writes one carrier of an export; all that can be known to be wrong has been refused before."""


def options_record(export: Export, carrier: str, name: str) -> ExportOptions | None:
    """Return what a record keeps of the options that decide a carrier's bytes.

    Args:
        export: with the options.
        carrier: its name.
        name: of the output folder, which llama.cpp's converter makes the model's.
    """
    if carrier == "gguf" and export.llama_cpp is not None:
        digest = sha256(export.llama_cpp / CONVERTER)
        return ExportOptions(converter=digest, outtype=export.outtype, name=name)
    if export.gguf is None or carrier not in ("gguf", "gguf-lora"):
        return None
    parts = gguf_parts(export.gguf)
    if carrier == "gguf-lora":
        return ExportOptions(gguf=parts)
    return ExportOptions(gguf=parts, edited_type=export.edited_type, rounding=export.rounding)


def gguf_parts(path: Path) -> tuple[GgufFile, ...]:
    """Return the names and digests of the files of a GGUF model."""
    parts = [part.path for part in open_gguf(path).parts]
    return tuple(GgufFile(name=part.name, sha256=sha256(part)) for part in parts)


def sha256(path: Path) -> str:
    """Return the digest of a file, computed once for each state of it."""
    about = path.stat()
    return _sha256(path.resolve(), about.st_size, about.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, time: int) -> str:
    return sha256_of(path)
