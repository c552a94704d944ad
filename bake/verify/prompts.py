"""What the models are run on: bake's own prompts, a user's file, token ids, or random tokens.

bake's own are neutral requests in several languages and lengths. A prompt is a user's turn: it goes
through the tokenizer's chat template, as it would where the model is served, and is plain text to a
base model that has none.
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
from bake.nearby import nearby
from bake.verify.tokenizer import CHAT, PLAIN, encoded, has_tokenizer, load_tokenizer

LONGEST = 64
"""Tokens of bake's own prompts as plain text; one in a chat keeps its end, which asks to answer."""
IDS = "token ids"


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Token ids of every prompt, where they came from, and what made them."""

    source: str
    """``built-in``, ``random``, ``given``, or the name of a file."""
    tokens: tuple[tuple[int, ...], ...]
    form: str
    """What made tokens of the texts: ``CHAT``, ``PLAIN``, both, or ``IDS`` for none."""

    @property
    def digest(self) -> str:
        """sha256 over the token ids: the same tokens were run."""
        return "sha256:" + hashlib.sha256(json.dumps(self.tokens).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return what a report says of the prompts."""
        return {
            "source": self.source,
            "form": self.form,
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
    return PromptSet("given", tuple(tuple(map(int, prompt)) for prompt in prompts), IDS)


def default_prompts(out: Path, vocab: int, longest: int | None = None) -> PromptSet:
    """Return bake's own prompts in the artifact's tokens, or random ones without a tokenizer."""
    if has_tokenizer(out):
        return built_in(load_tokenizer(out), longest)
    return random_prompts(vocab)


def random_prompts(vocab: int) -> PromptSet:
    """Return random token ids, 112 in five prompts of 8 to 48, the same every time."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(0, vocab, (length,), generator=generator).tolist()
        for length in (8, 8, 24, 24, 48)
    ]
    return PromptSet("random", tuple(map(tuple, prompts)), IDS)


def built_in(tokenizer: Any, longest: int | None = None) -> PromptSet:
    """Return bake's own prompts, cut to ``longest`` tokens each; plain text to ``LONGEST`` at most.

    A chat is not cut unless that is asked for: its last tokens are those that ask for an answer.
    """
    form = PLAIN if tokenizer.chat_template is None else CHAT
    if longest is None and form == PLAIN:
        longest = LONGEST
    tokens = (
        encoded(tokenizer, "prompt", prompt, "built-in")[0][:longest]
        for prompt in own_texts()["prompts"]
    )
    return PromptSet("built-in", tuple(map(tuple, tokens)), form)


def own_texts() -> Mapping[str, Any]:
    """Return bake's own ``prompts``, and its ``texts`` by the code of their language."""
    text = (resources.files("bake.verify.data") / "neutral.json").read_text(encoding="utf-8")
    content: Mapping[str, Any] = json.loads(text)
    return content


def read_prompts(path: Path, out: Path, longest: int | None = None) -> PromptSet:
    """Return the prompts of a file in the artifact's tokens.

    A ``.jsonl`` file holds one object a line: ``{"prompt": text}``, which is a user's turn,
    ``{"messages": [...]}``, which is a whole chat, or ``{"text": text}``, which stays as it is. Any
    other file is one prompt a line.

    Raises:
        InputError: the file cannot be read or holds no prompt, the artifact has no tokenizer, or
            its chat template does not take the messages.
    """
    lines = read_lines(path)
    tokenizer = load_tokenizer(out, otherwise="leave --prompts out to measure on random tokens")
    return parse_prompts(lines, path, tokenizer, longest)


def read_lines(path: Path, what: str = "prompts") -> list[str]:
    """Return the lines of a file of texts that hold anything.

    Args:
        path: the file.
        what: the texts are, for messages.

    Raises:
        InputError: the file cannot be read, or holds none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "no UTF-8 text"
        fix = nearby(path, f"name a file of {what}, one a line") if not path.exists() else None
        raise InputError(
            f"the {what} cannot be read: {reason}", where=str(path), fix=fix
        ) from error
    lines = lines_of(text)
    if not lines:
        raise InputError(f"the file holds no {what}", where=str(path), fix="write one a line")
    return lines


def lines_of(text: str) -> list[str]:
    """Return the lines of a text that hold anything."""
    return [line for line in text.splitlines() if line.strip()]


def parse_prompts(
    lines: Sequence[str], path: Path, tokenizer: Any, longest: int | None = None
) -> PromptSet:
    """Return the prompts that the lines of a file hold, as ``read_prompts`` does.

    Args:
        lines: of the file, each with something on it.
        path: where they are from; its ending says what a line is.
        tokenizer: of the artifact.
        longest: tokens of each prompt; all of them when None.

    Raises:
        InputError: a line is no prompt, or the chat template does not take it.
    """
    entries = entries_of(lines, path)
    prompts, forms = [], set()
    for number, (key, value) in enumerate(entries, 1):
        ids, form = encoded(tokenizer, key, value, f"{path}, prompt {number}")
        prompts.append(ids[:longest])
        forms.add(form)
    if not all(prompts):
        raise InputError("a prompt holds no token", where=str(path))
    form = " and ".join(word for word in (CHAT, PLAIN) if word in forms)
    return replace(given_prompts(prompts), source=path.name, form=form)


def entries_of(lines: Sequence[str], path: Path) -> list[tuple[str, Any]]:
    """Return what kind of prompt each line of a file is, and the prompt; see ``read_prompts``.

    Raises:
        InputError: a line is no prompt.
    """
    if path.suffix.lower() == ".jsonl":
        return [_entry(line, f"{path}, prompt {i}") for i, line in enumerate(lines, 1)]
    return [("prompt", line) for line in lines]


def _entry(line: str, where: str) -> tuple[str, Any]:
    """Return what kind of prompt a line of JSON holds, and the prompt."""
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
        _check_messages(value, where)
    elif not isinstance(value, str):
        raise InputError(f"{keys[0]} is no text", where=where)
    return keys[0], value


def _check_messages(messages: Any, where: str) -> None:
    known = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not known or not messages:
        raise InputError("messages is no list of role and content", where=where)
