"""Activations of prompts: one forward pass for all sites, of which one row a prompt is kept.

What is kept is examples × sites × width × 4 bytes, in float32; beside it a batch is in memory.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from bake.fit.sweep import Activations
from bake.fit.texts import Span, Texts
from bake.progress import Tally
from bake.sites import Site
from bake.steer import See, watched
from bake.verify.models import Live
from bake.verify.precision import double_precision
from bake.verify.runs import batches_of


@torch.no_grad()
def collect(live: Live, texts: Texts, sites: Sequence[Site], tally: Tally) -> Activations:
    """Return the activations [prompts, d] of every site in float32, in the order of the prompts.

    The output head is not computed. Means are taken in float64.

    Args:
        live: the model, with a layout.
        texts: the prompts, and which of their tokens are looked at.
        sites: where.
        tally: told of every prompt.

    Raises:
        InputError: an activation is not finite.
        UsageError: the model has no such site.
    """
    assert live.layout is not None, "only what a table describes is looked at"
    # Prompts of like length go together, so that little is padded.
    order = sorted(range(len(texts.tokens)), key=lambda i: len(texts.tokens[i]))
    rows: dict[Site, list[Tensor]] = {site: [] for site in sites}
    begun = 0
    for batch in batches_of([texts.tokens[i] for i in order]):
        count = len(batch.lengths)
        spans = [texts.spans[i] for i in order[begun : begun + count]]
        see = _keeper(rows, spans, batch.tokens.shape)
        with watched(live.model, live.layout, sites, see), _precision(live):
            # Without the head, whose logits would be most of the memory.
            live.model.base_model(batch.tokens.to(live.device), use_cache=False)
        begun += count
        tally.advance(count)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return {site: torch.cat(parts)[back] for site, parts in rows.items()}


def _precision(live: Live) -> AbstractContextManager[None]:
    return double_precision() if live.model.dtype == torch.float64 else nullcontext()


def _keeper(rows: Mapping[Site, list[Tensor]], spans: Sequence[Span], shape: Sequence[int]) -> See:
    def see(site: Site, x: Tensor) -> None:
        # Some modules take and give [batch · length, d]: OPT's MLP, Llama 4's mixture.
        rows[site].append(_pooled(x.reshape(*shape, x.shape[-1]), spans))

    return see


def _pooled(x: Float[Tensor, "batch length d"], spans: Sequence[Span]) -> Float[Tensor, "batch d"]:
    """Return each row's mean over its tokens, on the processor."""
    means = [x[i, start:stop].to(torch.float64).mean(0) for i, (start, stop) in enumerate(spans)]
    return torch.stack(means).to("cpu", torch.float32)
