"""PEFT around a model without values: its layers are put in, and the adapter's file is loaded.

What the configuration means is what PEFT makes of it here, in the version that is installed.
Nothing of the file may be left, and nothing that the configuration asks for may lack.
"""

import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bake.errors import BakeError, InputError, first_line
from bake.merge.adapter_config import CONFIG, WEIGHTS, meant

NAME = "default"
"""Under which PEFT holds the adapter."""
_PREFIX = "base_model.model."


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
    left = [key.replace(f".{NAME}.", ".") for key in result.unexpected_keys]
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
        name = key.replace(f".{NAME}.", ".")
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


def check_complete(wrapped: Any, base: set[int], where: str) -> None:
    """Require that the file held every parameter of PEFT's layers.

    Args:
        wrapped: the model with them.
        base: the identities of the model's own parameters, which have no values.
        where: the file, for messages.
    """
    for name, value in wrapped.named_parameters():
        if value.is_meta and id(value) not in base:
            raise _lacking(name.replace(f".{NAME}.", "."), where)


def _lacking(name: str, where: str) -> InputError:
    return InputError(
        f"{CONFIG} asks for {name}, and the file lacks it",
        where=where,
        why="PEFT would start it at random, or at the base's values",
        fix="save the adapter again where it was trained, with all that its configuration names",
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
