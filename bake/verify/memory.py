"""Whether a model fits into memory or has to be streamed, and what streaming gives back."""

import ctypes
import sys
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from bake.checkpoints import Checkpoint

MEMINFO = Path("/proc/meminfo")
"""Where Linux says how much memory there is."""


def too_large(checkpoint: Checkpoint, bytes_each: int = 8) -> bool:
    """Return whether a model would take more than half of the memory that is to be had.

    False where the system does not say how much that is.

    Args:
        checkpoint: of the model.
        bytes_each: what an element takes: in float64 by itself.
    """
    available = _available()
    return available is not None and _elements(checkpoint) * bytes_each > available / 2


def _available() -> int | None:
    """Return the bytes that a process may take: what is free, and what holds copies of files.

    A machine that reads much has little that is free, and gives the copies up for who asks.
    """
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(words[1]) << 10 for words in found), None)


def fits_gpu(checkpoint: Checkpoint, logits: int) -> bool:
    """Return whether there is a GPU that has room for a model in float32.

    Beside the model there is to be room for as much again, or for the logits if these are more.

    Args:
        checkpoint: of the model.
        logits: how many there are at a time.
    """
    import torch

    if not torch.cuda.is_available():
        return False
    free, _ = torch.cuda.mem_get_info()
    model = _elements(checkpoint)
    return (model + max(model, logits)) * 4 <= free


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
