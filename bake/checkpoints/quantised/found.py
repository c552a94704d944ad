"""What a format finds in a checkpoint, and what it says where configuration and tensors disagree.

Both have to agree: a tensor of codes that the configuration knows nothing of, or the other way
round, is another model's, and decoding it by either alone would be a guess.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from bake.checkpoints.quantised.coded import Coded
from bake.checkpoints.quantised.stored import Stored
from bake.errors import CheckpointError


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The quantised weights of a checkpoint.

    Attributes:
        coded: each of them.
        loose: tensors that are about activations and caches, and belong to no quantised weight.
    """

    coded: tuple[Coded, ...]
    loose: tuple[str, ...] = ()


def disagreeing(checkpoint: Stored, method: str, why: str) -> CheckpointError:
    """Return what it means that the configuration's method is not what the tensors are."""
    return CheckpointError(
        f"config.json says that the weights are quantised by {method}, and the tensors disagree: "
        f"{why}",
        where=checkpoint.source,
        fix="fetch config.json and the weights again, or start from the unquantised base",
    )


def beside(checkpoint: Stored, module: str, suffixes: Iterable[str]) -> tuple[str, ...]:
    """Return the tensors of a module that go with its codes, of those that a format knows."""
    names = (f"{module}.{suffix}" for suffix in suffixes)
    return tuple(name for name in names if name in checkpoint.tensors)
