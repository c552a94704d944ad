"""Whether a model fits into memory or has to be streamed, and what streaming gives back."""

import ctypes
import os
import sys
from functools import cache
from math import prod
from typing import Any

from bake.checkpoints import Checkpoint


def too_large(checkpoint: Checkpoint) -> bool:
    """Return whether a model in float64 would take more than half of the memory that is free.

    False where the system does not say how much that is.
    """
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return False
    return _elements(checkpoint) * 8 > free / 2


def fits_gpu(checkpoint: Checkpoint) -> bool:
    """Return whether there is a GPU of which a model in float32 takes half of the free memory."""
    import torch

    if not torch.cuda.is_available():
        return False
    free, _ = torch.cuda.mem_get_info()
    return _elements(checkpoint) * 4 <= free / 2


def _elements(checkpoint: Checkpoint) -> int:
    return sum(prod(info.shape) for info in checkpoint.tensors.values())


def give_back() -> None:
    """Return freed memory to the system, where the C library can be told to.

    glibc keeps what was freed, in pieces that the next block's tensors do not fit into: sixty
    blocks would take the memory of ten. See malloc_trim(3).
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@cache
def _glibc() -> Any:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None  # musl has none
