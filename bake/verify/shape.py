"""``Shape``: what a verification has to know of a model, whatever its class."""

from dataclasses import dataclass

import torch

from bake.checkpoints import Checkpoint
from bake.checkpoints.planned import PlannedModel
from bake.errors import InputError
from bake.families import Layout
from bake.verify.models import config_of, on_meta
from bake.verify.units import stream_blocks


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a model is, and what it is stored in."""

    layers: int
    hidden: int
    """Dimensions of the residual stream."""
    vocab: int
    dtype: str
    """As safetensors spells it."""
    blocks: tuple[str, ...]
    """Paths of the live modules that the residual stream runs through; empty where not known."""


def shape_of(layout: Layout) -> Shape:
    """Return the shape of a model that a table describes."""
    sizes = layout.layers, layout.hidden, layout.dims["vocab"]
    return Shape(*sizes, layout.dtype, layout.live_blocks)


def shape_of_class(base: Checkpoint, planned: PlannedModel) -> Shape:
    """Return the shape of a model of any class, from its configuration.

    transformers knows the sizes by one name in every class. What rounds is the narrowest type among
    the tensors that are changed.

    Args:
        base: the checkpoint.
        planned: what becomes of it.

    Raises:
        InputError: the configuration does not say a size.
    """
    text = config_of(base).get_text_config()

    def size(name: str) -> int:
        found = getattr(text, name, None)
        if not isinstance(found, int):
            raise InputError(
                f"{type(text).__name__} does not say {name}",
                where=base.source,
                why="the tolerances of a verification depend on it",
            )
        return found

    sizes = size("num_hidden_layers"), size("hidden_size"), size("vocab_size")
    blocks = stream_blocks(on_meta(base, torch.float32))
    return Shape(*sizes, planned.narrowest, blocks)
