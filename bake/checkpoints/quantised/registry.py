"""Which file reads which ``quant_method`` of a configuration."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from bake.checkpoints.quantised import (
    awq,
    bitsandbytes,
    compressed,
    fine_grained,
    gptq,
    modelopt,
    mxfp4,
)
from bake.checkpoints.quantised.found import Found
from bake.checkpoints.quantised.stored import Stored

Finder = Callable[[Stored, Mapping[str, Any], str], Found]
"""Given a checkpoint, the block of its configuration, and what values are dequantised to, returns
its quantised weights."""

METHODS: Mapping[str, Finder] = MappingProxyType(
    {
        "fp8": fine_grained.find,
        "fbgemm_fp8": fine_grained.find,
        "compressed-tensors": compressed.find,
        "mxfp4": mxfp4.find,
        "modelopt": modelopt.find,
        "modelopt_fp4": modelopt.find,
        "gptq": gptq.find,
        "awq": awq.find,
        "bitsandbytes": bitsandbytes.find,
    }
)
"""By the word of the configuration."""
