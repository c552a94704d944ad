"""The double of a relocated model: its norms divide by the lengths that the hooked stream has.

What is left between the two models is then rounding, if the construction is right. The lengths are
recorded on the hooked base and shared by nothing of the plan.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from harness import Base, logits
from torch import Tensor

from bake.edits import Edit


def read_norms(base: Base) -> list[str]:
    """Return the paths of the norms that readers of the stream stand behind."""
    found = [branch.norm_in.live for branch in base.layout.branches if branch.norm_in is not None]
    return [*dict.fromkeys(found), base.layout.final_norm.live]


def length(norm: Any, x: Tensor) -> Tensor:
    """Return the root that a norm divides by, times that of the width."""
    eps = next(getattr(norm, key) for key in ("variance_epsilon", "eps") if hasattr(norm, key))
    if isinstance(norm, torch.nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    return ((x.pow(2).mean(-1, keepdim=True) + eps) * x.shape[-1]).sqrt()


def recorded(base: Base, edits: list[Edit]) -> dict[str, Tensor]:
    """Return the lengths at every norm of the hooked base, with its logits as ""."""
    found: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, _: Any) -> None:
            found[name] = length(module, args[0])

        return hook

    with ExitStack() as stack:
        for name in read_norms(base):
            handle = base.model.get_submodule(name).register_forward_hook(record(name))
            stack.callback(handle.remove)
        found[""] = logits(base.model, base, edits)
    return found


@contextmanager
def seeing(model: Any, lengths: Mapping[str, Tensor]) -> Iterator[None]:
    """Run a model whose norms divide by the given lengths."""

    def rescale(name: str) -> Callable[..., Tensor]:
        def hook(module: Any, args: Any, out: Tensor) -> Tensor:
            bias = getattr(module, "bias", None)
            bias = torch.zeros(()) if bias is None else bias
            return (out - bias) * (length(module, args[0]) / lengths[name]) + bias

        return hook

    with ExitStack() as stack:
        for name in lengths.keys() - {""}:
            handle = model.get_submodule(name).register_forward_hook(rescale(name))
            stack.callback(handle.remove)
        yield
