"""At which tokens a steering system acts: a few closed words, what they mean, and their masks.

Weights act at every token. What a system's own hook does instead is measured beside it.

| word                  | tokens of a prompt of n tokens and its answer                            |
|-----------------------|--------------------------------------------------------------------------|
| ``all``               | every token                                                              |
| ``prompt``            | 0 to n − 1                                                               |
| ``first:k``           | 0 to k − 1, none of the answer                                           |
| ``last``              | from n − 1 on: the last token of each forward pass                       |
| ``after-instruction`` | from the instruction's last token on; all where there is none, as in CAA |
"""

import re
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Bool
from torch import Tensor

from bake.errors import UsageError
from bake.section import nearest

_FIRST = re.compile(r"first:([1-9][0-9]{0,8})")


class Word(StrEnum):
    """The positions that take no number."""

    ALL = "all"
    PROMPT = "prompt"
    LAST = "last"
    AFTER_INSTRUCTION = "after-instruction"


_SAID = {
    Word.ALL: "at every token",
    Word.PROMPT: "at the tokens of the prompt only",
    Word.LAST: "at the last token of the prompt and the generated ones only",
    Word.AFTER_INSTRUCTION: "from the end of the instruction on",
}


@dataclass(frozen=True, slots=True)
class Spoken:
    """What of a text is what: where its prompt and the instruction in it end."""

    prompt: int
    """Tokens of the prompt; those behind it are the answer's."""
    instruction: int | None
    """Tokens up to the end of the instruction; None for a text that holds none."""


@dataclass(frozen=True, slots=True)
class Positions:
    """Tokens of a text, by a rule."""

    text: str
    """As a recipe spells it."""

    def __post_init__(self) -> None:
        if self.text not in tuple(Word) and not _FIRST.fullmatch(self.text):
            raise UsageError(
                f"positions = {self.text!r} is unknown", fix=nearest(self.text, [*Word, "first:4"])
            )

    @property
    def words(self) -> str:
        """Where a system acts, in a few words."""
        first = _FIRST.fullmatch(self.text)
        if first is None:
            return _SAID[Word(self.text)]
        return (
            f"at the first {first[1]} tokens of the prompt only"
            if first[1] != "1"
            else ("at the first token of the prompt only")
        )

    def mask(self, length: int, spoken: Spoken) -> Bool[Tensor, " length"]:
        """Return which of the tokens of a text they are.

        Args:
            length: of the text.
            spoken: what of it is prompt.
        """
        at = torch.arange(length)
        first = _FIRST.fullmatch(self.text)
        if first is not None:
            return at < min(int(first[1]), spoken.prompt)
        match Word(self.text):
            case Word.ALL:
                return at >= 0
            case Word.PROMPT:
                return at < spoken.prompt
            case Word.LAST:
                return at >= spoken.prompt - 1
            case Word.AFTER_INSTRUCTION:
                return at >= (spoken.instruction or 0) - 1
