"""The floor of what storage costs: the hooked base, its own weights moved as rounding moves values.

The edit's tensors have to be rounded to the storage type. What that alone does to the model's
answers is seen on weights that need no edit: the same tensors of the base, every value moved by a
number between −½ and ½ step of the type, as if it had been rounded from somewhere near it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bake.verify.runner import Runner
from bake.verify.runs import Trace

DRAWS = 3
"""How many times the weights are moved."""


def moved(runner: Runner, number: int) -> Trace:
    """Return a run of the hooked base in float32 over weights that were moved, in one of the draws.

    Of a merge it is the base without the adapter, whose layers stand in front of its weights.
    """
    inputs = runner.inputs
    names = [name for name in inputs.planned.model.tensors if name in inputs.base.tensors]
    tensors = {name: _drawn(runner, name, number) for name in names}
    name = f"base and hooks, weights moved by rounding, draw {number + 1}"
    return runner.trace(name, "base", torch.float32, inputs.artifact.edits, tensors=tensors)


def _drawn(runner: Runner, name: str, number: int) -> Callable[[], Tensor]:
    """Return what reads a weight, each value off by a number between −½ and ½ of its step."""

    def draw() -> Tensor:
        inputs = runner.inputs
        generator = torch.Generator().manual_seed(number)
        weight = inputs.base.read(name).to(torch.float32)
        errors = torch.rand(weight.shape, generator=generator).sub_(0.5)
        return errors.mul_(inputs.files.spacing(name, weight)).add_(weight)

    return draw
