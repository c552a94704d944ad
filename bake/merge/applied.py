"""What PEFT makes of an adapter for a model: which parameter becomes what.

PEFT itself is asked, on a skeleton: it matches the configuration with the modules, wraps them and
loads the file, all without a value of the base. What it wrapped is then read off, so that a pattern
means what PEFT makes of it, in the version that is installed. Computed is nothing by it: sums are
made by ``bake.merge.change``, and ``bake verify`` runs PEFT at work against them.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from bake.errors import BakeError, InputError, first_line
from bake.merge.adapter_config import CONFIG, WEIGHTS, meant
from bake.merge.change import Change, Factors, Lengths
from bake.merge.limits import check_patterns
from bake.merge.reads import check_reads, taken_apart
from bake.merge.skeleton import Skeleton

_NAME = "default"
_PREFIX = "base_model.model."


def changes_of(skeleton: Skeleton, folder: Path, config: Mapping[str, Any]) -> Mapping[str, Change]:
    """Return what becomes of every parameter of a model, by its name there.

    Args:
        skeleton: of the base; PEFT's wrappers are put into it, so it is of no use after.
        folder: of the adapter.
        config: its configuration, as ``read_config`` returns it.

    Raises:
        InputError: PEFT does not take the adapter up, or not all of it, or computes with it what
            is no sum of base and factors.
    """
    where, model = str(folder / WEIGHTS), skeleton.model
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    check_patterns(config, paths, str(folder / CONFIG))
    base = {id(value) for value in model.state_dict(keep_vars=True).values()}
    readers = {path: reader for path in paths if (reader := taken_apart(model, path))}
    wrapped = _wrapped(model, folder, config)
    before = {spot.key: id(spot.value) for spot in _inside(wrapped.base_model.model, where)}
    _load(wrapped, folder)
    wrapped.requires_grad_(False)
    _check_complete(wrapped, base, where)
    spots = tuple(_inside(wrapped.base_model.model, where))
    for spot in spots:
        path = spot.key.rpartition(".")[0]
        if spot.layers and path in readers:
            raise InputError(
                f"{readers[path]} reads {spot.key} without calling its layer, where PEFT's factors "
                "are",
                where=where,
                why="with the adapter at work it computes what the base computes there, and a "
                "merge would change it",
                fix=f"take the factors of {path} out of the file, and its name out of {CONFIG}",
            )
    found = _settled(spots, before, where)
    if getattr(wrapped.peft_config[_NAME], "target_modules_to_tie", None):
        _check_tied(found, before, where)
    return found


def _check_tied(found: Mapping[str, Change], before: Mapping[str, int], where: str) -> None:
    """Require that tied layers have the same factors: PEFT loads both into one place."""
    first: dict[int, str] = {}
    for key, change in found.items():
        other = first.setdefault(before[key], key)
        if not change.equals(found[other]):
            raise InputError(
                f"ensure_weight_tying is set, and the factors of {key} and {other} differ",
                where=where,
                why="PEFT loads one over the other",
                fix="save the adapter again where it was trained",
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Spot:
    """One parameter that the model computes with, and what PEFT's layers add to it."""

    key: str
    value: Tensor
    layers: tuple[Any, ...]
    """PEFT's layers for it, the outer ones first."""


def _wrapped(model: Any, folder: Path, config: Mapping[str, Any]) -> Any:
    """Return the model with PEFT's layers, none of which has a value."""
    from peft import LoraConfig, PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at ties and axes, which are settled here
        try:
            return PeftModel(
                model,
                LoraConfig(**{**meant(config), "inference_mode": True}),
                _NAME,
                autocast_adapter_dtype=False,
                low_cpu_mem_usage=True,
            )
        except Exception as error:
            raise InputError(
                f"PEFT does not take this adapter up: {first_line(error)}",
                where=str(folder / CONFIG),
                why="the configuration and the base do not belong together, or PEFT is another one",
            ) from error


def _load(wrapped: Any, folder: Path) -> None:
    """Let PEFT load the file into its layers, and require that nothing of it is left."""
    where = str(folder / WEIGHTS)
    mapping = getattr(wrapped.base_model.model, "_checkpoint_conversion_mapping", {})
    wrapped.load_state_dict = partial(_assign, wrapped, where)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at what lacks, which ``_check_complete`` refuses
        try:
            result = wrapped.load_adapter(
                str(folder),
                _NAME,
                torch_device="cpu",
                autocast_adapter_dtype=False,
                key_mapping=mapping,
            )
        except KeyError as error:
            raise _lacking(str(error.args[0]), where) from error
        except BakeError:
            raise
        except Exception as error:
            raise InputError(
                f"PEFT does not load this adapter into the base: {_one_line(error)}", where=where
            ) from error
    left = [key.replace(f".{_NAME}.", ".") for key in result.unexpected_keys]
    left = [name for name in left if not _doubled(name, folder)]
    if left:
        raise InputError(
            f"PEFT would not load {left[0]}"
            + (f", nor {len(left) - 1} more" if len(left) > 1 else "")
            + ": the base has no place for it, or the configuration does not name it",
            where=where,
            why="what is left out could be part of what the adapter does",
            fix=f"compare the module's path with target_modules and modules_to_save in {CONFIG}, "
            "and with the modules of the base",
        )


