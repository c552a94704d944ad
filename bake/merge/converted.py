"""Factors that were trained expert by expert, where the class of the base holds its experts as one.

PEFT puts them together when it loads them (``peft/utils/transformers_weight_conversion.py``), and
makes rank and alpha of the sum anew. What they were scaled by is not always what comes out of that:
``use_rslora`` goes by the root of a rank that is the sum of two, and an ``alpha_pattern`` may name
modules that are no more.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bake.errors import InputError
from bake.merge.adapter_config import WEIGHTS
from bake.merge.wrapping import NAME, PREFIX


def check_scales(wrapped: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """Require that what PEFT has put together is scaled as its parts were.

    Args:
        wrapped: the model with PEFT's layers.
        folder: of the adapter.
        config: its configuration, as it is in the file.

    Raises:
        InputError: PEFT scales them by something else.
    """
    modules = dict(wrapped.base_model.model.named_modules(remove_duplicate=False))
    stacks = {path: m for path, m in modules.items() if type(m).__name__ == "ParamWrapper"}
    if not stacks or config.get("target_parameters"):
        return  # of these, patterns name the parameters
    trained: dict[str, dict[str, float]] = {}
    for path in _adapted(folder):
        if path in modules and path not in stacks:
            continue
        parents = (path.rsplit(".", n)[0] for n in range(1, path.count(".") + 1))
        place = next((parent for parent in parents if parent in modules), "")
        trained.setdefault(place, {})[path] = _scale(path, wrapped.peft_config[NAME], config)
    for place, scales in trained.items():
        inside = [layer for path, layer in stacks.items() if f"{path}.".startswith(f"{place}.")]
        found = [layer.scaling[NAME] for layer in (inside if place else stacks.values())]
        lost = [path for path, scale in scales.items() if not _is_among(scale, found)]
        new = [scale for scale in found if not _is_among(scale, scales.values())]
        if lost or new:
            path = lost[0] if lost else next(iter(scales))
            raise _refusal(path, scales[path], new or found, folder, config)


def _adapted(folder: Path) -> Iterator[str]:
    """Yield the paths of what the file has factors for, as they were where it was trained."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = [name.removeprefix(PREFIX) for name in file.keys() if ".lora_" in name]
    yield from dict.fromkeys(name.partition(".lora_")[0] for name in names)


def _scale(path: str, made: Any, config: Mapping[str, Any]) -> float:
    """Return what the factors of one module are scaled by: ``peft/tuners/lora/layer.py``."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = (config.get(f"{key}_pattern") or {} for key in ("rank", "alpha"))
    rank = ranks.get(get_pattern_key(ranks, path), made.r)
    alpha = alphas.get(get_pattern_key(alphas, path), made.lora_alpha)
    return float(alpha / (math.sqrt(rank) if made.use_rslora else rank))


def _is_among(scale: float, others: Any) -> bool:
    return any(math.isclose(scale, other, rel_tol=1e-9) for other in others)


def _refusal(
    path: str, scale: float, found: list[float], folder: Path, config: Mapping[str, Any]
) -> InputError:
    made = ", ".join(f"{value:.6g}" for value in dict.fromkeys(found))
    return InputError(
        f"the factors of {path} were trained with the scale {scale:.6g}, and PEFT makes it {made}",
        where=str(folder / WEIGHTS),
        why="the class of the base holds its experts as one, so that PEFT puts their factors "
        "together"
        + (", and use_rslora goes by the rank of both" * bool(config.get("use_rslora")))
        + (
            ", and an alpha_pattern is for modules that are no more"
            * bool(config.get("alpha_pattern"))
        ),
        fix="merge it with the PEFT and the transformers that it was trained with",
    )
