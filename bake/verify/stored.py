"""What the weights of a GGUF artifact are stored in: it decides what is asked of its numbers."""

import torch

from bake.checkpoints.gguf.file import open_gguf
from bake.verify.artifact import Baked
from bake.verify.runs import DTYPES


def stored_dtypes(artifact: Baked) -> tuple[torch.dtype, ...]:
    """Return the floating types of a GGUF artifact, which may be narrower than the base's."""
    dtypes = (DTYPES[name] for name in sorted(_types(artifact) & DTYPES.keys()))
    return tuple(dtype for dtype in dtypes if dtype != torch.float64)


def quantised(artifact: Baked) -> bool:
    """Whether a GGUF artifact holds weights in codes, which cost more than any tolerance here."""
    return bool(_types(artifact) - DTYPES.keys())


def _types(artifact: Baked) -> frozenset[str]:
    """Return the types of the tensors of a model in GGUF; of any other artifact none."""
    if not artifact.carrier.whole or artifact.carrier.checkpoint:
        return frozenset()
    first = sorted(artifact.path.glob(f"*{artifact.carrier.suffix}"))[:1]  # of a split file
    return frozenset(t.kind.name for file in first for t in open_gguf(file).tensors.values())
