"""The parts that a model is loaded in: the embedding, one block, the final norm, the head.

A part is a module of the live model with the checkpoint's tensors that belong to it. Loading one
part goes through transformers' own conversion, so that a tensor which the class holds in another
form (experts stacked into one) is loaded as ``from_pretrained`` loads it.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bake.errors import CheckpointError, FamilyError
from bake.families import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Read = Callable[[str], Tensor]
"""Returns a tensor of the checkpoint by its name."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One part of a model."""

    module: str
    """Path of the live module."""
    tensors: tuple[str, ...]
    """Names in the checkpoint; those of a tied head are the embedding's."""
    tied: bool = False
    buffers: tuple[str, ...] = ()
    """Those of them that the class may leave out, such as masks that old checkpoints stored."""


def units_of(layout: Layout) -> tuple[Unit, ...]:
    """Return the parts of a model, which together hold every tensor that its class loads.

    Raises:
        FamilyError: a tensor of the checkpoint is in none of them.
    """
    blocks = []
    for layer in range(layout.layers):
        path = layout.block_live.replace("{layer}", str(layer))
        bare = path.removeprefix(layout.family.block.optional_prefix)
        names = tuple(n for n in layout.shapes if n.startswith((f"{path}.", f"{bare}.")))
        blocks.append(Unit(path, names, buffers=tuple(set(names) & set(layout.untouched))))
    norm, head = layout.final_norm, layout.unembed
    units = (
        Unit(layout.embed_live, (layout.embed,)),
        *(
            Unit(live, (name,))
            for live, name in zip(layout.family.embed.positions, layout.positions, strict=True)
        ),
        *blocks,
        Unit(norm.live, (norm.weight, *(() if norm.bias is None else (norm.bias,)))),
        Unit(str(head.live), _head(layout), tied=not layout.head_is_stored),
    )
    held = {name for unit in units for name in unit.tensors}
    stray = sorted(set(layout.shapes) - held)
    if stray:
        raise FamilyError(
            f"the tensor {stray[0]} is in no part of the model", where=layout.family.name
        )
    return units


def _head(layout: Layout) -> tuple[str, ...]:
    bias = layout.unembed.bias
    weight = layout.unembed.weight if layout.head_is_stored else layout.embed
    return (weight, bias.name) if bias.state == "present" else (weight,)


def load_unit(
    model: "PreTrainedModel", unit: Unit, read: Read, *, only: Collection[str] | None = None
) -> None:
    """Give the parameters of one part the values that ``read`` returns, in the model's dtype.

    Args:
        model: the live model.
        unit: the part.
        read: returns a tensor by its name.
        only: the tensors that are read; all of the part when None.

    Raises:
        CheckpointError: transformers does not expect a tensor, or expects another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    module = model.get_submodule(unit.module)
    # On a model that is spread over devices, each parameter goes back to where it was.
    places = {name: p.device for name, p in module.named_parameters() if not p.is_meta}
    if unit.tied:
        weight = read(unit.tensors[0]).to(model.dtype).to(places.get("weight", "cpu"))
        module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        return
    config = LoadStateDictConfig(
        dtype=model.dtype, weight_mapping=get_model_conversion_mapping(model)
    )
    names = unit.tensors if only is None else [name for name in unit.tensors if name in only]
    tensors: Mapping[str, Tensor] = {name: read(name) for name in names}
    info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config, None)
    unexpected = [key for key in info.unexpected_keys if not key.endswith(unit.buffers)]
    wrong = [*unexpected, *info.mismatched_keys, *info.error_msgs]
    wrong += list(info.conversion_errors)
    if wrong:
        raise CheckpointError(
            f"transformers does not load {wrong[0]} of {unit.module}",
            why="a tensor that the class does not expect changes the model in silence",
        )
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(places.get(name, parameter.device))
        if parameter.is_meta:
            raise CheckpointError(f"the checkpoint leaves a parameter of {unit.module} unset")


def drop_unit(model: "PreTrainedModel", unit: Unit) -> None:
    """Free the memory of one part's parameters: they keep their shapes and hold nothing."""
    for module in model.get_submodule(unit.module).modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device="meta")
            module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