def _doubled(name: str, folder: Path) -> bool:
    """Whether a tensor is there a second time, as old versions stored saved modules."""
    from safetensors import safe_open

    other = name.replace(".modules_to_save.", ".")
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        there = other != name and {name, other} <= set(file.keys())
        return there and torch.equal(file.get_tensor(name), file.get_tensor(other))


def _assign(wrapped: Any, where: str, state: Mapping[str, Tensor], *, strict: bool) -> Any:
    """Put what is loaded in the place of parameters: into those without values nothing is copied.

    Raises:
        InputError: a tensor has another shape than PEFT's layers have around this base.
    """
    held = wrapped.state_dict()
    tables = {f"{_PREFIX}{name}.weight" for name in _tables(wrapped.base_model.model)}
    for key, value in state.items():
        if key not in held or held[key].shape == value.shape:
            continue
        have, want = list(value.shape), list(held[key].shape)
        name = key.replace(f".{_NAME}.", ".")
        what = f"{name} has the shape {have}, and base and configuration make it {want}"
        bare = key.replace(".modules_to_save.default", "").replace(".base_layer", "")
        if bare in tables and have[1:] == want[1:]:
            raise InputError(
                what,
                where=where,
                why="the vocabulary was resized before training, and PEFT loads such an adapter "
                "into a base that was resized in the same way",
                fix='python -c "from transformers import AutoModelForCausalLM as M; '
                "m = M.from_pretrained('BASE', dtype='auto'); "
                f"m.resize_token_embeddings({have[0]}); m.save_pretrained('./resized')\", then "
                "merge into ./resized",
            )
        raise InputError(
            what,
            where=where,
            fix=f"compare r and rank_pattern in {CONFIG} with the file, and the sizes of the base "
            "with those of the model that the adapter was trained on",
        )
    return type(wrapped).load_state_dict(wrapped, state, strict=strict, assign=True)


def _tables(model: Any) -> Iterator[str]:
    """Yield the paths of embedding and head, without PEFT's wrappers."""
    found = [model.get_input_embeddings(), model.get_output_embeddings()]
    for path, module in model.named_modules(remove_duplicate=False):
        if any(module is table for table in found if table is not None):
            yield path.replace(".modules_to_save.default", "").replace(".base_layer", "")


def _check_complete(wrapped: Any, base: set[int], where: str) -> None:
    for name, value in wrapped.named_parameters():
        if value.is_meta and id(value) not in base:
            raise _lacking(name.replace(f".{_NAME}.", "."), where)


