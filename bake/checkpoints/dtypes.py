"""The storage types of safetensors: their names, their widths and their torch counterparts."""

from typing import TYPE_CHECKING

from bake.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# In the order of the enumeration in safetensors (`Dtype`, safetensors/src/tensor.rs): its writer
# lays tensors out by descending position here, and the extra shard follows the same order. Bits of
# one element, and torch's name of the type. Those of 4 and 6 bits have none: torch packs two of the
# former into one element, so a shape in the header is not the shape of a torch tensor. Such tensors
# travel as bytes only.
_TYPES = {
    "BOOL": (8, "bool"),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}
BITS = {name: bits for name, (bits, _) in _TYPES.items()}
"""Bits of one element, by the name that a header uses."""
ORDER = {name: position for position, name in enumerate(_TYPES)}


def torch_dtype(name: str, *, where: str) -> "torch.dtype":
    """Return the torch type that a header's type name stands for.

    Raises:
        CheckpointError: no type of the installed torch holds such elements one by one.
    """
    import torch  # here: names and widths are read without it

    found = getattr(torch, _TYPES[name][1] or "", None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(
            f"elements of type {name} cannot be read as a torch tensor",
            where=where,
            why="torch has no type that holds one such element",
            fix="leave this tensor as it is, or start from a checkpoint that is not quantised",
        )
    return found
