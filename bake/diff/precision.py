"""How far a stored value may lie from the value that was meant: half a step of its grid."""

import torch
from jaxtyping import Float
from torch import Tensor

# Bits of the significand, the implicit one included, and the exponent of the smallest normal
# number: IEEE 754 binary64, binary32, binary16, and bfloat16.
FLOATS = {"F64": (53, -1022), "F32": (24, -126), "F16": (11, -14), "BF16": (8, -126)}

_WORKING = 53
"""Bits that whoever edited the weights computed with, at most."""


def half_step(values: Float[Tensor, "m n"], dtype: str) -> Float[Tensor, "m n"]:
    """Return, for every value of a float type, half the distance to its neighbours.

    A float64 value is what was computed and not the rounding of something finer, so there it is
    the error of a dot product over n terms, n steps.

    Args:
        values: numbers of that type.
        dtype: a key of ``FLOATS``.
    """
    bits, lowest = FLOATS[dtype]
    exponent = torch.frexp(values)[1]  # |value| in [½, 1) × 2^exponent
    exponent = exponent.masked_fill(values == 0, lowest + 1).clamp(min=lowest + 1)
    scale = 1.0 if bits < _WORKING else 2.0 * values.shape[-1]
    return torch.ldexp(torch.full_like(values, scale), exponent - bits - 1)


def arithmetic(*dtypes: str) -> torch.dtype:
    """Return the type to compute with: one that holds differences of the storage types' values.

    float32 resolves 2⁻²⁴ of a number, far below the rounding of float16 and bfloat16.
    """
    return torch.float32 if all(d in ("F16", "BF16") for d in dtypes) else torch.float64
