"""The GGUF output by llama.cpp's own converter: from a baked checkpoint to one GGUF file."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bake import __version__
from bake.artifact.artifact import Artifact
from bake.artifact.carrier import KINDS
from bake.checkpoints import strictjson
from bake.checkpoints.gguf.codec import FLOATS
from bake.converter import convert
from bake.edit_store import EDITS, FITTED
from bake.errors import CheckpointError, InexactPlan, UsageError
from bake.families import RUNTIMES
from bake.outputs.checkpoint import RECORD
from bake.outputs.folder import digests, new_folder, sync
from bake.outputs.gguf.modelfile import MODELFILE, modelfile
from bake.plan import Plan, RuntimeVerdict
from bake.plan.record import runtimes_record
from bake.plan.targets import converted_runtimes
from bake.process import RuntimeMissing

SCRIPT = "convert_hf_to_gguf.py"


def convert_checkpoint(
    baked: Path,
    out: Path,
    *,
    llama_cpp: Path,
    outtype: str = "f16",
    name: str | None = None,
    python: Path | None = None,
    force: bool = False,
    timeout: float = 3600.0,
) -> Artifact:
    """Convert a checkpoint that bake wrote to GGUF, in the folder ``out``.

    Edits and record travel along, and a Modelfile for Ollama lies beside the file.

    Args:
        baked: a folder that ``export_checkpoint`` wrote, with its tokenizer.
        out: a folder that does not exist, unless ``force``.
        llama_cpp: a checkout of llama.cpp, or the folder with its converter script.
        outtype: ``f32``, ``f16``, ``bf16`` or ``q8_0``.
        name: the file's name without ``.gguf``; that of ``baked`` when None.
        python: an interpreter with torch, transformers and sentencepiece; this one when None.
        force: replace an artifact of bake at ``out``.
        timeout: seconds until the converter is killed.

    Raises:
        UsageError: there is no such outtype, or ``out`` is in the way.
        CheckpointError: ``baked`` is no checkpoint of bake.
        InexactPlan: llama.cpp would refuse the file, or drop a part of it.
        RuntimeMissing: there is no converter in ``llama_cpp``.
        RuntimeFailed: the converter failed; the end of its output is in the message.
    """
    record, small = _read(baked, RECORD), {EDITS: _read(baked, EDITS)}
    if (baked / FITTED).is_file():
        small[FITTED] = _read(baked, FITTED)
    if out.resolve() in (baked.resolve(), *baked.resolve().parents):
        raise UsageError(f"the output {out} holds the checkpoint", fix="name another output")
    file = f"{name or baked.resolve().name}-{outtype.upper()}.gguf"
    text = modelfile(file)
    content = strictjson.parse_object(
        strictjson.decode(record, where=RECORD), where=str(baked / RECORD)
    )
    verdicts = _recorded(content, baked)
    _refuse_unserved(verdicts, baked)
    with new_folder(out, force=force) as folder:
        interpreter = python or Path(sys.executable)
        convert(
            baked,
            folder / file,
            outtype,
            converter=llama_cpp / SCRIPT,
            python=interpreter,
            timeout=timeout,
        )
        (folder / MODELFILE).write_text(text, encoding="utf-8")
        for kept, data in small.items():
            (folder / kept).parent.mkdir(exist_ok=True)
            (folder / kept).write_bytes(data)
        size = (folder / file).stat().st_size
        files = digests(folder)
        (folder / RECORD).write_text(_record(content, verdicts, files, outtype), encoding="utf-8")
        with (folder / RECORD).open("rb") as written:
            files[RECORD] = hashlib.file_digest(written, "sha256").hexdigest()
        sync(folder)
    return Artifact("gguf", out, files, sum((out / f).stat().st_size for f in files), size)


def check_convertible(plan: Plan, llama_cpp: Path) -> None:
    """Raise when there is no converter, or when llama.cpp would not serve what it makes.

    Raises:
        InexactPlan: llama.cpp would refuse the file, or drop a part of it.
        RuntimeMissing: there is no converter in ``llama_cpp``.
    """
    _refuse_unserved(plan.runtimes, llama_cpp)
    if not (llama_cpp / SCRIPT).is_file():
        raise RuntimeMissing(
            f"there is no converter at {llama_cpp / SCRIPT}",
            fix="name a checkout of llama.cpp, whose folder holds it",
        )


def _read(baked: Path, name: str) -> bytes:
    path = baked / name
    if not path.is_file():
        raise CheckpointError(
            f"holds no {name}, so it was not written by bake",
            where=str(baked),
            fix="bake the checkpoint first, or convert it with llama.cpp directly",
        )
    return path.read_bytes()


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


def _recorded(content: Mapping[str, Any], baked: Path) -> tuple[RuntimeVerdict, ...]:
    """Return the verdicts on a checkpoint that its record holds.

    Raises:
        CheckpointError: it holds none on llama.cpp, or something else in their place.
    """
    match content:
        case {"plan": {"runtimes": [*entries]}}:
            verdicts = tuple(_verdict(entry, baked) for entry in entries)
            if any(verdict.runtime == KINDS["gguf"].loader for verdict in verdicts):
                return verdicts
    raise CheckpointError("says nothing of llama.cpp", where=str(baked / RECORD))


def _verdict(entry: Any, baked: Path) -> RuntimeVerdict:
    match entry:
        case {
            "runtime": str() as runtime,
            "status": ("exact" | "approximate" | "refused" | "not tested") as status,
            "reason": str() as reason,
            "wanted": bool() as wanted,
            "reads": bool() as reads,
            "known": bool() as known,
        } if runtime in RUNTIMES:
            return RuntimeVerdict(runtime, status, reason, wanted, reads, known)
    raise CheckpointError(
        f"plan.runtimes holds {entry!r:.80}, which is no verdict on a runtime",
        where=str(baked / RECORD),
        fix="bake the checkpoint anew with this version",
    )


def _record(
    content: Mapping[str, Any],
    verdicts: Sequence[RuntimeVerdict],
    files: Mapping[str, str],
    outtype: str,
) -> str:
    """Return the checkpoint's record as the GGUF file's: other files, and other runtimes."""
    gguf = {"converter": SCRIPT, "outtype": outtype}
    served = converted_runtimes(verdicts, KINDS["gguf"], codes=outtype.upper() not in FLOATS)
    plan = {**content["plan"], "runtimes": runtimes_record(served)}
    own = {"bake": __version__, "kind": "gguf", "plan": plan, "gguf": gguf, "files": dict(files)}
    return json.dumps({**content, **own}, indent=2, ensure_ascii=False) + "\n"
