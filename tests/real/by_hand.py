"""The measure of the tests on a real model, which shares nothing with bake: hooks, and KL.

A hooked model is transformers' Llama whose blocks are written out here, with a map of the stream
behind the embedding, behind each attention and behind each MLP.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

Map = Callable[[Tensor], Tensor]
EVERYWHERE = "everywhere"


@contextmanager
def hooked(model: PreTrainedModel, edit: Map, where: str | int) -> Iterator[None]:
    """Put a map on the stream: everywhere, or behind one block."""
    blocks = list(model.model.layers)
    everywhere = where == EVERYWHERE
    handles = []
    if everywhere:
        embedding = model.model.embed_tokens
        handles.append(embedding.register_forward_hook(lambda module, args, out: edit(out)))
    for index, block in enumerate(blocks):
        middle = edit if everywhere else _same
        behind = edit if everywhere or where == index else _same
        block.forward = _block(block, middle, behind)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in blocks:
            del block.forward  # the class's own is there again


def _same(x: Tensor) -> Tensor:
    return x


def _block(block: torch.nn.Module, middle: Map, behind: Map) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, **rest: object) -> Tensor:
        attended, _ = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **rest)
        x = middle(hidden_states + attended)
        return behind(x + block.mlp(block.post_attention_layernorm(x)))

    return forward


@torch.no_grad()
def logprobs(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """Return [tokens, vocab] in float32: of every token of every text, one text after the other."""
    rows = [model(torch.tensor([text]), use_cache=False).logits[0] for text in texts]
    return torch.cat(rows).log_softmax(-1)


def mean_kl(reference: Tensor, other: Tensor) -> float:
    """Return the mean over tokens of KL(reference ‖ other), in nats."""
    total = 0.0
    for p, q in zip(reference.split(64), other.split(64), strict=True):
        p, q = p.double(), q.double()
        total += float((p.exp() * (p - q)).sum())
    return total / len(reference)


def lost(reference: Tensor, base: Tensor, served: Tensor) -> float:
    """Return what was lost of an edit: KL(hooked ‖ served) over KL(hooked ‖ base)."""
    return mean_kl(reference, served) / mean_kl(reference, base)
