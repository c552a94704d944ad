"""PEFT's layers as sums: the factors that one adds to its weight, and the lengths of DoRA.

The arithmetic is that of ``peft/tuners/lora/layer.py``: ``get_delta_weight`` of every class.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bake.errors import InputError
from bake.merge.change import Factors, Lengths, Rows
from bake.merge.wrapping import NAME


def _linear(layer: Any) -> Factors:
    left, right, scale = layer.lora_B[NAME].weight, layer.lora_A[NAME].weight, layer.scaling[NAME]
    if layer.fan_in_fan_out:
        return Factors(right.T, left.T, scale)
    return Factors(left, right, scale)


def _table(layer: Any) -> Factors:
    """A table's rows are its inputs: A is [r, V], and B [d, r]."""
    left, right = layer.lora_embedding_A[NAME].T, layer.lora_embedding_B[NAME].T
    return Factors(left, right, layer.scaling[NAME])


def _kernels(layer: Any) -> Factors:
    """A is a convolution of the same kernel, B one of a single point."""
    left, right = layer.lora_B[NAME].weight.flatten(1), layer.lora_A[NAME].weight.flatten(1)
    return Factors(left, right, layer.scaling[NAME])


def _stacked(layer: Any) -> Factors:
    """One product for each expert: A is [E r, in] by experts, B [out, r E] by ranks."""
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    count = layer.num_experts
    if count == 1:
        return _oriented(layer, b, a)
    a = a.reshape(count, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
    return _oriented(layer, b, a)


def _oriented(layer: Any, left: Tensor, right: Tensor) -> Factors:
    """Turn factors to how a parameter lies: [out, in] where PEFT swapped the two, or [in, out]."""
    scale = layer.scaling[NAME]
    if layer.get_param().ndim == 2 or layer._did_swap_in_out_features:
        return Factors(left, right, scale)
    return Factors(right.mT, left.mT, scale)


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


def factors_of(layer: Any) -> Factors:
    """Return what one of PEFT's layers adds to its parameter."""
    return _KINDS[type(layer).__name__](layer)


def rows_of(layer: Any) -> Rows:
    """Return the single rows that one of PEFT's layers puts in the place of a table's."""
    return Rows(torch.tensor(layer.token_indices[NAME]), layer.trainable_tokens_delta[NAME])


def bias_of(layer: Any) -> Tensor:
    """Return what one of PEFT's layers adds to its bias: the bias of B, scaled."""
    found: Tensor = layer.lora_B[NAME].bias.to(torch.float64) * layer.scaling[NAME]
    return found


def lengths_of(layer: Any, key: str, where: str) -> Lengths | None:
    """Return what DoRA scales the sum to: the outputs' rows of [out, in], the columns of others."""
    variant = layer.lora_variant.get(NAME)
    if variant is None:
        return None
    name = type(variant).__name__
    inner = type(layer.base_layer).__name__ == "TrainableTokensWrapper"
    if name not in _DORA or layer.lora_bias[NAME] or _embed_scale(layer) is not None or inner:
        raise InputError(
            f"{key} is adapted by {name.removesuffix('Variant')}, which is no sum of base and "
            "factors" + (" here" if name in _DORA else ""),
            where=where,
        )
    values = layer.lora_magnitude_vector[NAME].weight.flatten()
    by_column = layer.fan_in_fan_out if name == "DoraLinearVariant" else "Embedding" in name
    return Lengths(values, by_row=not by_column)


def _embed_scale(layer: Any) -> Any:
    return getattr(layer.base_layer, "embed_scale", None)
