"""The parts that a model is loaded in: its blocks, its embedding, its head, and the rest.

They are read off the class that transformers runs, so that no table is needed: a block is an
element of one of its outermost lists of modules. Blocks, embedding and head can be loaded when they
are called and dropped when they return; the rest (norms, positions, buffers) is small and stays.
Loading goes through transformers' own conversion, so that a tensor which the class holds in another
form (experts stacked into one) is loaded as ``from_pretrained`` loads it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bake.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Read = Callable[[str], Tensor]
"""Returns a tensor of the checkpoint by its name."""
AT_ONCE = 1 << 28
"""Bytes of values, as they are read, after which some parts are loaded."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One part of a model."""

    module: str
    """Path of the live module; of the rest that of the model, which is empty."""
    parameters: tuple[str, ...]
    """Paths of what is loaded: all of its parameters, and the buffers of the rest."""
    tensors: tuple[str, ...]
    """Names in the checkpoint."""
    tied: Mapping[str, str]
    """The tensor that fills a parameter which no tensor is named after: that of the one that it is
    tied to, in another part maybe."""
    stacked: bool
    """Whether a parameter is put together from several tensors."""

    @property
    def held(self) -> tuple[str, ...]:
        """The tensors that it is loaded from."""
        return (*self.tensors, *self.tied.values())


def units_of(model: "PreTrainedModel", names: Iterable[str]) -> tuple[Unit, ...]:
    """Return the parts of a model, which together hold every parameter of it; the rest is first.

    Args:
        model: the live model, before anything is put into it.
        names: of the tensors in the checkpoint.

    Raises:
        InputError: the class does not load a tensor, or no tensor fills a parameter.
    """
    paths = [path for path, _ in _parts(model)]
    buffers = {name for name, _ in model.named_buffers()}
    own: dict[str, list[str]] = {path: [] for path in ("", *paths)}
    for key in model.state_dict():
        inside = (path for path in paths if key.startswith(f"{path}."))
        own["" if key in buffers else next(inside, "")].append(key)
    sources, patterns = _sources(model, names)
    tied = _tied(model, sources)
    units = []
    for path, keys in own.items():
        if path and not keys:
            continue
        filled = [key for key in keys if key in sources]
        others = {key: tied[key] for key in keys if key not in sources and key in tied}
        tensors = tuple(dict.fromkeys(name for key in filled for name in sources[key]))
        units.append(
            Unit(path, tuple(keys), tensors, others, any(name in patterns for name in tensors))
        )
    return tuple(units)


def blocks_of(units: Iterable[Unit]) -> tuple[str, ...]:
    """Return the paths of the blocks, in their order."""
    return tuple(unit.module for unit in units if unit.module.rpartition(".")[2].isdigit())


def stream_blocks(model: "PreTrainedModel") -> tuple[str, ...]:
    """Return the paths of the blocks that a text's residual stream runs through, in their order.

    A model of text and images has blocks for both. None where the class does not run as many as
    its configuration counts.
    """
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    found = [path for path, module in _blocks(model, "") if id(module) in inside]
    count = model.config.get_text_config().num_hidden_layers
    return tuple(found) if len(found) == count else ()


def _parts(model: "PreTrainedModel") -> Iterator[tuple[str, nn.Module]]:
    """Yield embedding, blocks and head, by their paths."""
    yield from _blocks(model, "")
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    for path, module in model.named_modules():
        if any(module is table for table in tables):
            yield path, module


def _blocks(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield what an outermost list of modules holds, if it can be called."""
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        listed = isinstance(module, nn.ModuleList)
        if listed and type(child).forward is not nn.Module.forward:
            yield inner, child
        else:
            yield from _blocks(child, inner)


def _sources(
    model: "PreTrainedModel", names: Iterable[str]
) -> tuple[dict[str, tuple[str, ...]], set[str]]:
    """Return the tensors that fill a parameter, and which tensors are put together with others.

    Mirrors ``core_model_loading.py: convert_and_load_state_dict_in_model``. Where several
    parameters are made of some tensors, these are under the first of them, which is beside the
    others.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    found: dict[str, tuple[str, ...]] = {}
    patterns, left = set[str](), set[str]()
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], prefix, state)
        if key in state:
            found[key] = (*found.get(key, ()), name)
            if pattern is not None:
                patterns.add(name)
        else:
            left.add(key)
    _check_expected(model, left)
    return found, patterns


