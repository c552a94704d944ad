"""Free-running text: the most likely token, again and again, without a cache to get wrong."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter

import torch

from bake.edits import Edit
from bake.steer import steered
from bake.verify.models import Live
from bake.verify.runs import batches_of


@dataclass(frozen=True, slots=True)
class Generated:
    """Greedy continuations, in the order of the prompts."""

    tokens: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]
    """Per token, how far its logit lies above that of the next best one."""
    seconds: float = 0.0
    """Spent in the model's own forward passes."""


def generate(
    live: Live, prompts: Sequence[Sequence[int]], count: int, edits: Sequence[Edit] = ()
) -> Generated:
    """Return ``count`` greedy tokens after each prompt; an end-of-text token does not end them."""
    rows = [list(prompt) for prompt in prompts]
    margins: list[list[float]] = [[] for _ in rows]
    seconds = 0.0
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if edits:
            stack.enter_context(steered(live.model, live.layout, edits))
        for _ in range(count):
            done = 0
            for batch in batches_of(rows):
                start = perf_counter()
                logits = live.model(batch.tokens.to(live.device), use_cache=False).logits
                seconds += perf_counter() - start
                last = torch.tensor(batch.lengths) - 1
                ends = logits[torch.arange(len(last)), last.to(logits.device)].cpu()
                values, ids = ends.double().topk(2)
                for row, (value, best) in enumerate(zip(values, ids, strict=True), done):
                    rows[row].append(int(best[0]))
                    margins[row].append(float(value[0] - value[1]))
                done += len(last)
    made = (tuple(row[len(prompt) :]) for row, prompt in zip(rows, prompts, strict=True))
    return Generated(tuple(made), tuple(map(tuple, margins)), seconds)


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Return the share of tokens before the first one that differs, over all continuations."""
    same = total = 0
    for a, b in zip(ours, theirs, strict=True):
        total += len(a)
        for x, y in zip(a, b, strict=True):
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
