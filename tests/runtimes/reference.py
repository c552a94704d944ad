"""What transformers computes in float32 for the prompts that a runtime gets, from a live model.

The model may carry hooks: nothing here loads, saves or changes it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32

from bake.verify.runtimes.request import RuntimeResult


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    prompt_logprobs: tuple[Float32[np.ndarray, "_ vocab"], ...]
    """Per prompt [tokens, vocab]: row t is log p(next token | the first t + 1 tokens)."""

    greedy: tuple[tuple[int, ...], ...]
    """Per prompt, the arg-max continuation; an end-of-text token does not end it."""

    margins: tuple[tuple[float, ...], ...]
    """Per generated token, how far its log-probability lies above the next best one's."""


def reference_logprobs(
    model: torch.nn.Module, prompts: tuple[tuple[int, ...], ...], max_new_tokens: int
) -> Reference:
    """The model's answer, one prompt at a time and without a K/V cache: nothing to get wrong."""
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    tables = tuple(logprobs(model, prompt).numpy() for prompt in prompts)
    continued = [continue_greedily(model, prompt, max_new_tokens) for prompt in prompts]
    return Reference(tables, tuple(c[0] for c in continued), tuple(c[1] for c in continued))


@torch.no_grad()
def logprobs(model: torch.nn.Module, tokens: tuple[int, ...]) -> Float32[torch.Tensor, "t vocab"]:
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.log_softmax(-1)


def continue_greedily(
    model: torch.nn.Module, prompt: tuple[int, ...], count: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    tokens, margins = prompt, []
    for _ in range(count):
        values, ids = logprobs(model, tokens)[-1].topk(2)
        tokens = (*tokens, int(ids[0]))
        margins.append(float(values[0] - values[1]))
    return tokens[len(prompt) :], tuple(margins)


def largest_difference(reference: Reference, result: RuntimeResult | Reference) -> float:
    """max |Δ log p| over every prompt, position and token, in nats."""
    pairs = zip(reference.prompt_logprobs, result.prompt_logprobs, strict=True)
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)


def first_disagreement(
    reference: Reference, result: RuntimeResult | Reference, tolerance: float
) -> tuple[int, int] | None:
    """(prompt, step) of the first greedy token that differs, or None.

    Where the reference's own choice is closer than twice the tolerance to the next best token, the
    two may part in good faith and the rest of that prompt is not compared.
    """
    for prompt, (ours, theirs, margins) in enumerate(
        zip(reference.greedy, result.greedy, reference.margins, strict=True)
    ):
        for step, (a, b, margin) in enumerate(zip(ours, theirs, margins, strict=True)):
            if margin <= 2 * tolerance:
                break
            if a != b:
                return prompt, step
    return None
