"""What an edit does to the text that a model writes: perplexity, and scores of a behaviour.

A score turns each generated text into a number. Three kinds: ``contains:WORD`` (1 where the word
occurs), ``classifier:MODEL`` (the probability of the model's last label), and a command that reads
one JSON string a line on standard input and prints one number a line.
"""

import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bake.errors import InputError, UsageError

NORMAL = 1.959964  # the 97.5 % point of the normal distribution: intervals hold 95 %
TIMEOUT = 3600.0  # seconds that a command may take


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    count: int


def perplexity(
    logits: Tensor, tokens: Sequence[Sequence[int]], which: Sequence[int]
) -> Interval | None:
    """Return the perplexity of some prompts, each token given those before it.

    Args:
        logits: [tokens, vocab] of all prompts, one after another.
        tokens: the prompts.
        which: indices of the prompts that count.

    The interval is that of the mean log-probability over tokens, exponentiated.
    """
    starts, position = [], 0
    for prompt in tokens:
        starts.append(position)
        position += len(prompt)
    losses = []
    for index in which:
        prompt, start = tokens[index], starts[index]
        rows = logits[start : start + len(prompt) - 1].to(torch.float64).log_softmax(-1)
        losses += rows.gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).neg().flatten().tolist()
    if len(losses) < 2:
        return None
    mean = _mean(losses)
    return Interval(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), mean.count)


def scorer(spec: str) -> Callable[[Sequence[str]], Interval]:
    """Return what scores texts, found to be there before hours are spent on the texts for it.

    Raises:
        UsageError: the score is of no known kind, or names nothing.
        InputError: there is no such classifier or command; of the scorer, a command that fails.
    """
    kind, separator, rest = spec.partition(":")
    if not spec.strip():
        raise UsageError(
            "a score is empty", fix="write contains:WORD, classifier:MODEL or a command"
        )
    if not separator or kind not in _NAMES:
        words = _words(spec)
        return lambda texts: _mean(_command(words, texts))
    if not rest.strip():
        raise UsageError(f"the score {spec!r} names nothing", fix=f"write {kind}:{_NAMES[kind]}")
    if kind == "contains":
        word = rest.casefold()
        return lambda texts: share([word in text.casefold() for text in texts])
    loaded = _load_classifier(rest)
    return lambda texts: _mean(_classify(*loaded, texts))


_NAMES = {"contains": "WORD", "classifier": "MODEL"}


def _words(command: str) -> list[str]:
    """Return a command's words.

    Raises:
        InputError: it does not parse, or its program is not there.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"the score's command does not run: {error}", where=command) from error
    if not words or shutil.which(words[0]) is None:
        raise InputError(
            "the score's command does not run: there is no such program",
            where=command,
            fix="write contains:WORD, classifier:MODEL or a command",
        )
    return words


def share(hits: Sequence[bool]) -> Interval:
    """Return a share with Wilson's interval (Wilson 1927), which holds at 0 and 1 as well."""
    n, p = len(hits), sum(hits) / len(hits)
    z2 = NORMAL**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half), n)


def _mean(values: Sequence[float]) -> Interval:
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Interval(mean, mean, mean, n)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return Interval(mean, mean - NORMAL * spread, mean + NORMAL * spread, n)


def _load_classifier(model: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        classifier: Any = AutoModelForSequenceClassification.from_pretrained(model).eval()
    except (OSError, ValueError) as error:
        raise InputError(
            f"the classifier cannot be loaded: {str(error).partition(chr(10))[0]}", where=model
        ) from error
    return tokenizer, classifier


def _classify(tokenizer: Any, classifier: Any, texts: Sequence[str]) -> list[float]:
    values = []
    with torch.no_grad():
        for text in texts:
            # A text of no tokens is no input; a space is one to every tokenizer.
            inputs = tokenizer(text or " ", return_tensors="pt", truncation=True)
            values.append(float(classifier(**inputs).logits[0].softmax(-1)[-1]))
    return values


def _command(words: Sequence[str], texts: Sequence[str]) -> list[float]:
    command = shlex.join(words)
    lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
    try:
        done = subprocess.run(words, input=lines, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise InputError(f"the score's command does not run: {error}", where=command) from error
    if done.returncode != 0:
        raise InputError(
            f"the score's command ends with status {done.returncode}",
            where=command,
            why=done.stderr.strip()[-400:] or None,
        )
    try:
        values = [float(line) for line in done.stdout.split()]
    except ValueError as error:
        raise InputError(f"the score's command prints no number: {error}", where=command) from error
    if len(values) != len(texts) or not all(map(math.isfinite, values)):
        raise InputError(
            f"the score's command prints {len(values)} numbers for {len(texts)} texts",
            where=command,
            fix="print one finite number for every line that is read",
        )
    return values
