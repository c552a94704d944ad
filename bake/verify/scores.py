"""What an edit does to the text that a model writes: scores of a behaviour.

A score turns each generated text into a number. Three kinds: ``contains:WORD`` (1 where the word
occurs), ``classifier:MODEL`` (the probability of the model's last label), and a command that reads
one JSON string a line on standard input and prints one number a line.
"""

import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bake.errors import InputError, UsageError
from bake.verify.interval import Interval, mean_or_share

TIMEOUT = 3600.0  # seconds that a command may take


@dataclass(frozen=True, slots=True)
class Score:
    """What makes numbers of texts."""

    values: Callable[[Sequence[str]], list[float]]
    """One number for each text."""
    unit: bool
    """Whether no number lies outside of 0 and 1."""

    def interval(self, values: Sequence[float]) -> Interval:
        """Return the mean of what ``values`` returned."""
        return mean_or_share(values, unit=self.unit)


Scored = Mapping[str, tuple[Score, Mapping[str, list[float]]]]
"""Every score with its value of every text, by model."""


def scorer(spec: str) -> Score:
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
        return Score(lambda texts: _command(words, texts), unit=False)
    if not rest.strip():
        raise UsageError(f"the score {spec!r} names nothing", fix=f"write {kind}:{_NAMES[kind]}")
    if kind == "contains":
        word = rest.casefold()
        return Score(lambda texts: [float(word in t.casefold()) for t in texts], unit=True)
    loaded = _load_classifier(rest)
    return Score(lambda texts: _classify(*loaded, texts), unit=True)


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
