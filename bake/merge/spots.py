"""The parameters that a wrapped model computes with, each with PEFT's layers for it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from bake.errors import InputError
from bake.merge.wrapping import NAME


@dataclass(frozen=True, slots=True, eq=False)
class Spot:
    """One parameter that the model computes with, and what PEFT's layers add to it."""

    key: str
    value: Tensor
    layers: tuple[Any, ...]
    """PEFT's layers for it, the outer ones first."""
    tokens: Any = None
    """PEFT's layer that puts single rows in its place, or None."""


_NONE: Mapping[str, tuple[Any, ...]] = MappingProxyType({})


def spots_of(
    module: nn.Module, where: str, path: str = "", layers: Mapping[str, tuple[Any, ...]] = _NONE
) -> Iterator[Spot]:
    """Yield every parameter that runs, by the path that it has without PEFT."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, TrainableTokensWrapper):
        yield from _with_tokens(module.token_adapter, where, path, layers)
        return
    if isinstance(module, ModulesToSaveWrapper):
        yield from spots_of(module.modules_to_save[NAME], where, path, layers)
        return
    if isinstance(module, LoraLayer):
        name = getattr(module, "parameter_name", "weight")
        more = {**layers, name: (*layers.get(name, ()), module)}
        yield from spots_of(module.base_layer, where, path, more)
        return
    yield from _own(module, where, path, layers)
    for name, child in module._modules.items():
        if child is not None:
            yield from spots_of(child, where, f"{path}.{name}" if path else name)


def _with_tokens(
    layer: Any, where: str, path: str, layers: Mapping[str, tuple[Any, ...]]
) -> Iterator[Spot]:
    """Yield the parameters of a table, or a head, of which single rows are other ones.

    ``layers`` are around it, so that their factors are added to these rows as well.
    """
    if not isinstance(layer.base_layer, nn.Embedding | nn.Linear):
        raise InputError(
            f"trainable_token_indices replaces rows of {path}, for which the adapter has more",
            where=where,
            why="PEFT cannot run both on one layer (of a tied pair the head has the rows too)",
            fix="train again with one of the two",
        )
    for spot in spots_of(layer.base_layer, where, path, layers):
        yield replace(spot, tokens=layer) if spot.key == f"{path}.weight" else spot


def _own(
    module: nn.Module, where: str, path: str, layers: Mapping[str, tuple[Any, ...]]
) -> Iterator[Spot]:
    """Yield the parameters of one layer, those of its children left out."""
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    for name, value in module.named_buffers(recurse=False, remove_duplicate=False):
        if name not in module._non_persistent_buffers_set:
            own[name] = value
    lost = layers.keys() - own.keys()
    biased = tuple(x for x in layers.get("weight", ()) if x.lora_bias[NAME])
    if lost or (biased and "bias" not in own):
        raise InputError(
            f"the adapter adapts {path}, which is a {type(module).__name__}"
            if lost
            else f"the adapter adds a bias to {path}, which has none",
            where=where,
            why="bake knows no sum of base and factors for it"
            if lost
            else "PEFT cannot merge it either: the base has no place for it",
        )
    for name, value in own.items():
        parts = layers.get(name, ())
        if name == "bias":  # the bias of B goes to the layer's own
            parts = biased
        yield Spot(f"{path}.{name}" if path else name, value, parts)