def _check_expected(model: "PreTrainedModel", left: set[str]) -> None:
    """Require that what has no place is what the class says that it may leave out."""
    from transformers.core_model_loading import LoadStateDictInfo

    info = LoadStateDictInfo(set(), left, set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    if info.unexpected_keys:
        raise InputError(
            f"{type(model).__name__} of transformers does not load {min(info.unexpected_keys)}",
            why="a tensor that the class does not expect changes the model in silence",
        )


def _tied(model: "PreTrainedModel", sources: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return the tensor of the one that a parameter is tied to, for those that have none."""
    found: dict[str, str] = {}
    ties: Mapping[str, str] = model.all_tied_weights_keys
    for target, source in ties.items():
        if source in sources:
            found[target] = sources[source][0]
        elif target in sources:
            found[source] = sources[target][0]
    # Several may be tied to one that is stored under the name of yet another.
    for target, source in ties.items():
        if source in found:
            found.setdefault(target, found[source])
    return found


def load_units(
    model: "PreTrainedModel",
    units: Iterable[Unit],
    read: Read,
    *,
    only: Callable[[Unit], Collection[str]] = lambda unit: unit.held,
) -> None:
    """Give the parameters of some parts the values that ``read`` returns, in the model's dtype.

    Several parts go through transformers at once, which takes its time for a call and not for a
    tensor; ``AT_ONCE`` bounds the values that are held for that.

    Args:
        model: the live model.
        units: the parts.
        read: returns a tensor by its name.
        only: the tensors of a part that are read.

    Raises:
        CheckpointError: transformers does not expect a tensor, or expects another shape.
    """
    group: list[Unit] = []
    tensors: dict[str, Tensor] = {}
    ties: dict[str, Tensor] = {}
    units = tuple(units)
    shared = {name for unit in units for name in unit.tied.values()}
    seen: dict[str, Tensor] = {}

    def value(name: str) -> Tensor:
        if name in shared and name not in seen:
            seen[name] = read(name)
        return seen[name] if name in shared else read(name)

    for unit in units:
        names = only(unit)
        group.append(unit)
        tensors |= {name: value(name) for name in unit.tensors if name in names}
        ties |= {key: value(name) for key, name in unit.tied.items() if name in names}
        if sum(value.nbytes for value in (*tensors.values(), *ties.values())) >= AT_ONCE:
            _load(model, group, tensors, ties)
            group, tensors, ties = [], {}, {}
    if group:
        _load(model, group, tensors, ties)


def _load(
    model: "PreTrainedModel",
    units: Sequence[Unit],
    tensors: Mapping[str, Tensor],
    ties: Mapping[str, Tensor],
) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    keys = [key for unit in units for key in unit.parameters]
    # On a model that is spread over devices, each parameter goes back to where it was.
    before = {key: place_of(model, key) for key in keys}
    places = {key: table[name].device for key, (table, name) in before.items()}
    config = LoadStateDictConfig(
        dtype=model.dtype, weight_mapping=get_model_conversion_mapping(model)
    )
    info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config, None)
    wrong = [*info.unexpected_keys, *info.mismatched_keys, *info.error_msgs]
    wrong += list(info.conversion_errors)
    if wrong:
        parts = ", ".join(unit.module or type(model).__name__ for unit in units[:3])
        raise CheckpointError(
            f"transformers does not load {wrong[0]} of {parts}",
            why="a tensor that the class does not expect changes the model in silence",
        )
    for key, value in ties.items():
        table, attribute = place_of(model, key)
        table[attribute] = nn.Parameter(value.to(model.dtype), requires_grad=False)
    for key in keys:
        table, attribute = place_of(model, key)
        value = table[attribute].detach()
        if value.is_meta:
            raise CheckpointError(f"the checkpoint leaves the parameter {key} unset")
        device = places[key]
        value = value if device.type == "meta" else value.to(device)
        is_parameter = isinstance(table[attribute], nn.Parameter)
        table[attribute] = nn.Parameter(value, requires_grad=False) if is_parameter else value


def drop_unit(model: "PreTrainedModel", unit: Unit) -> None:
    """Free the memory of one part's parameters: they keep their shapes and hold nothing."""
    for key in unit.parameters:
        table, attribute = place_of(model, key)
        empty = torch.empty_like(table[attribute], device="meta")
        table[attribute] = nn.Parameter(empty, requires_grad=False)


def place_of(model: nn.Module, key: str) -> tuple[dict[str, Any], str]:
    """Return the table of a module that holds a parameter or buffer, and its name there."""
    path, _, name = key.rpartition(".")
    owner = model.get_submodule(path)
    parameters: dict[str, Any] = owner._parameters
    return (parameters if name in parameters else owner._buffers), name
