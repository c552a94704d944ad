"""``adapter_config.json``, as far as bake answers for it: known keys, right types, a plain LoRA.

What the keys mean for a model is PEFT's to say (``bake.merge.applied``). Here is refused what is
more than a sum of base and factors, and what nobody can know.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bake.checkpoints import strictjson
from bake.checkpoints.adapter import FILES, folders_inside
from bake.errors import CheckpointError, InputError

CONFIG, WEIGHTS = FILES
_MAX_CONFIG = 16_000_000

# Initialisations that set the factors alone: ``peft/tuners/lora/layer.py: update_layer``.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_FACTORISED = ("pissa", "olora")
"""Those that can be done again from the base alone."""

_IGNORED = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("peft_version", "runtime_config", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "qalora_group_size"),
)
"""Keys that say how an adapter was trained or found, and nothing of what it computes."""

_MEANT = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias"),
    *("lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "target_parameters", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    "trainable_token_indices",
)
"""Keys that PEFT is handed."""

_REFUSED = {
    "use_qalora": "QALoRA pools the inputs of its factors",
    "use_bdlora": "block-diagonal LoRA has another layout of factors",
    "alora_invocation_tokens": "an activated LoRA works on some tokens only",
    "layer_replication": "it repeats layers, and a checkpoint of the base has none to repeat",
    "megatron_config": "its layers are Megatron's",
    "arrow_config": "it routes between several adapters",
    "kasa_config": "it cuts singular values off the base",
    "monteclora_config": "it draws its factors",
    "velora_config": "it changes what its layers compute",
}

_TYPES: Mapping[str, tuple[type, ...]] = {
    "base_model_name_or_path": (str,),
    "target_modules": (str, list),
    "exclude_modules": (str, list),
    "layers_pattern": (str, list),
    "modules_to_save": (list,),
    "target_parameters": (list,),
    "layers_to_transform": (int, list),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "trainable_token_indices": (list, dict),
    "init_lora_weights": (bool, str),
    "r": (int,),
    "lora_alpha": (int, float),
}
"""What PEFT writes; it reads other types too, and means nothing by them."""
_LISTS_OF: Mapping[str, type] = {
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), str),
    **dict.fromkeys(("modules_to_save", "target_parameters"), str),
    **dict.fromkeys(("layers_to_transform", "trainable_token_indices"), int),
}


_SAVE = "path_initial_model_for_weight_conversion"
_CONVERT = (
    'python -c "from peft import PeftConfig, get_peft_model, load_peft_weights as load, '
    "set_peft_model_state_dict as put; from transformers import AutoModelForCausalLM as M; "
    "m = get_peft_model(M.from_pretrained('BASE'), PeftConfig.from_pretrained('ADAPTER')); "
    "m.peft_config['default'].init_lora_weights = True; m.save_pretrained('./initial'); "
    f"put(m, load('ADAPTER')); m.save_pretrained('./converted', {_SAVE}='./initial')\""
)
"""Does such an initialisation again and stores what was trained as what is added to the base."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of an adapter that is a LoRA.

    Keys that bake does not know and that ask for nothing (null, false, empty) are in it.

    Raises:
        InputError: there is none, it is malformed, or asks for more than base and factors.
    """
    where = str(folder / CONFIG)
    try:
        text = strictjson.read_text(folder / CONFIG, _MAX_CONFIG, where=where)
    except (OSError, CheckpointError) as error:
        inner = ", ".join(str(folder / name) for name in folders_inside(folder))
        raise InputError(
            f"this is no PEFT adapter: {CONFIG} cannot be read ({error})",
            where=str(folder),
            fix=f"name a folder that holds {CONFIG} and {WEIGHTS}"
            + (f": {inner}" if inner else ""),
        ) from error
    config = strictjson.parse_object(text, where=where)
    if config.get("peft_type") is None:
        raise InputError(
            f"{CONFIG} names no peft_type, so it is not PEFT's",
            where=where,
            why="other programs give their files this name, mlx-lm for one",
            fix="convert the adapter to PEFT's format first",
        )
    if config["peft_type"] != "LORA":
        raise InputError(
            f"the adapter is of type {config.get('peft_type')!r}, and only LORA is a sum of base "
            "and factors",
            where=where,
            fix="merge it with PEFT's merge_and_unload, where the type has one",
        )
    for key, why in _REFUSED.items():
        if config.get(key):
            raise InputError(f"an adapter with {key} cannot be merged", where=where, why=why)
    _check_types(config, where)
    _check_init(config, where)
    for key, value in config.items():
        if key not in (*_IGNORED, *_MEANT, *_REFUSED) and value not in (None, False, [], {}, ""):
            raise InputError(
                f"bake does not know the key {key!r} of an adapter",
                where=where,
                why="it could change what the adapter computes",
                fix="remove it if it does not",
            )
    return config


def meant(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what PEFT is handed of a configuration: the keys that decide what is computed.

    The initialisation is left out, because every factor is loaded.
    """
    keys = (key for key in _MEANT if config.get(key) is not None and key != "init_lora_weights")
    return {key: config[key] for key in keys}


def _check_types(config: Mapping[str, Any], where: str) -> None:
    for key, types in _TYPES.items():
        value = config.get(key)
        if value is None:
            continue
        inner = _LISTS_OF.get(key)
        right = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if right and inner is not None:
            right = all(type(item) is inner for item in _items(value))
        if not right:
            of = "" if inner is None else f" of {inner.__name__}"
            names = " or ".join(f"{k.__name__}{of * (k is list)}" for k in types)
            raise InputError(
                f"{key} = {value!r} is no {names}",
                where=where,
                why="PEFT writes nothing else",
            )
        # A lone surrogate is text that no file can hold, the record of a merge neither.
        if not str(value).isascii() and "\\ud" in ascii(value):
            raise InputError(f"{key} = {value!a} is no Unicode text", where=where)


def _items(value: Any) -> Iterator[Any]:
    """Yield what a list holds, or what the lists of a mapping hold; None for what is no list."""
    if isinstance(value, dict):
        for part in value.values():
            yield from part if isinstance(part, list) else (None,)
    elif isinstance(value, list):
        yield from value


def _check_init(config: Mapping[str, Any], where: str) -> None:
    """Refuse the factors that were trained beside another base than the one on the disk."""
    init = config.get("init_lora_weights", True)
    if not isinstance(init, str) or init.lower() in _PLAIN_INITS:
        return
    fix = (
        f"save it where it was trained with model.save_pretrained(OUT, {_SAVE}=INITIAL), INITIAL "
        "being the folder of the adapter as it was before training"
    )
    if init.lower() in _FACTORISED:
        fix = _CONVERT
    elif init.lower() == "loftq":
        fix = "merge it with PEFT into the quantised base that it was trained on"
    raise InputError(
        f"an adapter with init_lora_weights = {init!r} cannot be merged",
        where=where,
        why="its factors are meant for a base that this initialisation has changed",
        fix=fix,
    )
