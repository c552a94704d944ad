"""The GGUF output by llama.cpp's own converter: from a baked checkpoint to one GGUF file."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from msgspec import structs

from bake.artifact.artifact import Artifact
from bake.artifact.carrier import KINDS
from bake.artifact.record import RECORD, new_record, read_record, record_text
from bake.artifact.schema import GgufRecord, Provenance, Record, RuntimeVerdict
from bake.artifact.staged import Place, digests
from bake.checkpoints.gguf.codec import FLOATS
from bake.checkpoints.writer import EmptyFolder
from bake.converter import convert
from bake.edit_store import EDITS, FITTED
from bake.errors import CheckpointError, InexactPlan
from bake.families import RUNTIMES
from bake.outputs.checkpoint import write_edited
from bake.outputs.export import CONVERTER, CarrierRun, CarrierWriter, Export
from bake.outputs.gguf.modelfile import MODELFILE, modelfile
from bake.plan.targets import converted_runtimes
from bake.process import RuntimeMissing


@dataclass(frozen=True, slots=True)
class Conversion:
    """How llama.cpp's converter is run.

    Attributes:
        llama_cpp: a checkout of llama.cpp, or the folder with its converter script.
        outtype: ``f32``, ``f16``, ``bf16`` or ``q8_0``.
        python: an interpreter with torch, transformers and sentencepiece; this one when None.
        timeout: seconds until the converter is killed.
    """

    llama_cpp: Path
    outtype: str = "f16"
    python: Path | None = None
    timeout: float = 3600.0

    def run(self, baked: Path, file: Path) -> None:
        """Convert a checkpoint to the file.

        Raises:
            UsageError: there is no such outtype.
            RuntimeMissing: there is no converter in ``llama_cpp``.
            RuntimeFailed: the converter failed; the end of its output is in the message.
        """
        convert(
            baked,
            file,
            self.outtype,
            converter=self.llama_cpp / CONVERTER,
            python=self.python or Path(sys.executable),
            timeout=self.timeout,
        )


def prepare_conversion(export: Export) -> CarrierWriter:
    """Return what converts the baked checkpoint, which is made for the moment where there is none.

    Raises:
        InexactPlan: llama.cpp would refuse the file, or drop a part of it.
        RuntimeMissing: there is no converter in ``llama_cpp``.
    """
    assert export.llama_cpp is not None
    script = export.llama_cpp / CONVERTER
    _refuse_unserved(export.plan.runtimes, export.llama_cpp)
    if not script.is_file():
        raise RuntimeMissing(
            f"there is no converter at {script}",
            fix="name a checkout of llama.cpp, whose folder holds it",
        )
    return partial(_write, export, Conversion(export.llama_cpp, export.outtype))


def _write(export: Export, how: Conversion, run: CarrierRun) -> Artifact:
    # The converter takes the model's name from the folder's.
    with run.place.scratch() as folder:
        baked = folder / run.place.final.name
        base = export.checkpoint
        if run.baked is not None and (export.dequantize or not base.coded):
            _link(run.baked, baked, run.record)
        else:
            baked.mkdir()
            # Of a quantised base the converter is given values: it would round codes once more.
            plain = replace(export, dequantize=bool(base.coded))
            write_edited(plain, run, EmptyFolder(baked))
        return convert_checkpoint(baked, run.place, how)


def _link(folder: Path, link: Path, record: Provenance) -> None:
    """Make a folder of another name with links to the same files, and a record of its own."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            target = link / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path.resolve())
    found = read_record(folder)
    own = new_record(
        record, found.kind, found.plan, files=found.files, base_tensors=found.base_tensors
    )
    (link / RECORD).unlink()
    (link / RECORD).write_text(record_text(own), encoding="utf-8")


def convert_checkpoint(baked: Path, place: Place, how: Conversion) -> Artifact:
    """Convert a checkpoint that bake wrote to GGUF, under the name of its folder.

    Edits and record travel along, and a Modelfile for Ollama lies beside the file.

    Args:
        baked: a folder that an export wrote, with its tokenizer.
        place: where to write.
        how: the converter, and the type of the weights.

    Raises:
        CheckpointError: ``baked`` is no checkpoint of bake.
        InexactPlan: llama.cpp would refuse the file, or drop a part of it.
        BakeError: what ``Conversion.run`` raises.
    """
    for name in (RECORD, EDITS):
        _require(baked, name)
    small = {EDITS: (baked / EDITS).read_bytes()}
    if (baked / FITTED).is_file():
        small[FITTED] = (baked / FITTED).read_bytes()
    file, folder = f"{baked.resolve().name}-{how.outtype.upper()}.gguf", place.folder
    small[MODELFILE] = modelfile(file).encode()
    record = read_record(baked)
    verdicts = _recorded(record, baked)
    _refuse_unserved(verdicts, baked)
    how.run(baked, folder / file)
    for kept, data in small.items():
        (folder / kept).parent.mkdir(exist_ok=True)
        (folder / kept).write_bytes(data)
    text = record_text(_converted(record, verdicts, digests(folder), how.outtype))
    (folder / RECORD).write_text(text, encoding="utf-8")
    files, own = digests(folder), (folder / file).stat().st_size
    size = sum((folder / name).stat().st_size for name in files)
    return Artifact("gguf", place.final, files, size, own)


def _require(baked: Path, name: str) -> None:
    if not (baked / name).is_file():
        raise CheckpointError(
            f"holds no {name}, so it was not written by bake",
            where=str(baked),
            fix="bake the checkpoint first, or convert it with llama.cpp directly",
        )


def _refuse_unserved(verdicts: Sequence[RuntimeVerdict], where: Path) -> None:
    """Raise when llama.cpp does not serve the checkpoint, by the verdicts on it.

    The converter drops the output head of a Gemma without a word, and passes biases on that the
    loader then refuses.
    """
    for verdict in verdicts:
        if verdict.runtime != KINDS["gguf"].loader:
            continue
        if verdict.status == "refused" or not verdict.known:
            raise InexactPlan(
                f"llama.cpp would not serve this checkpoint as it is meant ({verdict.status})",
                where=str(where),
                why=verdict.reason,
                fix="choose an edit that fits, or a runtime that loads the checkpoint",
            )


def _recorded(record: Record, baked: Path) -> tuple[RuntimeVerdict, ...]:
    """Return the verdicts on a checkpoint that its record holds.

    Raises:
        CheckpointError: it holds none on llama.cpp, or one on a runtime that nobody knows.
    """
    verdicts = record.plan.runtimes
    names = {verdict.runtime for verdict in verdicts}
    if KINDS["gguf"].loader not in names:
        raise CheckpointError("says nothing of llama.cpp", where=str(baked / RECORD))
    if strange := sorted(names - set(RUNTIMES)):
        raise CheckpointError(
            f"plan.runtimes holds {strange[0]!r:.80}, which is no runtime",
            where=str(baked / RECORD),
            fix="bake the checkpoint anew with this version",
        )
    return verdicts


def _converted(
    record: Record,
    verdicts: Sequence[RuntimeVerdict],
    files: Mapping[str, str],
    outtype: str,
) -> Record:
    """Return the checkpoint's record as the GGUF file's: other files, and other runtimes."""
    served = converted_runtimes(verdicts, KINDS["gguf"], codes=outtype.upper() not in FLOATS)
    return new_record(
        record.provenance,
        "gguf",
        structs.replace(record.plan, runtimes=served),
        files=files,
        base_tensors=record.base_tensors,
        gguf=GgufRecord(converter=CONVERTER, outtype=outtype),
    )
