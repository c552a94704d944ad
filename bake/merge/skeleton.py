"""``Skeleton``: the class that transformers runs for a checkpoint, without a single value.

Names, layers and ties of a loaded model are not what the files say: transformers renames, stacks
and ties on loading. Here it does the same to a model on the meta device, from config.json and the
headers, with its own rules (``core_model_loading.py: convert_and_load_state_dict_in_model`` and
``modeling_utils.py: tie_weights``), so that nothing is guessed from a name or a shape. No code
beside transformers' own is run.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bake.errors import CheckpointError, first_line
from bake.merge.limits import at_most

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WHERE = "config.json"


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model of transformers on the meta device, and where its parameters are in the files.

    Attributes:
        model: no parameter of it has values.
        disk: the name in the files of a parameter that lies there as it is.
        converted: the names of those that a parameter is put together from.
        names: how transformers renames what it reads.
        tied: the parameters that are one and the same, all of them under each one's name.
    """

    model: "PreTrainedModel"
    disk: Mapping[str, str]
    converted: Mapping[str, tuple[str, ...]]
    names: "_Names"
    tied: Mapping[str, tuple[str, ...]]

    def held(self, key: str) -> bool:
        """Whether the files hold a parameter, under its own name or that of one that it is."""
        return any(name in self.disk or name in self.converted for name in self.tied[key])

    def new_name(self, key: str, taken: Iterable[str]) -> str | None:
        """Return a name under which transformers would read a parameter, or None.

        Args:
            key: the parameter's name in the model.
            taken: the names that the files hold.
        """
        held = set(taken)
        for name in self.names.candidates(key):
            if name not in held and self.names.rename(name) == (key, None):
                return name
        return None


def skeleton_of(
    config: Mapping[str, Any],
    names: Iterable[str],
    equal: Callable[[str, str], bool],
) -> Skeleton:
    """Return the model that transformers makes of a configuration and of tensors' names.

    Args:
        config: config.json, parsed.
        names: of the tensors in the files.
        equal: whether two of them hold the same bytes; asked of tied ones of which both are there.

    Raises:
        CheckpointError: transformers has no such class, or cannot make it.
    """
    held = tuple(names)
    model = _on_meta(config, len(held))
    renaming = _Names(model)
    disk: dict[str, str] = {}
    converted: dict[str, tuple[str, ...]] = {}
    for name in renaming.in_order(held):
        key, pattern = renaming.rename(name)
        if pattern is None:
            disk[key] = name
            continue
        for target in renaming.targets(key, pattern):
            converted[target] = (*converted.get(target, ()), name)
    disk = {key: name for key, name in disk.items() if key in renaming.state}
    _tie(model, disk, converted, equal)
    # Settled here: PEFT's layers change what the model's parameters are called.
    return Skeleton(model, disk, converted, renaming, _tied(model))


def _tied(model: nn.Module) -> Mapping[str, tuple[str, ...]]:
    found: dict[int, list[str]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        found.setdefault(id(value), []).append(key)
    return {key: tuple(keys) for keys in found.values() for key in keys}


def _on_meta(config: Mapping[str, Any], tensors: int) -> "PreTrainedModel":
    import transformers
    from transformers.utils import logging

    kind, named = config.get("model_type"), config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise CheckpointError(f"architectures = {named!r} names no single class", where=_WHERE)
    found: Any = getattr(transformers, named[0], None)
    known = inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel)
    if not known:
        raise CheckpointError(
            f"transformers {transformers.__version__} has no class {named[0]}",
            where=_WHERE,
            why="what an adapter means depends on the layers of the model, and code that comes "
            "with a checkpoint is never run",
            fix="install a transformers that has it, or merge with PEFT's merge_and_unload",
        )
    if kind not in transformers.CONFIG_MAPPING or not issubclass(
        transformers.CONFIG_MAPPING[kind], found.config_class
    ):
        raise CheckpointError(
            f"architectures names {named[0]}, and model_type = {kind!r} is not its type",
            where=_WHERE,
            why="transformers would load another class",
            fix=f"set model_type to {found.config_class.model_type!r}, or name the class that the "
            "weights are of",
        )
    plain = {k: _floats(value) for k, value in config.items() if k != "quantization_config"}
    logging.set_verbosity_error()
    try:
        settings = transformers.CONFIG_MAPPING[kind].from_dict(plain)
        with at_most(tensors), torch.device("meta"):
            made: PreTrainedModel = found._from_config(
                settings, dtype=torch.float32, attn_implementation="eager"
            )
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot make a {named[0]} of this configuration: {first_line(error)}",
            where=_WHERE,
        ) from error
    return made.eval()


