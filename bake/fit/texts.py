"""The prompts of one class as tokens, and which of them a fit looks at."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from bake.checkpoints.hashes import sha256_of
from bake.errors import InputError, UsageError
from bake.verify.prompts import entries_of, parse_prompts, read_lines
from bake.verify.tokenizer import encoded


class Position(StrEnum):
    """Which tokens of a prompt an example's activation is taken at."""

    LAST = "last"
    """The last token of the prompt as the template has it: behind the marker that asks for an
    answer, or behind the answer that the chat ends in."""
    MEAN = "mean"
    """The mean over all tokens but the first, whose activation is large and the same in every
    text."""
    ANSWER = "answer"
    """The mean over the model's own words at the end of a chat, and what the template closes them
    with."""


Span = tuple[int, int]
"""The first of some tokens, and the one behind the last."""


@dataclass(frozen=True, slots=True)
class Texts:
    """The prompts of one class."""

    path: Path
    tokens: tuple[tuple[int, ...], ...]
    spans: tuple[Span, ...]
    """Of each prompt, the tokens that its activation is the mean of."""
    form: str
    """What made tokens of them: the chat template, or plain text."""

    @property
    def provenance(self) -> str:
        """What a file of directions says of the class."""
        digest = sha256_of(self.path)
        return f"{self.path.name}, {len(self.tokens)} prompts as {self.form}, sha256:{digest}"


def read_texts(path: Path, tokenizer: Any, position: Position) -> Texts:
    """Return the prompts of a file, as ``bake.verify.prompts.read_prompts`` reads them.

    Raises:
        InputError: the file cannot be read; a line is no prompt, stands there twice, or has no
            token at the position.
    """
    lines = read_lines(path)
    found = parse_prompts(lines, path, tokenizer)
    first: dict[tuple[int, ...], int] = {}
    for number, tokens in enumerate(found.tokens, 1):
        if first.setdefault(tokens, number) != number:
            raise InputError(
                f"prompt {number} is prompt {first[tokens]} once more",
                where=str(path),
                why="one would be fitted and the other judge the fit",
                fix="leave it out",
            )
    starts = _starts(lines, path, tokenizer, found.tokens, position)
    spans = [(start, len(tokens)) for start, tokens in zip(starts, found.tokens, strict=True)]
    for number, (start, stop) in enumerate(spans, 1):
        if start >= stop:
            raise InputError(
                f"prompt {number} has no token but the first",
                where=str(path),
                fix=f"write more than one token, or use --position {Position.LAST}",
            )
    return Texts(path, found.tokens, tuple(spans), found.form)


def check_apart(positive: Texts, negative: Texts) -> None:
    """Refuse classes that share prompts or that differ in their form.

    Raises:
        UsageError: both are one file's.
        InputError: a prompt is in both, or one class is a chat and the other plain text.
    """
    shared = set(positive.tokens) & set(negative.tokens)
    if shared and len(shared) == len(positive.tokens) == len(negative.tokens):
        raise UsageError(
            "both classes hold the same prompts",
            where=f"{positive.path} and {negative.path}",
            fix="--positive names the prompts that have the concept, --negative the others",
        )
    if shared:
        numbers = [n for n, tokens in enumerate(positive.tokens, 1) if tokens in shared]
        raise InputError(
            f"{len(shared)} prompts are in both classes, first prompt {numbers[0]} of "
            f"{positive.path.name}",
            where=f"{positive.path} and {negative.path}",
            why="what is in both is an example of neither",
            fix="leave them out",
        )
    if positive.form != negative.form:
        raise InputError(
            f"one class is {positive.form} and the other {negative.form}",
            where=f"{positive.path} and {negative.path}",
            why="the template would tell them apart, whatever they say",
            fix="write both in one form",
        )


def _starts(
    lines: Sequence[str],
    path: Path,
    tokenizer: Any,
    tokens: Sequence[Sequence[int]],
    position: Position,
) -> list[int]:
    """Return where in each prompt the tokens begin that are looked at."""
    if position is Position.LAST:
        return [len(prompt) - 1 for prompt in tokens]
    if position is Position.MEAN:
        return [1 for _ in tokens]
    entries = entries_of(lines, path)
    return [
        _answer(kind, value, tokenizer, prompt, f"{path}, prompt {number}")
        for number, ((kind, value), prompt) in enumerate(zip(entries, tokens, strict=True), 1)
    ]


def _answer(kind: str, value: Any, tokenizer: Any, prompt: Sequence[int], where: str) -> int:
    """Return where the answer begins that a chat ends in."""
    if kind != "messages" or value[-1]["role"] != "assistant" or len(value) < 2:
        raise InputError(
            "the prompt ends in no answer",
            where=where,
            fix='write {"messages": [{"role": "user", …}, {"role": "assistant", …}]} in a .jsonl '
            f"file, or use --position {Position.LAST}",
        )
    asked, _ = encoded(tokenizer, kind, value[:-1], where)
    if list(prompt[: len(asked)]) != asked or len(asked) == len(prompt):
        raise InputError(
            "the chat template writes the question otherwise when an answer follows",
            where=where,
            why="where the answer begins cannot be told from the tokens",
            fix=f"use --position {Position.MEAN} or {Position.LAST}",
        )
    return len(asked)
