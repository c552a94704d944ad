"""Round float64 results to the storage dtype, once, and refuse what the dtype cannot hold."""

import torch
from torch import Tensor

from bake.errors import InputError


def to_storage(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return the values rounded to nearest in ``dtype``.

    Raises:
        InputError: a value is not finite, or overflows the dtype (65504 in float16).
    """
    rounded = values.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        largest = float(values.abs().max())
        raise InputError(
            f"the edited tensor {name} does not fit its dtype: |value| up to {largest:.3g}",
            why=f"{str(dtype).removeprefix('torch.')} holds at most {torch.finfo(dtype).max:.3g}, "
            "or the base tensor holds values that are not finite",
            fix="lower the strength or the coefficient, or use a checkpoint in another dtype",
        )
    return rounded
