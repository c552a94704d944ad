"""Free-running text: the most likely token, again and again, as transformers generates it."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bake.edits import Edit
from bake.verify.models import Live
from bake.verify.runs import batches_of

_SIDE_BY_SIDE = 16
"""Prompts that are answered at a time."""


@dataclass(frozen=True, slots=True)
class Generated:
    """Greedy continuations, in the order of the prompts."""

    tokens: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...] = ()
    """Per token, how far its logit lies above that of the next best one, where that is known."""
    seconds: float = 0.0
    """Spent in the model's own forward passes."""

    def first(self, prompts: int, count: int) -> "Generated":
        """Return the beginnings of the first few continuations."""
        return Generated(
            tuple(row[:count] for row in self.tokens[:prompts]),
            tuple(row[:count] for row in self.margins[:prompts]),
        )


def generate(
    live: Live, prompts: Sequence[Sequence[int]], count: int, edits: Sequence[Edit] = ()
) -> Generated:
    """Return ``count`` greedy tokens after each prompt; an end-of-text token does not end them."""
    tokens: list[tuple[int, ...]] = []
    margins: list[tuple[float, ...]] = []
    seconds = 0.0
    if not count:
        return Generated(((),) * len(prompts), ((),) * len(prompts))
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(live.under(edits))
        for batch in batches_of(prompts):
            # Each row ends where its new tokens begin: padding is on the left, and masked.
            width = batch.tokens.shape[1]
            rows = torch.stack(
                [row.roll(width - n) for row, n in zip(batch.tokens, batch.lengths, strict=True)]
            )
            mask = torch.arange(width) >= width - torch.tensor(batch.lengths).unsqueeze(1)
            start = perf_counter()
            made = _generate(live, rows, mask.long(), count)
            seconds += perf_counter() - start
            tokens += [tuple(row) for row in made.sequences[:, width:].tolist()]
            best = torch.stack(made.logits, dim=1).double().topk(2).values
            margins += [tuple(row) for row in (best[..., 0] - best[..., 1]).tolist()]
    return Generated(tuple(tokens), tuple(margins), seconds)


def _generate(live: Live, rows: torch.Tensor, mask: torch.Tensor, count: int) -> Any:
    """Return what transformers generates: the sequences, and the logits of every step."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    # What a checkpoint asks for (penalties, sampling, where a text ends) is no arg-max, and what a
    # config leaves unsaid is taken from the model's own.
    live.model.generation_config = config
    device = live.device
    return live.model.generate(
        rows.to(device), attention_mask=mask.to(device), generation_config=config
    )


def answers(
    live: Live,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    count: int,
    edits: Sequence[Edit] = (),
) -> list[str]:
    """Return the greedy answer of a model to every prompt, up to where it ends it.

    What is not said here, penalties for example, comes from the model's own generation config.

    Args:
        live: the model.
        prompts: token ids.
        tokenizer: what makes text of the answers' tokens.
        count: how many tokens an answer has at most.
        edits: hooks that it is answered under.
    """
    from transformers import GenerationConfig

    own = live.model.generation_config
    ends = None if own is None else own.eos_token_id
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=ends,
        # Padding is masked out, so that any token will do where there is none for it.
        pad_token_id=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    texts: list[str] = []
    for start in range(0, len(prompts), _SIDE_BY_SIDE):
        rows = prompts[start : start + _SIDE_BY_SIDE]
        longest = max(map(len, rows))
        # On the left, so that every answer follows its prompt.
        padded = [[rows[0][0]] * (longest - len(row)) + [*row] for row in rows]
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(longest) >= longest - lengths.unsqueeze(1)
        with torch.no_grad(), live.under(edits):
            found: Any = live.model.generate(
                torch.tensor(padded).to(live.device),
                attention_mask=mask.to(live.device, torch.long),
                generation_config=settings,
            )
        texts += tokenizer.batch_decode(found[:, longest:].cpu(), skip_special_tokens=True)
    return texts


def as_answered(
    answers: Sequence[Sequence[int]], logits: Float[Tensor, "tokens vocab"], tolerance: float
) -> list[tuple[int, ...] | None]:
    """Return what a run over another model's answers shows of a model's own greedy text.

    As long as its most likely token is the answer's, it is run on its own text. So a continuation
    is known to the token with which it parts from the answer, that one included, or to the end.
    None where a choice among these is closer than two evaluations lie apart: token by token the
    model may make another one.

    Args:
        answers: of each prompt.
        logits: of every token that an answer's next token is chosen after, and of the last.
        tolerance: what two evaluations may differ by in a logit.
    """
    values, tokens = logits.topk(2)
    sure = (values[:, 0] - values[:, 1] > 2 * tolerance).tolist()
    best, start = tokens[:, 0].tolist(), 0
    found: list[tuple[int, ...] | None] = []
    for answer in answers:
        own = best[start : start + len(answer)]
        same = [ours == token for ours, token in zip(own, answer, strict=True)]
        known = same.index(False) + 1 if False in same else len(same)
        clear = all(sure[start : start + known])
        found.append(tuple(own[:known]) if clear else None)
        start += len(answer) + 1
    return found


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Return the share of our tokens before the first one that differs, over all continuations.

    Theirs may end with the token that differs.
    """
    same = total = 0
    for a, b in zip(ours, theirs, strict=True):
        total += len(a)
        for x, y in zip(a, b, strict=len(a) == len(b)):
            if x != y:
                break
            same += 1
    return same / total


def disagreement(
    reference: Generated, theirs: Sequence[Sequence[int]], tolerance: float
) -> tuple[int, int] | None:
    """Return (prompt, step) of the first token that differs though the reference was sure of it.

    Where the reference's own choice is closer than twice the tolerance to the next best token, the
    two may part in good faith, and the rest of that continuation is not compared.
    """
    for prompt, (ours, margins) in enumerate(zip(reference.tokens, reference.margins, strict=True)):
        for step, (token, margin) in enumerate(zip(ours, margins, strict=True)):
            if margin <= 2 * tolerance:
                break
            if token != theirs[prompt][step]:
                return prompt, step
    return None
