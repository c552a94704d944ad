"""What the models are run on: bake's own prompts, a user's file, token ids, or random tokens.

bake's own are neutral requests in several languages and lengths, with the chat template of the
tokenizer where it has one, and a few plain texts for the perplexity.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from bake.errors import InputError

LONGEST = 64
"""Tokens of a prompt that are compared where nothing else is asked for."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Token ids of every prompt, and where they came from."""

    source: str
    """``built-in``, ``random``, ``given``, or the name of a file."""
    tokens: tuple[tuple[int, ...], ...]
    neutral: tuple[int, ...] = ()
    """Which of them are plain neutral text, for the perplexity."""

    @property
    def digest(self) -> str:
        """sha256 over the token ids: the same tokens were run."""
        return "sha256:" + hashlib.sha256(json.dumps(self.tokens).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return what a report says of the prompts."""
        return {
            "source": self.source,
            "prompts": len(self.tokens),
            "tokens": sum(map(len, self.tokens)),
            "digest": self.digest,
        }


def given_prompts(prompts: Sequence[Sequence[int]]) -> PromptSet:
    """Return token ids as prompts.

    Raises:
        InputError: there is none, or one is empty.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise InputError("there is no prompt, or one of them holds no token")
    return PromptSet("given", tuple(tuple(map(int, prompt)) for prompt in prompts))


def default_prompts(out: Path, vocab: int, longest: int = LONGEST) -> PromptSet:
    """Return bake's own prompts in the artifact's tokens, or random ones without a tokenizer."""
    if any((out / name).is_file() for name in _TOKENIZER_FILES):
        return built_in(load_tokenizer(out), longest)
    return random_prompts(vocab)


def random_prompts(vocab: int) -> PromptSet:
    """Return random token ids, 112 in five prompts of 8 to 48, the same every time."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(0, vocab, (length,), generator=generator).tolist()
        for length in (8, 8, 24, 24, 48)
    ]
    return PromptSet("random", tuple(map(tuple, prompts)))


def built_in(tokenizer: Any, longest: int = LONGEST) -> PromptSet:
    """Return bake's own prompts and texts, cut to ``longest`` tokens each."""
    text = (resources.files("bake.verify.data") / "neutral.json").read_text(encoding="utf-8")
    content = json.loads(text)
    prompts = [_chat(tokenizer, [{"role": "user", "content": p}]) for p in content["prompts"]]
    texts = [_plain(tokenizer, passage) for passage in content["texts"]]
    tokens = tuple(tuple(ids[:longest]) for ids in (*prompts, *texts))
    return PromptSet("built-in", tokens, tuple(range(len(prompts), len(tokens))))


def read_prompts(path: Path, out: Path, longest: int | None = None) -> PromptSet:
    """Return the prompts of a file in the artifact's tokens.

    A ``.jsonl`` file holds one object a line: ``{"prompt": text}``, ``{"text": text}`` or
    ``{"messages": [...]}``, the last through the chat template. Any other file is one text a line.

    Raises:
        InputError: the file cannot be read or holds no prompt, the artifact has no tokenizer, or
            there are messages and no chat template.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "no UTF-8 text"
        raise InputError(f"the prompts cannot be read: {reason}", where=str(path)) from error
    if not lines:
        raise InputError("the file holds no prompt", where=str(path), fix="write one a line")
    tokenizer = load_tokenizer(out)
    chat = path.suffix.lower() == ".jsonl"
    prompts = [
        _entry(tokenizer, line, f"{path}, prompt {number}") if chat else _plain(tokenizer, line)
        for number, line in enumerate(lines, 1)
    ]
    if not all(prompts):
        raise InputError("a prompt holds no token", where=str(path))
    made = given_prompts([ids[:longest] for ids in prompts])
    return replace(made, source=path.name)


def load_tokenizer(out: Path) -> Any:
    """Return the artifact's own tokenizer.

    Raises:
        InputError: transformers loads none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(out, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            "the artifact has no tokenizer that transformers loads",
            where=str(out),
            why=str(error).partition("\n")[0],
            fix="leave --prompts out to measure on random tokens",
        ) from error


def _entry(tokenizer: Any, line: str, where: str) -> list[int]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InputError(f"a line is no JSON: {error}", where=where) from error
    keys = [
        key for key in ("messages", "prompt", "text") if isinstance(entry, dict) and key in entry
    ]
    if len(keys) != 1:
        raise InputError(
            "a line of the file is no prompt",
            where=where,
            fix='write {"prompt": "text"} or {"messages": [{"role": "user", "content": "text"}]}',
        )
    value = entry[keys[0]]
    if keys[0] == "messages":
        if tokenizer.chat_template is None:
            raise InputError("the tokenizer has no chat template for messages", where=where)
        _check_messages(value, where)
        return _chat(tokenizer, value)
    if not isinstance(value, str):
        raise InputError(f"{keys[0]} is no text", where=where)
    return _plain(tokenizer, value)


def _check_messages(messages: Any, where: str) -> None:
    known = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not known or not messages:
        raise InputError("messages is no list of role and content", where=where)


def _plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    if tokenizer.chat_template is None:
        return _plain(tokenizer, "\n".join(message["content"] for message in messages))
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens itself.
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
