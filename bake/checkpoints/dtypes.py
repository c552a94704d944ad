"""The storage types of safetensors: their names, their widths and their torch counterparts."""

from typing import TYPE_CHECKING

from bake.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# In the order of the enumeration in safetensors (`Dtype`, safetensors/src/tensor.rs): its writer
# lays tensors out by descending position here, and the extra shard follows the same order.
BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element, by the name that a header uses."""

ORDER = {name: position for position, name in enumerate(BITS)}

# The types of 4 and 6 bits have no entry: torch packs two of the former into one element, so
# a shape in the header is not the shape of a torch tensor. Such tensors travel as bytes only.
_TORCH = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}


def torch_dtype(name: str, *, where: str) -> "torch.dtype":
    """Return the torch type that a header's type name stands for.

    Raises:
        CheckpointError: no type of the installed torch holds such elements one by one.
    """
    import torch  # here: names and widths are read without it

    found = getattr(torch, _TORCH[name], None) if name in _TORCH else None
    if not isinstance(found, torch.dtype):
        raise CheckpointError(
            f"elements of type {name} cannot be read as a torch tensor",
            where=where,
            why="torch has no type that holds one such element",
            fix="leave this tensor as it is, or start from a checkpoint that is not quantised",
        )
    return found
