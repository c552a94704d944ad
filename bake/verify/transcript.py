"""``Transcript``: what every model is run on, prompts with the hooked model's answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Transcript:
    """Prompts, each with the greedy answer of the hooked model; some have none."""

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """Every prompt with its answer behind it."""
        pairs = zip(self.prompts, self.answers, strict=True)
        return tuple((*prompt, *answer) for prompt, answer in pairs)

    def rows(self, count: int) -> int:
        """Return how many tokens the first few prompts have, with their answers."""
        return sum(map(len, self.tokens[:count]))

    @property
    def speaking(self) -> Bool[Tensor, " tokens"]:
        """True at every token after which an answer's next token is chosen."""
        parts = []
        for prompt, answer in zip(self.prompts, self.answers, strict=True):
            part = torch.zeros(len(prompt) + len(answer), dtype=torch.bool)
            if answer:
                part[len(prompt) - 1 :] = True
            parts.append(part)
        return torch.cat(parts)


def unanswered(prompts: Sequence[Sequence[int]]) -> Transcript:
    """Return prompts without answers."""
    kept = tuple(tuple(prompt) for prompt in prompts)
    return Transcript(kept, ((),) * len(kept))
