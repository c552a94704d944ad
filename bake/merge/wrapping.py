"""PEFT around a model without values: its layers are put in, and the adapter's file is loaded.

What the configuration means is what PEFT makes of it here, in the version that is installed.
Nothing of the file may be left, and nothing that the configuration asks for may lack.
"""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bake.errors import BakeError, InputError, first_line
from bake.merge.adapter_config import CONFIG, WEIGHTS, meant

NAME = "default"
"""Under which PEFT holds the adapter."""
PREFIX = "base_model.model."


def wrapped_by(model: Any, folder: Path, config: Mapping[str, Any]) -> Any:
    """Return the model with PEFT's layers, none of which has a value."""
    from peft import LoraConfig, PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at ties and axes, which are settled here
        try:
            return PeftModel(
                model,
                LoraConfig(**{**meant(config), "inference_mode": True}),
                NAME,
                autocast_adapter_dtype=False,
                low_cpu_mem_usage=True,
            )
        except Exception as error:
            raise InputError(
                f"PEFT does not take this adapter up: {first_line(error)}",
                where=str(folder / CONFIG),
                why="the configuration and the base do not belong together, or PEFT is another one",
            ) from error


def load_into(wrapped: Any, folder: Path) -> None:
    """Let PEFT load the file into its layers, and require that nothing of it is left."""
    where = str(folder / WEIGHTS)
    mapping = getattr(wrapped.base_model.model, "_checkpoint_conversion_mapping", {})
    wrapped.load_state_dict = partial(_assign, wrapped, where)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at what lacks, which ``check_complete`` refuses
        try:
            result = wrapped.load_adapter(
                str(folder),
                NAME,
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
    left = [_in_file(key) for key in result.unexpected_keys]
    held = wrapped.state_dict()
    left = [name for name in left if not _doubled(name, folder, held)]
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


def _in_file(key: str) -> str:
    """Return what PEFT's file calls a tensor that its model holds under an adapter's name."""
    return key.replace(f".{NAME}.", ".").removesuffix(f".{NAME}")


def _doubled(name: str, folder: Path, held: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is there a second time.

    Old versions stored saved modules so, and new ones the rows of a tied head.

    Args:
        name: of one that PEFT has not loaded.
        folder: of the adapter.
        held: what PEFT has loaded, by its name there.
    """
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        if name not in file.keys():
            return False
        value = file.get_tensor(name)
    others = (held.get(key) for key in (f"{name}.{NAME}", _saved(name)))
    return any(
        other is not None and not other.is_meta and torch.equal(value, other) for other in others
    )


def _saved(name: str) -> str:
    """Return where PEFT holds a tensor of a saved module that is named as old versions did."""
    return name.replace(".modules_to_save.", f".modules_to_save.{NAME}.")


def _assign(wrapped: Any, where: str, state: Mapping[str, Tensor], *, strict: bool) -> Any:
    """Put what is loaded in the place of parameters: into those without values nothing is copied.

    Raises:
        InputError: a tensor has another shape than PEFT's layers have around this base.
    """
    held = wrapped.state_dict()
    for key, value in state.items():
        if key not in held or held[key].shape == value.shape:
            continue
        have, want = list(value.shape), list(held[key].shape)
        name = _in_file(key)
        what = f"{name} has the shape {have}, and base and configuration make it {want}"
        size = _resized(wrapped, key, have, want)
        if size is not None:
            raise InputError(
                what,
                where=where,
                why="the vocabulary was resized before training, and PEFT loads such an adapter "
                "into a base that was resized in the same way; rows that are in no file start anew "
                "in both",
                fix=_resizing(wrapped, size),
            )
        raise InputError(
            what,
            where=where,
            fix=f"compare r and rank_pattern in {CONFIG} with the file, and the sizes of the base "
            "with those of the model that the adapter was trained on",
        )
    return type(wrapped).load_state_dict(wrapped, state, strict=strict, assign=True)


def check_tokens(wrapped: Any, where: str) -> None:
    """Require that every row that ``trainable_token_indices`` names is there, and named once.

    PEFT finds out at work, and not on a skeleton.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for path, layer in wrapped.named_modules():
        if not isinstance(layer, TrainableTokensLayer):
            continue
        named, count = layer.token_indices[NAME], layer.get_base_layer().weight.shape[0]
        place = path.removeprefix(PREFIX).removesuffix(".token_adapter")
        outside = [index for index in named if not 0 <= index < count]
        if outside:
            raise InputError(
                f"trainable_token_indices names row {outside[0]} of {place}, which has {count}",
                where=where,
                why="the vocabulary was resized before training" if max(named) >= count else None,
                fix=_resizing(wrapped, max(named) + 1) if min(named) >= 0 else None,
            )
        if len(set(named)) < len(named):
            raise InputError(
                f"trainable_token_indices names a row of {place} twice",
                where=where,
                why="PEFT would put one value over the other",
                fix="name it once, and store one row for it",
            )


def _resized(wrapped: Any, key: str, have: Sequence[int], want: Sequence[int]) -> int | None:
    """Return the size of the vocabulary that a tensor of embedding or head is for, or None."""
    model = wrapped.base_model.model
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        paths = (
            p for p, module in wrapped.named_modules(remove_duplicate=False) if module is table
        )
        if table is None or not any(key.startswith(f"{path}.") for path in paths):
            continue
        rows = table.weight.shape[0]
        pairs = list(zip(have, want, strict=False))
        other = [new for new, old in pairs if new != old]
        if len(have) == len(want) and len(other) == 1 and (other[0], rows) in pairs:
            return other[0]
    return None


def _resizing(wrapped: Any, size: int) -> str:
    """Return how the base is resized."""
    kind = type(wrapped.base_model.model).__name__
    return (
        f'python -c "from transformers import {kind} as M; '
        f"m = M.from_pretrained('BASE', dtype='auto'); "
        f"m.resize_token_embeddings({size}); m.save_pretrained('./resized')\", then "
        "merge into ./resized"
    )


def check_complete(wrapped: Any, base: set[int], where: str) -> None:
    """Require that the file held every parameter of PEFT's layers.

    Args:
        wrapped: the model with them.
        base: the identities of the model's own parameters, which have no values.
        where: the file, for messages.
    """
    for name, value in wrapped.named_parameters():
        if value.is_meta and id(value) not in base:
            raise _lacking(_in_file(name), where)


def _lacking(name: str, where: str) -> InputError:
    return InputError(
        f"{CONFIG} asks for {name}, and the file lacks it",
        where=where,
        why="PEFT would start it at random, or at the base's values",
        fix="save the adapter again where it was trained, with all that its configuration names",
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
