"""A model in parts: each is loaded when it is called and dropped when it returns.

The model is transformers' own class with its parameters on the meta device, so that memory holds
the largest part and the rest, whatever the size of the model; everything between the parts (masks,
rotary positions, the sum of the branches) is its own code. A parameter that is used outside of its
part has no values then, and torch refuses it.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bake.errors import InputError
from bake.verify.memory import give_back
from bake.verify.units import Read, Unit, drop_unit, load_units, place_of

Place = tuple[dict[str, Any], str]
"""A table of a module, and the name of a parameter in it."""
Wrap = Callable[[Any], Any]
"""Puts layers of its own around those of a model, and returns the model."""


def stream(model: Any, units: Sequence[Unit], read: Read) -> None:
    """Load the rest of a model, and set the hooks that load its parts.

    Args:
        model: with its parameters on the meta device.
        units: its parts, the rest first.
        read: returns a tensor of the checkpoint by its name.
    """
    rest, *parts = units
    load_units(model, (rest,), read)
    for unit in parts:
        _hook(model, unit, _loading(model, unit, read), _dropping(model, unit))


def stream_wrapped(model: Any, units: Sequence[Unit], read: Read, wrap: Wrap) -> Any:
    """Return a model with layers put around its own, which are loaded as ``stream`` loads them.

    The parts are loaded into a copy, whose names are transformers', and handed over. What wraps a
    layer asks for its device and type: while it does, every parameter is a single NaN, repeated.

    Args:
        model: with its parameters on the meta device.
        units: its parts, the rest first.
        read: returns a tensor of the checkpoint by its name.
        wrap: puts the layers in, with their values.
    """
    rest, *parts = units
    load_units(model, (rest,), read)
    dtype, copied = model.dtype, copy.deepcopy(model)
    places = {key: place_of(model, key) for unit in parts for key in unit.parameters}
    nothing: dict[str, Any] = {}
    for key, (table, name) in places.items():
        value = torch.full((), torch.nan, dtype=dtype).expand(table[name].shape)
        nothing[key] = table[name] = nn.Parameter(value, requires_grad=False)
    wrapped = wrap(model)
    # The file of an adapter may hold parameters of the model itself: a table that was resized.
    found = {k: table[name] for k, (table, name) in places.items() if table[name] is not nothing[k]}
    found |= _tied_to(found, copied, units)
    for key, (table, name) in places.items():
        table[name] = found[key] if key in found else _empty(table[name])
    own = {id(table[name]) for key, (table, name) in places.items() if key not in found}
    for name, parameter in wrapped.named_parameters():
        if id(parameter) in own:
            continue
        if parameter.is_meta:
            raise InputError(f"PEFT leaves {name} without values")
        parameter.data = parameter.data.to(dtype)  # of the file, as PEFT loads it here
    for unit in parts:
        mine = {key: places[key] for key in unit.parameters if key not in found}
        if mine:
            _hook(wrapped, unit, _handing_over(copied, unit, read, mine), _emptying(mine))
    return wrapped


def _tied_to(found: Mapping[str, Any], model: Any, units: Sequence[Unit]) -> dict[str, Any]:
    """Return the parameters that are one with some of a file: in a whole model both change."""
    tied = {key for unit in units for key in unit.tied}
    more: dict[str, Any] = {}
    for target, source in model.all_tied_weights_keys.items():
        here = [key for key in (target, source) if key in found]
        if len(here) != 1:
            continue
        if not tied & {target, source}:
            raise InputError(
                f"{target} and {source} are tied and stored twice, and the adapter holds one",
                fix="use --no-stream, on a machine that holds the base in float64",
            )
        more |= {key: found[here[0]] for key in (target, source) if key not in found}
    return more


def _hook(model: Any, unit: Unit, before: Callable[[], None], after: Callable[[], None]) -> None:
    module = model.get_submodule(unit.module)
    module.register_forward_pre_hook(lambda *_: before())
    module.register_forward_hook(lambda *_: after())


def _loading(model: Any, unit: Unit, read: Read) -> Callable[[], None]:
    return lambda: load_units(model, (unit,), read)


def _dropping(model: Any, unit: Unit) -> Callable[[], None]:
    def drop() -> None:
        drop_unit(model, unit)
        give_back()

    return drop


def _handing_over(
    copied: Any, unit: Unit, read: Read, places: Mapping[str, Place]
) -> Callable[[], None]:
    def load() -> None:
        load_units(copied, (unit,), read)
        for key, (table, name) in places.items():
            table[name] = copied.get_parameter(key)
        drop_unit(copied, unit)

    return load


def _emptying(places: Mapping[str, Place]) -> Callable[[], None]:
    def drop() -> None:
        for table, name in places.values():
            table[name] = _empty(table[name])
        give_back()

    return drop


def _empty(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
