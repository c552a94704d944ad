"""The tokenizer of a model, and its chat template: how a prompt becomes tokens."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from bake.errors import InputError, first_line

CHAT, PLAIN = "chat template", "plain text"
"""What makes tokens of a text."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def has_tokenizer(out: Path) -> bool:
    """Tell whether a folder holds a tokenizer."""
    return any((out / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(
    out: Path, *, otherwise: str = "put its files beside the model, tokenizer.json among them"
) -> Any:
    """Return the tokenizer of an artifact or a model.

    Args:
        out: the folder.
        otherwise: what can be done without one.

    Raises:
        InputError: transformers loads none.
    """
    try:
        # Not through links: a cache may hold some whose files are gone.
        state = tuple((f.name, f.lstat().st_mtime_ns) for f in sorted(out.iterdir()))
        return _loaded(out, state)
    except (OSError, ValueError) as error:
        raise InputError(
            "there is no tokenizer that transformers loads",
            where=str(out),
            why=str(error).partition("\n")[0],
            fix=otherwise,
        ) from error


@lru_cache(maxsize=2)
def _loaded(out: Path, state: tuple[tuple[str, int], ...]) -> Any:
    """Return a tokenizer, once for every state of its folder: it takes seconds."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(out, local_files_only=True, trust_remote_code=False)


def encoded(tokenizer: Any, kind: str, value: Any, where: str) -> tuple[list[int], str]:
    """Return the token ids of a prompt, and what made them: ``CHAT`` or ``PLAIN``.

    Args:
        tokenizer: of the model.
        kind: ``prompt`` for a user's turn, ``messages`` for a whole chat, ``text`` for text that
            stays as it is.
        value: the text, or the list of messages.
        where: what messages name.

    Raises:
        InputError: messages, and there is no chat template; or it does not take them.
    """
    from jinja2 import TemplateError

    if kind == "prompt":
        kind = "text" if tokenizer.chat_template is None else "messages"
        value = value if kind == "text" else [{"role": "user", "content": value}]
    if kind == "text":
        return plain(tokenizer, value), PLAIN
    if tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template for messages", where=where)
    try:
        return _chat(tokenizer, value), CHAT
    except TemplateError as error:
        raise InputError(
            f"the chat template does not take this prompt: {first_line(error)}",
            where=where,
            fix='change its roles, or write {"text": …} in a .jsonl file for text as it is',
        ) from error


def plain(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text as it is."""
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    # A chat that ends in the model's own words asks for none.
    ask = messages[-1]["role"] != "assistant"
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    # The template writes the special tokens itself.
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
