"""Run a model under edits, and look at a writer's input and the stream behind it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bake.edits import Edit
from bake.families import Layout
from bake.steer import steered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOGETHER = 2048  # tokens of one batch


def batches_of(prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the prompts as [batch, length], only equal lengths together: nothing is padded."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt), []).append(prompt)
    batches = []
    for length, group in sorted(by_length.items()):
        size = max(1, _TOGETHER // length)
        batches += [torch.tensor(group[i : i + size]) for i in range(0, len(group), size)]
    return batches


@torch.no_grad()
def observe(
    model: "PreTrainedModel",
    layout: Layout,
    edits: Sequence[Edit],
    tokens: Tensor,
    modules: Sequence[str],
) -> dict[str, Float[Tensor, "n w"]]:
    """Return the inputs of some modules, one row a token, in a run under edits.

    The run ends where the last of them is entered: later blocks and the head have nothing to tell.
    """
    seen: dict[str, Tensor] = {}
    with steered(model, layout, edits), _watched(model, modules, seen):
        try:
            model(input_ids=tokens.to(model.device), use_cache=False)
        except _SeenAllError:
            pass
    return seen


class _SeenAllError(Exception):
    """Every module that is watched was entered."""


@torch.no_grad()
def divergence(
    model: "PreTrainedModel",
    layout: Layout,
    reference: Sequence[Edit],
    other: Sequence[Edit],
    batches: Sequence[Tensor],
) -> float:
    """Return the mean KL(reference ‖ other) over all tokens, in nats."""
    total, count = 0.0, 0
    for tokens in batches:
        p, q = (_log_probabilities(model, layout, edits, tokens) for edits in (reference, other))
        total += float((p.exp() * (p - q)).sum())
        count += p.shape[0] * p.shape[1]
    return total / count


def _log_probabilities(
    model: "PreTrainedModel", layout: Layout, edits: Sequence[Edit], tokens: Tensor
) -> Tensor:
    with steered(model, layout, edits):
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits
    found: Tensor = logits.double().log_softmax(-1)
    return found


@contextmanager
def _watched(
    model: "PreTrainedModel", modules: Sequence[str], seen: dict[str, Tensor]
) -> Iterator[None]:
    """Keep what enters the modules; set after the hooks of edits, so that it sees their effect."""
    with ExitStack() as stack:
        for name in modules:
            module: nn.Module = model.get_submodule(name)
            keep = _keep(name, seen, len(modules))
            handle = module.register_forward_pre_hook(keep, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _keep(name: str, seen: dict[str, Tensor], count: int) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        value = args[0] if args else next(iter(kwargs.values()))
        seen[name] = value.detach().flatten(0, -2).cpu()
        if len(seen) == count:
            raise _SeenAllError

    return hook
