"""Which text perplexity is measured on: the recipe's own, or bake's in a language of the model.

A perplexity of text in a language that a model was never shown says nothing of an edit, and neither
does one of a model that knows no language. The rule is closed, and without a text that meets it
there is no perplexity:

1. ``--text FILE``, or the recipe's ``[verify] text``: whoever names it vouches for it.
2. bake's own passages, in the languages that the base's card states, in all of bake's where it
   states none, of these the ones that its tokenizer can write and that the base itself predicts at
   ``BITS`` or fewer bits a byte.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bake.errors import InputError
from bake.verify.inputs import Inputs
from bake.verify.perplexity import Losses, losses_of
from bake.verify.prompts import lines_of, own_texts, read_lines
from bake.verify.runner import Runner
from bake.verify.tokenizer import has_tokenizer, load_tokenizer, plain

BITS = 2.0
"""Bits a byte above which a model does not know a language. The letters of English alone, without
what stands before them, carry 4.1 (Shannon 1951), gzip needs 2.9 on Wikipedia (enwik8), and the
smallest GPT-2 needs 1.2 there (Radford et al. 2019). Bytes and not tokens: those of a language that
a tokenizer was not made for are short, and easy to guess one after another."""
LONGEST, MOST = 512, 8192
"""Tokens of a passage, and of all passages together."""
_ALL = "multilingual"


@dataclass(frozen=True, slots=True)
class Text:
    """Passages that perplexity is measured on."""

    source: str
    """``built-in``, or the name of a file."""
    language: str | None
    """Of bake's own passages; nobody says it of a file."""
    passages: tuple[tuple[int, ...], ...]
    """Token ids."""
    base: Losses | None = None
    """What the base makes of them, where it was asked in order to choose them."""

    def to_json(self) -> dict[str, Any]:
        """Return what a report says of the text."""
        return {
            "source": self.source,
            "language": self.language,
            "passages": len(self.passages),
            "tokens": sum(map(len, self.passages)),
        }


def text_of(runner: Runner) -> Text | str:
    """Return the text that the rule chooses, or why there is none."""
    inputs = runner.inputs
    folder, named = inputs.artifact.path, _named(inputs)
    if not has_tokenizer(folder):
        return "the artifact has no tokenizer"
    tokenizer = load_tokenizer(folder)
    if named is not None:
        source, lines = named
        return Text(source, None, _passages(tokenizer, lines, source))
    own: Mapping[str, Sequence[str]] = own_texts()["texts"]
    stated = _stated(inputs)
    wanted = [code for code in own if not stated or code in stated or _ALL in stated]
    if not wanted:
        return f"the base's card states {', '.join(stated)}, and bake has text in {', '.join(own)}"
    return _known(runner, tokenizer, {code: own[code] for code in wanted})


def _named(inputs: Inputs) -> tuple[str, Sequence[str]] | None:
    """Return name and lines of the text that somebody chose, or None."""
    path, limits = inputs.asked.text, inputs.artifact.record.verify
    if path is not None:
        return path.name, read_lines(path, "text")
    if limits is None or limits.text is None:
        return None
    return limits.text.file, lines_of(limits.text.text)


def _stated(inputs: Inputs) -> tuple[str, ...]:
    """Return the languages that the base's card states."""
    card = inputs.artifact.record.base.card
    found = () if card is None or card.language is None else card.language
    return (found,) if isinstance(found, str) else tuple(found)


def _known(runner: Runner, tokenizer: Any, texts: Mapping[str, Sequence[str]]) -> Text | str:
    """Return the passages in languages that the base predicts, or why there are none."""
    chosen: list[tuple[int, ...]] = []
    losses: list[tuple[float, ...]] = []
    codes, reasons = [], []
    for code, lines in texts.items():
        passages = _passages(tokenizer, lines, "built-in")
        if any(tokenizer.unk_token_id in passage for passage in passages):
            reasons.append(f"the tokenizer cannot write it in {code}")
            continue
        found = losses_of(runner, "base", passages)
        rate = _bits(found, lines)
        if rate > BITS:
            reasons.append(f"{rate:.1f} in {code}")
            continue
        chosen += passages
        losses += found
        codes.append(code)
    if not codes:
        rule = f"bake's own text is for bases that need {BITS:g} bits a byte of it or fewer"
        return f"{rule}: {', '.join(reasons)}"
    return Text("built-in", ", ".join(codes), tuple(chosen), tuple(losses))


def _bits(found: Losses, lines: Sequence[str]) -> float:
    size = sum(len(line.encode()) for line in lines)
    return sum(map(sum, found)) / math.log(2) / size


def _passages(tokenizer: Any, lines: Sequence[str], source: str) -> tuple[tuple[int, ...], ...]:
    """Return the first passages as token ids, cut to what is measured.

    Raises:
        InputError: one holds fewer than two tokens.
    """
    found: list[tuple[int, ...]] = []
    left = MOST
    for number, line in enumerate(lines, 1):
        if left < 2:
            break
        ids = tuple(plain(tokenizer, line)[: min(LONGEST, left)])
        if len(ids) < 2:
            raise InputError(
                f"passage {number} of the text holds {len(ids)} tokens",
                where=source,
                why="the first token of a passage is given, and there is no second to predict",
            )
        found.append(ids)
        left -= len(ids)
    return tuple(found)
