"""The GGUF output by llama.cpp's own converter: from a baked checkpoint to one GGUF file."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bake import __version__
from bake.checkpoints import strictjson
from bake.converter import convert
from bake.errors import CheckpointError, InexactPlan, UsageError
from bake.outputs.artifact import Artifact
from bake.outputs.checkpoint import EDITS, RECORD
from bake.outputs.folder import digests, new_folder, sync
from bake.outputs.modelfile import MODELFILE, modelfile

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
    record, edits = _read(baked, RECORD), _read(baked, EDITS)
    if out.resolve() in (baked.resolve(), *baked.resolve().parents):
        raise UsageError(f"the output {out} holds the checkpoint", fix="name another output")
    file = f"{name or baked.resolve().name}-{outtype.upper()}.gguf"
    text = modelfile(file)
    content = strictjson.parse_object(
        strictjson.decode(record, where=RECORD), where=str(baked / RECORD)
    )
    _refuse_unserved(content, baked)
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
        (folder / EDITS).parent.mkdir()
        (folder / EDITS).write_bytes(edits)
        size = (folder / file).stat().st_size
        files = digests(folder)
        (folder / RECORD).write_text(_record(content, outtype, files), encoding="utf-8")
        with (folder / RECORD).open("rb") as written:
            files[RECORD] = hashlib.file_digest(written, "sha256").hexdigest()
        sync(folder)
    return Artifact("gguf", out, files, sum((out / f).stat().st_size for f in files), size)


def _read(baked: Path, name: str) -> bytes:
    path = baked / name
    if not path.is_file():
        raise CheckpointError(
            f"holds no {name}, so it was not written by bake",
            where=str(baked),
            fix="bake the checkpoint first, or convert it with llama.cpp directly",
        )
    return path.read_bytes()


def _refuse_unserved(content: Mapping[str, Any], baked: Path) -> None:
    """Raise when the checkpoint's own record says that llama.cpp does not serve it.

    The converter drops the output head of a Gemma without a word, and passes biases on that the
    loader then refuses.
    """
    match content:
        case {"plan": {"runtimes": [*verdicts]}}:
            for verdict in verdicts:
                match verdict:
                    case {"runtime": "llama.cpp", "status": "loads"}:
                        return
                    case {"runtime": "llama.cpp", "status": status, "reason": reason}:
                        raise InexactPlan(
                            f"llama.cpp would not serve this checkpoint as it is meant ({status})",
                            where=str(baked),
                            why=str(reason),
                            fix="choose an edit that fits, or a runtime that loads the checkpoint",
                        )
    raise CheckpointError("says nothing of llama.cpp", where=str(baked / RECORD))


def _record(content: Mapping[str, Any], outtype: str, files: Mapping[str, str]) -> str:
    """Return the checkpoint's record as the GGUF file's, which has files of its own."""
    gguf = {"converter": SCRIPT, "outtype": outtype}
    own = {"bake": __version__, "kind": "gguf", "gguf": gguf, "files": dict(files)}
    return json.dumps({**content, **own}, indent=2, ensure_ascii=False) + "\n"
