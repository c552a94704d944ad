"""Call llama.cpp's own converter, `convert_hf_to_gguf.py`, on a checkpoint folder."""

import tempfile
from pathlib import Path

from bake.errors import CheckpointError, UsageError
from bake.process import RuntimeMissing, run_script

OUTTYPES = ("f32", "f16", "bf16", "q8_0")


def find_converter(script: Path | None) -> Path:
    """Return llama.cpp's converter, once it is seen to be there.

    Raises:
        RuntimeMissing: it is not, or none was named.
    """
    if script is None:
        raise RuntimeMissing(
            "llama.cpp reads a GGUF file, and no converter was named",
            fix="name llama.cpp's convert_hf_to_gguf.py with --converter",
        )
    if not script.is_file():
        raise RuntimeMissing(
            f"there is no converter at {script}",
            fix="it is vendor/llama.cpp/convert_hf_to_gguf.py of llama-cpp-python's source archive",
        )
    return script


def convert(
    checkpoint: Path,
    out: Path,
    outtype: str = "f32",
    *,
    converter: Path,
    python: Path,
    timeout: float = 3600.0,
) -> None:
    """Write the GGUF file `out` from a checkpoint folder; nothing is left when that fails.

    The converter passes any bias tensor on, also one that llama.cpp then refuses to load, so only
    serving it shows that the file is good.

    Args:
        checkpoint: a folder with config.json, safetensors and a tokenizer.
        out: the file to write; its folder exists.
        outtype: one of OUTTYPES, the type of the matrices. One-dimensional tensors are float32.
        converter: `convert_hf_to_gguf.py`, with `conversion/` and `gguf-py/` beside it.
        python: an interpreter with torch, transformers, sentencepiece and protobuf.
        timeout: seconds until the converter is killed.

    Raises:
        UsageError: there is no such outtype.
        CheckpointError: the checkpoint has no config.json.
        RuntimeMissing: the script or the interpreter is not there.
        RuntimeFailed: the converter failed or took too long.
    """
    if outtype not in OUTTYPES:
        raise UsageError(f"outtype is {outtype!r}, and has to be one of {', '.join(OUTTYPES)}")
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(
            "the converter reads a checkpoint folder", where=f"{checkpoint}/config.json"
        )
    find_converter(converter)
    out = out.resolve()
    with tempfile.TemporaryDirectory(prefix=".bake-", dir=out.parent) as scratch:
        partial = Path(scratch) / out.name
        files: list[str | Path] = [converter.resolve(), checkpoint.resolve()]
        # -s leaves the user's packages out; -I would hide the converter's own modules beside it.
        run_script(
            "llama.cpp's converter",
            python,
            ["-s", *files, "--outfile", partial, "--outtype", outtype],
            folder=Path(scratch),
            timeout=timeout,
            variables={},
        )
        partial.replace(out)
