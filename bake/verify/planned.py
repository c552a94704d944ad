"""``Planned``: what an artifact's plan comes to, computed by the fold and judged here.

Verification computes no edit of its own. It is handed the planned values, unrounded, and holds them
against the hooks (is the plan right?) and the files against them (do they hold it?).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from bake.checkpoints.gguf.file import Gguf
from bake.checkpoints.planned import PlannedModel, PlannedTensor


@dataclass(frozen=True, slots=True, eq=False)
class PlannedGguf:
    """What becomes of a GGUF of the base.

    Attributes:
        original: the base's own file.
        tensors: the changed and the new tensors, by their names in the file, in float64.
    """

    original: Gguf
    tensors: Mapping[str, PlannedTensor]


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """The plan of an artifact, made again.

    Attributes:
        model: what becomes of the base's checkpoint.
        gguf: what becomes of its GGUF, where the artifact is one and the base's is at hand.
        differences: why this is not the plan that the artifact's record names; none where it is.
    """

    model: PlannedModel
    gguf: PlannedGguf | None = None
    differences: tuple[str, ...] = ()
