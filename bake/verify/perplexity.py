"""Perplexity of a text: how surprised base, hooked and baked model are by each of its tokens."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from time import perf_counter

import torch
from torch import Tensor

from bake.edits import Edit
from bake.verify.interval import Interval, clustered, mean
from bake.verify.models import Live
from bake.verify.runner import Runner, Source
from bake.verify.runs import batches_of

BATCH_TOKENS = 1024
"""Tokens in one forward pass: what bounds the memory of the logits."""

Losses = tuple[tuple[float, ...], ...]
"""−log p in nats of every token but the first of each passage, given those before it."""


def losses(live: Live, passages: Sequence[Sequence[int]], edits: Sequence[Edit] = ()) -> Losses:
    """Return how surprised a model is by every token of some passages.

    Args:
        live: the model, in float32: the weights as they are stored, and arithmetic that adds
            nothing to them.
        passages: token ids, two at least in each.
        edits: what to steer with; none for the model as it is.
    """
    found: list[tuple[float, ...]] = []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(live.under(edits))
        for batch in batches_of(passages, BATCH_TOKENS):
            logits = live.model(batch.tokens.to(live.device), use_cache=False).logits
            for row, tokens, length in zip(logits, batch.tokens, batch.lengths, strict=True):
                found.append(tuple(_losses(row[: length - 1].cpu(), tokens[1:length])))
    return tuple(found)


def _losses(logits: Tensor, after: Tensor) -> list[float]:
    loss = torch.nn.functional.cross_entropy(logits.to(torch.float64), after, reduction="none")
    values: list[float] = loss.tolist()
    return values


def losses_of(runner: Runner, name: str, passages: Sequence[Sequence[int]]) -> Losses:
    """Return the losses of base, hooked or baked model, as an earlier attempt left them or run now.

    Args:
        runner: holds the models.
        name: of the model.
        passages: token ids.
    """
    digest = hashlib.sha256(json.dumps(passages).encode()).hexdigest()
    label = f"perplexity of the {name} model"
    kept = runner.store.load(f"{label}, {digest}")
    if kept is not None:
        values = iter(kept[0]["losses"].tolist())
        return tuple(tuple(next(values) for _ in passage[1:]) for passage in passages)
    runner.inputs.asked.remark(label)
    start = perf_counter()
    source: Source
    source, edits = runner.sources[name]
    found = losses(runner.model(source, torch.float32), passages, edits)
    flat = torch.tensor([loss for passage in found for loss in passage], dtype=torch.float64)
    runner.store.save(f"{label}, {digest}", {"losses": flat}, perf_counter() - start)
    return found


def perplexity(found: Losses) -> Interval:
    """Return the perplexity, with the interval of the mean over tokens, exponentiated."""
    return mean([loss for passage in found for loss in passage]).exponentiated()


def perplexity_ratio(baked: Losses, base: Losses) -> Interval:
    """Return the baked model's perplexity over the base's, on the same passages.

    Tokens are compared one by one, so that what is hard to both models does not widen the interval,
    and a passage is one observation.
    """
    apart = [
        [ours - theirs for ours, theirs in zip(a, b, strict=True)]
        for a, b in zip(baked, base, strict=True)
    ]
    return clustered(apart).exponentiated()