def _floats(value: Any) -> Any:
    """Return a value with the floats in place that JSON has no words for, as transformers spells.

    Mirrors ``configuration_utils.py: _dict_from_json_file``.
    """
    if isinstance(value, dict):
        inner = {key: _floats(item) for key, item in value.items()}
        return float(inner["__float__"]) if inner.keys() == {"__float__"} else inner
    return [_floats(item) for item in value] if isinstance(value, list) else value


class _Names:
    """How transformers calls what it reads from the files of one model."""

    def __init__(self, model: "PreTrainedModel") -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.prefix: str = model.base_model_prefix
        self.state: Mapping[str, Any] = model.state_dict()
        self.rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in self.rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in self.rules if isinstance(rule, WeightConverter)]
        self._of_pattern = {p: rule for rule in self._converters for p in rule.source_patterns}

    @staticmethod
    def in_order(names: Iterable[str]) -> list[str]:
        """Return names in the order in which transformers reads them."""
        from transformers.core_model_loading import dot_natural_key

        return sorted(names, key=dot_natural_key)

    def rename(self, name: str) -> tuple[str, str | None]:
        """Return a tensor's name in the model, and the pattern of the rule that puts it together.

        A name that the model does not have is one that transformers does not load.
        """
        from transformers.core_model_loading import rename_source_key

        rules = (self._renamings, self._converters)
        key, pattern = rename_source_key(name, *rules, self.prefix, self.state)
        if key not in self.state and name in self.state:
            key, pattern = rename_source_key(name, [], [], self.prefix, self.state)
        return key, pattern

    def targets(self, key: str, pattern: str) -> Iterator[str]:
        """Yield the parameters that a rule with several results makes, ``key`` being the first."""
        first, *others = self._of_pattern[pattern].target_patterns
        yield key
        yield from (key.replace(first, other) for other in others)

    def steps(self, name: str) -> tuple[tuple[tuple[str, int | None], ...], tuple[str, ...]]:
        """Return how a tensor is put together with others: the steps, and the patterns in order."""
        _, pattern = self.rename(name)
        assert pattern is not None
        rule = self._of_pattern[pattern]
        steps = ((type(op).__name__, getattr(op, "dim", None)) for op in rule.operations)
        return tuple(steps), tuple(rule.source_patterns)

    def candidates(self, key: str) -> Iterator[str]:
        """Yield what a parameter could be called in the files."""
        yield key
        yield key.removeprefix(f"{self.prefix}.")
        name = key
        for rule in self.rules[::-1]:
            if rule in self._renamings:
                name, _ = rule.reverse_transform().rename_source_key(name)
        yield name


def _tie(
    model: "PreTrainedModel",
    disk: Mapping[str, str],
    converted: Mapping[str, tuple[str, ...]],
    equal: Callable[[str, str], bool],
) -> None:
    """Tie what transformers ties when it has read the files, and nothing else."""
    held = {*disk, *converted}
    for target, source in tuple(model.all_tied_weights_keys.items()):
        apart = {target, source} <= held and not (
            {target, source} <= disk.keys() and equal(disk[target], disk[source])
        )
        if apart:
            del model.all_tied_weights_keys[target]
            like = model.get_parameter(target)
            _set(model, target, nn.Parameter(torch.empty_like(like), requires_grad=False))
        else:
            _set(model, target, model.get_parameter_or_buffer(source))


def _set(model: nn.Module, key: str, value: Any) -> None:
    owner, _, name = key.rpartition(".")
    setattr(model.get_submodule(owner), name, value)