def _lacking(name: str, where: str) -> InputError:
    return InputError(
        f"{CONFIG} asks for {name}, and the file lacks it",
        where=where,
        why="PEFT would start it at random, or at the base's values",
        fix="save the adapter again where it was trained, with all that its configuration names",
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


_NONE: Mapping[str, tuple[Any, ...]] = MappingProxyType({})


def _inside(
    module: nn.Module, where: str, path: str = "", layers: Mapping[str, tuple[Any, ...]] = _NONE
) -> Iterator[_Spot]:
    """Yield every parameter that runs, by the path that it has without PEFT."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        yield from _inside(module.modules_to_save[_NAME], where, path, layers)
        return
    if isinstance(module, LoraLayer):
        name = getattr(module, "parameter_name", "weight")
        more = {**layers, name: (*layers.get(name, ()), module)}
        yield from _inside(module.base_layer, where, path, more)
        return
    yield from _own(module, where, path, layers)
    for name, child in module._modules.items():
        if child is not None:
            yield from _inside(child, where, f"{path}.{name}" if path else name)


def _own(
    module: nn.Module, where: str, path: str, layers: Mapping[str, tuple[Any, ...]]
) -> Iterator[_Spot]:
    """Yield the parameters of one layer, those of its children left out."""
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    for name, value in module.named_buffers(recurse=False, remove_duplicate=False):
        if name not in module._non_persistent_buffers_set:
            own[name] = value
    lost = layers.keys() - own.keys()
    biased = tuple(x for x in layers.get("weight", ()) if x.lora_bias[_NAME])
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
        yield _Spot(f"{path}.{name}" if path else name, value, parts)


def _settled(
    spots: tuple[_Spot, ...], before: Mapping[str, int], where: str
) -> Mapping[str, Change]:
    """Return the change of every parameter; one that several share is loaded into once."""
    loaded: dict[int, tuple[str, Tensor]] = {}
    for spot in spots:
        if spot.value.is_meta:
            continue
        key, value = loaded.setdefault(before[spot.key], (spot.key, spot.value))
        if not torch.equal(value, spot.value):
            raise InputError(
                f"the file holds two values of one parameter: {key} and {spot.key} are tied",
                where=where,
                why="PEFT loads one over the other",
                fix="remove the one that is not meant from the file",
            )
    found = {}
    for spot in spots:
        _, whole = loaded.get(before[spot.key], ("", None))
        change = _change(spot, whole, where)
        for name, tensor in (("", change.whole), *_named(change)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise InputError(f"{spot.key}{name} holds NaN or infinity", where=where)
        found[spot.key] = change
    return found


def _named(change: Change) -> Iterator[tuple[str, Tensor | None]]:
    for part in change.factors:
        yield ": a factor", part.left
        yield ": a factor", part.right
    yield ": a bias", change.offset


def _change(spot: _Spot, whole: Tensor | None, where: str) -> Change:
    factors: list[Factors] = []
    offset: Tensor | None = None
    lengths: Lengths | None = None
    for layer in spot.layers:
        if spot.key.endswith("bias"):
            offset = layer.scaling[_NAME] * layer.lora_B[_NAME].bias.to(torch.float64)
            continue
        check_reads(layer, spot.key, where)
        factors.append(_KINDS[type(layer).__name__](layer))
        lengths = _lengths(layer, spot.key, where)
    return Change(whole, tuple(factors), offset, lengths)


def _linear(layer: Any) -> Factors:
    left, right = layer.lora_B[_NAME].weight, layer.lora_A[_NAME].weight
    left = left.to(torch.float64) * layer.scaling[_NAME]
    if layer.fan_in_fan_out:
        return Factors(right.T, left.T)
    return Factors(left, right)


def _table(layer: Any) -> Factors:
    """A table's rows are its inputs: A is [r, V], and B [d, r]."""
    left, right = layer.lora_embedding_A[_NAME].T, layer.lora_embedding_B[_NAME].T
    return Factors(left.to(torch.float64) * layer.scaling[_NAME], right)


def _kernels(layer: Any) -> Factors:
    """A is a convolution of the same kernel, B one of a single point."""
    left, right = layer.lora_B[_NAME].weight.flatten(1), layer.lora_A[_NAME].weight.flatten(1)
    return Factors(left.to(torch.float64) * layer.scaling[_NAME], right)


def _stacked(layer: Any) -> Factors:
    """One product for each expert: A is [E r, in] by experts, B [out, r E] by ranks."""
    a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
    b = b.to(torch.float64) * layer.scaling[_NAME]
    count = layer.num_experts
    if count == 1:
        return _oriented(layer, b, a)
    a = a.reshape(count, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
    return _oriented(layer, b, a)


def _oriented(layer: Any, left: Tensor, right: Tensor) -> Factors:
    """Turn factors to how a parameter lies: [out, in] where PEFT swapped the two, or [in, out]."""
    if layer.get_param().ndim == 2 or layer._did_swap_in_out_features:
        return Factors(left, right)
    return Factors(right.mT, left.mT)


_KINDS: Mapping[str, Callable[[Any], Factors]] = {
    "Linear": _linear,
    "Embedding": _table,
    "Conv1d": _kernels,
    "Conv2d": _kernels,
    "Conv3d": _kernels,
    "ParamWrapper": _stacked,
}
"""PEFT's layers that are sums, by their class in ``peft/tuners/lora/layer.py``."""
_DORA = ("DoraLinearVariant", "DoraEmbeddingVariant", *(f"DoraConv{n}dVariant" for n in (1, 2, 3)))


def _lengths(layer: Any, key: str, where: str) -> Lengths | None:
    """Return what DoRA scales the sum to: the outputs' rows of [out, in], the columns of others."""
    variant = layer.lora_variant.get(_NAME)
    if variant is None:
        return None
    name = type(variant).__name__
    if name not in _DORA or layer.lora_bias[_NAME] or _embed_scale(layer) is not None:
        raise InputError(
            f"{key} is adapted by {name.removesuffix('Variant')}, which is no sum of base and "
            "factors" + (" here" if name in _DORA else ""),
            where=where,
        )
    values = layer.lora_magnitude_vector[_NAME].weight.flatten()
    by_column = layer.fan_in_fan_out if name == "DoraLinearVariant" else "Embedding" in name
    return Lengths(values, by_row=not by_column)


def _embed_scale(layer: Any) -> Any:
    return getattr(layer.base_layer, "embed_scale", None)
