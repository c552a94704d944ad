"""Run a model over the prompts: logits of every token, and what was asked to be observed."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from jaxtyping import Float
from torch import Tensor

from bake.edits import Edit
from bake.sites import Site, parse_site
from bake.verify.models import Live
from bake.verify.observe import Observed
from bake.verify.precision import double_precision

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By the names that files give them."""
BATCH_TOKENS = 4096
"""Tokens in one forward pass, padding included: what bounds the memory of the logits."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Prompts of like length, padded on the right: attention is causal, so no token sees it."""

    tokens: Tensor
    """[rows, length]"""
    lengths: tuple[int, ...]

    @property
    def keep(self) -> Tensor:
        """[rows, length], true where a token is none of padding."""
        return torch.arange(self.tokens.shape[1]) < torch.tensor(self.lengths).unsqueeze(1)


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What one run left, rows in the order of the batches' tokens."""

    logits: Float[Tensor, "tokens vocab"]
    """In the dtype of the run."""
    streams: dict[Site, Tensor]
    writes: tuple[Tensor, ...]
    seconds: float
    """Spent in the model's own forward passes."""

    def narrowed(self, width: int) -> "Trace":
        """Return the trace with the first dimensions of the stream alone."""
        streams = {site: value[:, :width] for site, value in self.streams.items()}
        writes = tuple(value[:, :width] for value in self.writes)
        return replace(self, streams=streams, writes=writes)

    def without_activations(self) -> "Trace":
        """Return the logits alone."""
        return replace(self, streams={}, writes=())

    def tensors(self) -> dict[str, Tensor]:
        """Return the trace as named tensors."""
        streams = {f"stream {site}": value for site, value in self.streams.items()}
        writes = {f"write {index}": value for index, value in enumerate(self.writes)}
        return {"logits": self.logits, **streams, **writes}


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without the library's."""
    return str(dtype).removeprefix("torch.")


def trace_of(tensors: Mapping[str, Tensor], seconds: float) -> Trace:
    """Return the trace that ``Trace.tensors`` named."""
    streams = {
        parse_site(name.removeprefix("stream ")): value
        for name, value in tensors.items()
        if name.startswith("stream ")
    }
    count = sum(name.startswith("write ") for name in tensors)
    writes = tuple(tensors[f"write {index}"] for index in range(count))
    return Trace(tensors["logits"], streams, writes, seconds)


def batches_of(prompts: Sequence[Sequence[int]], limit: int = BATCH_TOKENS) -> tuple[Batch, ...]:
    """Return the prompts in order, as few batches as the limit allows."""
    groups: list[list[Sequence[int]]] = []
    for prompt in prompts:
        trial = [*groups[-1], prompt] if groups else [prompt]
        if groups and len(trial) * max(map(len, trial)) <= limit:
            groups[-1] = trial
        else:
            groups.append([prompt])
    return tuple(_batch(group) for group in groups)


def halves(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """Return the same rows in other batches: each split in two, or doubled where it is one row."""
    split: list[Batch] = []
    for batch in batches:
        rows = batch.tokens.shape[0]
        if rows == 1:
            split.append(Batch(batch.tokens.repeat(2, 1), (batch.lengths[0], 0)))
        else:
            for part in (slice(0, rows // 2), slice(rows // 2, rows)):
                split.append(Batch(batch.tokens[part], batch.lengths[part]))
    return tuple(split)


def _batch(prompts: Sequence[Sequence[int]]) -> Batch:
    lengths = tuple(len(prompt) for prompt in prompts)
    longest = max(lengths)
    # A prompt's own last token pads it: a model may warn of its padding token among the inputs.
    rows = [[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts]
    return Batch(torch.tensor(rows), lengths)


def _joined(parts: list[Tensor]) -> Tensor:
    """Return batches of activations as one tensor; the list is emptied."""
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    parts.clear()
    return whole


def run(
    live: Live,
    batches: Sequence[Batch],
    edits: Sequence[Edit] = (),
    *,
    sites: Sequence[Site] = (),
    writes: bool = False,
) -> Trace:
    """Return the logits of every token, under the edits as hooks.

    Args:
        live: the model.
        batches: the prompts.
        edits: what to steer with; none for the model as it is.
        sites: stream sites to record.
        writes: whether to record what every writer adds to the stream.
    """
    record, seconds = Observed(), 0.0
    logits: Tensor | None = None
    filled, count = 0, sum(sum(batch.lengths) for batch in batches)
    dtype = live.model.dtype
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if dtype == torch.float64:
            stack.enter_context(double_precision())
        stack.enter_context(live.under(edits))
        for batch in batches:
            with live.observed(batch.keep, record, sites=sites, writes=writes):
                start = perf_counter()
                tokens = batch.tokens.to(live.device)
                result = live.model(tokens, use_cache=False).logits
                seconds += perf_counter() - start
            if logits is None:
                logits = torch.empty(count, result.shape[-1], dtype=result.dtype)
            # They are most of a run's memory: no part of them is held twice but this batch's.
            for row, length in zip(result, batch.lengths, strict=True):
                logits[filled : filled + length] = row[:length]
                filled += length
            del result, row
    streams = {site: _joined(parts) for site, parts in record.streams.items() if parts}
    assert logits is not None, "there are prompts"
    return Trace(logits, streams, tuple(map(_joined, record.writes)), seconds)
