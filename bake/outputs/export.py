"""``Export``: what is written and how, and what one carrier's writer is handed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from bake.artifact.artifact import Artifact
from bake.artifact.schema import ExportOptions, GgufFile, Outtype, Provenance, StorageRecord
from bake.artifact.staged import Place
from bake.checkpoints import Checkpoint
from bake.checkpoints.gguf.file import Gguf, open_gguf
from bake.checkpoints.gguf.storage import AUTO
from bake.checkpoints.hashes import sha256_of
from bake.outputs.shared import SharedFactors
from bake.plan import Plan
from bake.progress import Bars, Progress, no_bars
from bake.rounding import Rounding

MOST_KL = 0.05
"""How much of an edit's KL a choice of types may lose, where the recipe does not say."""
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
        gguf_type: for ``gguf`` the type of edited matrices that are stored in blocks, for all or by
            the kind of tensor (``storage_types``).
        most_kl: how much of the edit's KL the choice of types may lose.
        storage: what a record says of that choice, where the artifact is made again.
        outtype: for ``llama_cpp`` the type of the weights.
        rounding: ``feedback``, which makes the edit survive the rounding where the type allows, or
            ``nearest``, which under five bits undoes most edits. None: to nearest in a checkpoint,
            with feedback in codes, of a GGUF that is edited and of a quantised base.
        dequantize: of a quantised base, write every weight in a floating-point type.
        bars: asked for the progress of what is written, by its name.
    """

    plan: Plan
    checkpoint: Checkpoint
    record: Provenance | None = None
    allow: frozenset[str] = frozenset()
    force: bool = False
    gguf: Path | None = None
    llama_cpp: Path | None = None
    gguf_type: str | Mapping[str, str] = AUTO
    most_kl: float = MOST_KL
    storage: StorageRecord | None = None
    outtype: Outtype = "f16"
    rounding: Rounding | None = None
    dequantize: bool = False
    bars: Bars = no_bars

    def model(self) -> Gguf | None:
        """Return the base in GGUF, opened, where one is named."""
        return None if self.gguf is None else _opened(self.gguf)


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
        return ExportOptions(
            converter=digest, outtype=export.outtype, name=name, rounding=export.rounding
        )
    if carrier == "checkpoint" and (export.rounding is not None or export.dequantize):
        return ExportOptions(rounding=export.rounding, dequantize=export.dequantize)
    if export.gguf is None or carrier not in ("gguf", "gguf-lora"):
        return None
    parts = gguf_parts(export.gguf)
    if carrier == "gguf-lora":
        return ExportOptions(gguf=parts)
    return ExportOptions(gguf=parts, rounding=export.rounding or "feedback")


def gguf_parts(path: Path) -> tuple[GgufFile, ...]:
    """Return the names and digests of the files of a GGUF model."""
    parts = [part.path for part in _opened(path).parts]
    return tuple(GgufFile(name=part.name, sha256=sha256(part)) for part in parts)


def _opened(path: Path) -> Gguf:
    """Return a model, whose header is read once for each state of its first file."""
    if not path.is_file():
        return open_gguf(path)  # which says what is wrong with it
    about = path.stat()
    return _opened_at(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=1)
def _opened_at(path: Path, size: int, time: int) -> Gguf:
    return open_gguf(path)


def sha256(path: Path) -> str:
    """Return the digest of a file, computed once for each state of it."""
    about = path.stat()
    return _sha256(path.resolve(), about.st_size, about.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, time: int) -> str:
    return sha256_of(path)
