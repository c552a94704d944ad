"""The floor of what storage costs: the hooked base, its own weights moved as rounding moves values.

The edit's tensors have to be rounded to the storage type. What that alone does to the model's
answers is seen on weights that need no edit: the same tensors of the base, every value moved by a
number between −½ and ½ step of the type, as if it had been rounded from somewhere near it.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int16
from torch import Tensor

from bake.verify.runner import Runner
from bake.verify.runs import Trace

DRAWS = 3
"""How many times the weights are moved."""
MOST_DRAWS = 12
"""How many times where the files lose more than the first draws allow."""
_BITS = 16
"""Of a random number: 65,536 places between −½ and ½ of a step."""
_STRETCH = 1 << 16
"""Values that are moved at a time: all that is made of them stays in a cache."""


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
        weight = inputs.base.read(name).to(torch.float32, copy=True)
        errors = _whole(weight.numel(), number, name)
        pairs = (torch.split(values, _STRETCH) for values in (weight.view(-1), errors))
        for part, some in zip(*pairs, strict=True):
            steps = inputs.files.spacing(name, part)
            moves = some.to(torch.float32).mul_(2.0**-_BITS).mul_(steps)
            # A zero next to which a step is no normal number would make products many times slower.
            part += torch.nn.functional.hardshrink(moves, torch.finfo(torch.float32).tiny)
        return weight

    return draw


def _whole(count: int, draw: int, name: str) -> Int16[Tensor, " count"]:
    """Return random whole numbers of ``_BITS`` bits: four of them in one draw of NumPy's.

    Each tensor has its own: alike in all blocks, errors would add up as those of rounding do not.
    """
    raw = np.random.SFC64([draw, *name.encode()]).random_raw(-(-count * _BITS // 64))
    return torch.from_numpy(raw.view(np.int16)[:count])
